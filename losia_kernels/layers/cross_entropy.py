"""The output layer (Section 3.2): linear and cross-entropy in one, whose logits exist for a chunk
of tokens at a time and whose weight gradient exists for the chosen vocabulary rows only."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.rounding import accumulate_dtype
from .first_order import without_derivative

CHUNK_BYTES = 128 * 2**20  # 1,024 tokens of a vocabulary of 32,000


def losia_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    subnet: Tensor | None = None,
    out_idx: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
    on_gradient: "Callable[[WeightGradient], None] | None" = None,
) -> Tensor:
    """``cross_entropy(hidden @ weight.T + bias, labels)``, differentiated for ``hidden`` and some
    rows of the weight (Section 3.2).

    With ``z = softcap * tanh(logit_scale * raw / softcap)``, only scaled if ``softcap`` is None.
    Beyond the gradients themselves one chunk of logits is in memory. The gradients are made with
    the loss; the backward only scales them. On the CPU ignored tokens have no logits.

    Args:
        hidden: ``[..., d]`` of the weight's dtype; under autocast both are computed in its dtype.
        weight: ``[V, d]``; never differentiated itself.
        labels: int64 ``[...]``, already shifted.
        subnet: only carries the weight's gradient: the float32 copy of ``weight[out_idx]``, or of
            all rows (the weight itself will do). None: the weight is frozen.
        out_idx: int64 ``[k_out]``; None is all rows.
        bias: ``[V]``; a trained one gets its gradient.
        ignore_index, label_smoothing: as of torch's cross_entropy.
        reduction: "mean" divides by the number of labels not ignored, "sum" by nothing.
        softcap, logit_scale: see above.
        chunk_bytes: of the logits in memory, in float32 (half of that in 16 bits), at least one
            token's.
        on_gradient: called in the backward with the dense weight gradient, which is computed by
            rows, as they are asked for (a layer that observes).

    Returns:
        The loss, a float32 scalar (float64 for float64).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit.
        IndexError: a label is out of range, on the CPU; on a GPU, which nobody waits for here, that
            makes loss and gradients NaN.
    """
    if autocast_dtype(hidden) != hidden.dtype:
        hidden, weight = hidden.to(autocast_dtype(hidden)), weight.to(autocast_dtype(hidden))
    _check(hidden, weight, labels, subnet, out_idx, bias)
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"linear_cross_entropy: reduction must be 'mean' or 'sum', got {reduction!r}"
        )
    if chunk_bytes < 1:
        raise ValueError(f"linear_cross_entropy: chunk_bytes must be at least 1, got {chunk_bytes}")
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    # all that a second derivative, which there is none of, must know of hidden
    source = None if torch.compiler.is_compiling() else hidden[:0].clone()
    # a FakeTensor has no values
    readable = type(labels) is Tensor and not torch.compiler.is_compiling()
    if labels.device.type == "cpu" and readable:
        _check_labels(labels, weight.shape[0], ignore_index)
        learned = labels != ignore_index
        # a prompt's tokens need no logits; on a GPU their number is not known without waiting
        if not learned.all():
            hidden, labels = hidden[learned], labels[learned]
    formula = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "softcap": softcap,
        "logit_scale": logit_scale,
    }
    total = _LinearCrossEntropy.apply(
        hidden,
        weight.detach(),
        bias,
        subnet,
        labels,
        out_idx,
        formula,
        chunk_bytes,
        on_gradient,
        torch.is_grad_enabled(),
        (source, bias, subnet),
    )
    return total if reduction == "sum" else total / (labels != ignore_index).sum()


def autocast_dtype(hidden: Tensor) -> torch.dtype:
    """In which dtype a linear computes on ``hidden``: autocast's, if that is on, but float64 stays
    as it is."""
    device = hidden.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return (
        torch.get_autocast_dtype(device)
        if autocast and hidden.dtype != torch.float64
        else hidden.dtype
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the losses; the forward makes the gradients of that sum, the backward scales them.

    Before the scaling they are of the size of a probability times a weight: a GradScaler's factor
    need not be known for float16 to hold them.
    """

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        subnet,
        labels,
        out_idx,
        formula,
        chunk_bytes,
        on_gradient,
        differentiable,
        sources,
    ):
        wanted = [differentiable and needed for needed in ctx.needs_input_grad]
        dtype = accumulate_dtype(hidden.dtype)
        d_hidden = torch.empty_like(hidden) if wanted[0] else None  # [t, d]
        d_bias = torch.zeros_like(bias, dtype=dtype) if wanted[2] else None  # [V]
        d_subnet = torch.zeros_like(subnet, dtype=dtype) if wanted[3] else None  # [k_out, d]
        losses, lse = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(2))  # [t]
        tokens = _tokens_per_chunk(chunk_bytes, hidden.shape[0], weight.shape[0])
        buffer = hidden.new_empty(tokens, weight.shape[0])
        for chunk in _slices(hidden.shape[0], tokens):
            x = hidden[chunk]
            # [chunk, V]; from the next line on their gradient
            logits = _logits(x, weight, bias, buffer)
            losses[chunk], lse[chunk] = ops.cross_entropy_grad_(
                logits, labels[chunk], **formula, write_grad=any(wanted)
            )
            if d_hidden is not None:
                torch.mm(logits, weight, out=d_hidden[chunk])
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=dtype)
            if d_subnet is not None:
                _add_subnet_grad(d_subnet, logits, x, out_idx, chunk_bytes)
        observed = (hidden, weight, bias, lse) if on_gradient is not None else (None,) * 4
        ctx.save_for_backward(labels, d_hidden, d_bias, d_subnet, *observed)
        ctx.formula, ctx.chunk_bytes, ctx.on_gradient = formula, chunk_bytes, on_gradient
        ctx.sources = sources
        return losses.sum()

    @staticmethod
    def backward(ctx, d_loss):
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _LinearCrossEntropy.gradients(ctx, d_loss)
        with torch.no_grad():
            grads = _LinearCrossEntropy.gradients(ctx, d_loss)
        return without_derivative(grads, (d_loss, *ctx.sources))

    @staticmethod
    def gradients(ctx, d_loss):
        labels, d_hidden, d_bias, d_subnet, hidden, weight, bias, lse = ctx.saved_tensors
        learned = (labels != ctx.formula["ignore_index"]).any()
        # as in torch: nothing learned, no gradient, though 1/0 came in
        d_loss = torch.where(learned, d_loss, 0.0)
        if ctx.on_gradient is not None:
            hidden = hidden.detach()  # the graph is not to live as long as this
            labels = labels.clone()  # a loop may reuse its batch
            ctx.on_gradient(
                WeightGradient(
                    hidden, weight, bias, labels, lse, d_loss, ctx.formula, ctx.chunk_bytes
                )
            )
        d_hidden, d_bias, d_subnet = (
            _scaled(grad, d_loss) for grad in (d_hidden, d_bias, d_subnet)
        )
        return d_hidden, None, d_bias, d_subnet, *(None,) * 7


@dataclass(eq=False)
class WeightGradient:
    """The dense weight gradient ``[V, d]`` of one backward, of which ``gradient[rows]`` computes
    rows.

    It holds what it is computed from, a fraction of its size: the hidden states and, for each token,
    the label and the log-sum-exp. The weight must not have changed since.
    """

    hidden: Tensor  # [t, d]
    weight: Tensor  # [V, d]
    bias: Tensor | None
    labels: Tensor  # [t]
    lse: Tensor  # [t]
    d_loss: Tensor
    formula: dict[str, Any]
    chunk_bytes: int

    @property
    def blocks(self) -> list[slice]:
        """Rows that are to be asked for together, in order; see ``row_blocks``."""
        return row_blocks(self.weight.shape, self.chunk_bytes)

    def __getitem__(self, rows: slice) -> Tensor:
        """``[rows, d]`` in float32 (float64 of float64).

        Importance is not linear in the gradient, so a row has seen all tokens.
        """
        hidden, size = self.hidden, rows.stop - rows.start
        block = self.blocks[0].stop
        tokens = max(1, min(hidden.shape[0], self.chunk_bytes // (4 * block)))
        buffer = hidden.new_empty(tokens, size)
        bias = None if self.bias is None else self.bias[rows]
        grad = hidden.new_zeros(size, hidden.shape[1], dtype=accumulate_dtype(hidden.dtype))
        for chunk in _slices(hidden.shape[0], tokens):
            logits = _logits(hidden[chunk], self.weight[rows], bias, buffer)
            ops.cross_entropy_block_grad_(
                logits,
                self.labels[chunk],
                self.lse[chunk],
                rows.start,
                self.weight.shape[0],
                **self.formula,
            )
            grad += ops.subnet_grad(logits, hidden[chunk])
        return grad.mul_(self.d_loss)


def row_blocks(shape: torch.Size, chunk_bytes: int = CHUNK_BYTES) -> list[slice]:
    """A ``[V, d]`` gradient's rows in blocks of at most ``chunk_bytes`` float32 values; they depend
    on the weight alone, so that ranks that average them meet in step."""
    return _slices(shape[0], max(1, min(shape[0], chunk_bytes // (4 * shape[1]))))


def gradient_blocks(gradient: Tensor | WeightGradient) -> Iterator[tuple[Tensor, slice]]:
    """What a layer observes, as ``(gradient[outputs], outputs)`` from the first output to the last:
    a tensor in one piece."""
    if isinstance(gradient, Tensor):
        yield gradient, slice(None)
    else:
        for rows in gradient.blocks:
            yield gradient[rows], rows


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """``x @ weight.T + bias`` in the first rows of ``buffer``: a second chunk is never alive beside
    the first."""
    logits = buffer[: x.shape[0]]
    if bias is None:
        return torch.mm(x, weight.T, out=logits)
    return torch.addmm(bias.to(x.dtype), x, weight.T, out=logits)


def _add_subnet_grad(
    d_subnet: Tensor, d_logits: Tensor, x: Tensor, out_idx: Tensor | None, chunk_bytes: int
) -> None:
    """``d_subnet += d_logits[:, out_idx].T @ x``, by blocks: the sum of a chunk is as large as what
    it is added to."""
    block = max(1, chunk_bytes // (4 * x.shape[1]))
    for rows in _slices(d_subnet.shape[0], block):
        if out_idx is None:
            d_subnet[rows] += ops.subnet_grad(d_logits[:, rows], x)
        else:
            d_subnet[rows] += ops.subnet_grad(d_logits, x, out_idx[rows])


def _scaled(grad: Tensor | None, factor: Tensor) -> Tensor | None:
    """``grad * factor`` with a float32 factor and one rounding; a new tensor, for
    ``retain_graph``."""
    return (
        None
        if grad is None
        else torch.mul(grad, factor.reshape((1,) * grad.dim()), out=torch.empty_like(grad))
    )


def _tokens_per_chunk(chunk_bytes: int, tokens: int, vocabulary: int) -> int:
    fit = max(1, min(tokens, chunk_bytes // (4 * vocabulary)))
    return fit if fit == tokens or fit < 128 else fit - fit % 128  # whole tiles of a matrix product


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _check(hidden, weight, labels, subnet, out_idx, bias) -> None:
    def check(good: bool, problem: str) -> None:
        if not good:
            raise ValueError(f"linear_cross_entropy: {problem}")

    check(
        weight.dim() == 2 and hidden.dim() >= 1 and hidden.shape[-1] == weight.shape[1],
        f"hidden {tuple(hidden.shape)} does not fit a weight of {tuple(weight.shape)}",
    )
    check(
        hidden.dtype == weight.dtype,
        f"hidden is {hidden.dtype}, weight {weight.dtype}; they must be the same",
    )
    check(
        hidden.is_floating_point(), f"hidden must be of a floating-point dtype, got {hidden.dtype}"
    )
    check(
        labels.dtype == torch.int64 and labels.shape == hidden.shape[:-1],
        f"labels must be int64 {tuple(hidden.shape[:-1])}, got {labels.dtype} {tuple(labels.shape)}",
    )
    k_out = weight.shape[0]
    if out_idx is not None:
        check(
            out_idx.dim() == 1 and out_idx.dtype == torch.int64,
            f"out_idx must be a 1-D int64 tensor, got {tuple(out_idx.shape)} {out_idx.dtype}",
        )
        k_out = out_idx.shape[0]
    if subnet is not None:
        check(
            subnet.shape == (k_out, weight.shape[1]),
            f"subnet must be {(k_out, weight.shape[1])}, got {tuple(subnet.shape)}",
        )
    if bias is not None:
        check(
            bias.shape == weight.shape[:1],
            f"bias must be {tuple(weight.shape[:1])}, got {tuple(bias.shape)}",
        )
    for name, tensor in (
        ("weight", weight),
        ("labels", labels),
        ("subnet", subnet),
        ("out_idx", out_idx),
        ("bias", bias),
    ):
        check(
            tensor is None or tensor.device == hidden.device,
            f"{name} is on {getattr(tensor, 'device', None)}, hidden on {hidden.device}",
        )


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    bad = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if bad.any():
        position = int(bad.int().argmax())
        raise IndexError(
            f"linear_cross_entropy: label {int(labels[position])} of token {position} is out of range for a vocabulary "
            f"of {vocabulary} (ignore_index is {ignore_index})"
        )
