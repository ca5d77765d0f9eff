"""Ops of the output layer: loss and gradient of a block of logits, in place."""

import torch
from torch import Tensor

from .registry import check, register
from .rounding import accumulate_dtype


def _check_logits(op: str, logits: Tensor, labels: Tensor, softcap: float | None) -> None:
    check(logits.dim() == 2, op, f"logits must be [t, V], got {tuple(logits.shape)}")
    check(
        labels.shape == logits.shape[:1] and labels.dtype == torch.int64,
        op,
        f"labels must be int64 [{logits.shape[0]}], got {tuple(labels.shape)} {labels.dtype}",
    )
    check(
        labels.device == logits.device,
        op,
        f"labels are on {labels.device}, logits on {logits.device}",
    )
    check(softcap is None or softcap > 0, op, f"softcap must be positive or None, got {softcap}")


@register("losia::cross_entropy_grad_", mutates_args=("logits",))
def cross_entropy_grad_(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    write_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every token, ``logits`` replaced by the gradient of the losses' sum.

    With ``z = softcap * tanh(logit_scale * logits / softcap)`` (scaled only, if ``softcap`` is
    None) and ``lse = logsumexp(z)``: ``loss = lse - (1 - label_smoothing) z[label] -
    label_smoothing mean(z)``.

    Args:
        logits: ``[t, V]`` of any floating-point dtype and strides, written.
        labels: ``[t]`` int64. One out of range raises on the CPU; on a GPU, which nobody waits for
            here, its loss and gradient are NaN.
        ignore_index: the label of tokens without loss and gradient.
        label_smoothing: the share of the target that is spread over the vocabulary.
        softcap: the bound of the logits, positive, or None.
        logit_scale: multiplies the logits before the cap.
        write_grad: False leaves the logits as they are.

    Returns:
        ``(losses [t], lse [t])`` float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a ``softcap`` that is not positive.
    """
    _check_logits("cross_entropy_grad_", logits, labels, softcap)
    if logits.is_cuda and logits.dtype != torch.float64:
        from ..kernels.cross_entropy import launch_cross_entropy_grad_ as run
    else:
        run = cross_entropy_grad_plain_
    return run(logits, labels, ignore_index, label_smoothing, softcap, logit_scale, write_grad)


@cross_entropy_grad_.register_fake
def _(
    logits,
    labels,
    ignore_index=-100,
    label_smoothing=0.0,
    softcap=None,
    logit_scale=1.0,
    write_grad=True,
):
    dtype = accumulate_dtype(logits.dtype)
    return logits.new_empty(logits.shape[0], dtype=dtype), logits.new_empty(
        logits.shape[0], dtype=dtype
    )


@register("losia::cross_entropy_block_grad_", mutates_args=("logits",))
def cross_entropy_block_grad_(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    first_out: int,
    vocabulary: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """The gradient of ``cross_entropy_grad_`` for a block of the vocabulary, in place, once ``lse``
    is known.

    Args:
        logits: ``[t, block]``, those of the outputs from ``first_out`` on, written.
        labels: ``[t]`` int64, into the whole vocabulary.
        lse: ``[t]`` float32, as ``cross_entropy_grad_`` returns it.
        first_out: the block's first output.
        vocabulary: how many outputs there are in all.
        ignore_index, label_smoothing, softcap, logit_scale: those of ``cross_entropy_grad_``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a ``softcap`` that is not positive.
    """
    _check_logits("cross_entropy_block_grad_", logits, labels, softcap)
    if logits.is_cuda and logits.dtype != torch.float64:
        from ..kernels.cross_entropy import launch_cross_entropy_block_grad_ as run
    else:
        run = cross_entropy_block_grad_plain_
    run(
        logits,
        labels,
        lse,
        first_out,
        vocabulary,
        ignore_index,
        label_smoothing,
        softcap,
        logit_scale,
    )


@cross_entropy_block_grad_.register_fake
def _(*args, **kwargs):
    return None


def cross_entropy_grad_plain_(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    write_grad: bool,
) -> tuple[Tensor, Tensor]:
    z = capped_logits(logits, softcap, logit_scale)  # [t, V]
    ignored = labels == ignore_index
    target = z.gather(1, labels.masked_fill(ignored, 0)[:, None])[:, 0]
    mean = z.mean(-1) if label_smoothing else 0.0
    if write_grad:
        probability = z if softcap is None else z.clone()  # in place: a chunk is most of the memory
        lse = softmax_(probability)
        _write_cross_entropy_grad(
            logits,
            probability,
            z,
            labels,
            lse,
            0,
            logits.shape[1],
            ignore_index,
            label_smoothing,
            softcap,
            logit_scale,
        )
    else:
        lse = z.logsumexp(-1)
    losses = lse - (1 - label_smoothing) * target - label_smoothing * mean
    return losses.masked_fill_(ignored, 0.0), lse


def softmax_(z: Tensor) -> Tensor:
    """``z [t, V]`` becomes its softmax; returns its logsumexp ``[t]``. One pass of exponentials for
    both."""
    largest = z.amax(-1)
    torch.softmax(z, -1, out=z)
    return largest - z.amax(-1).log_()  # the largest probability is exp(largest - logsumexp)


def cross_entropy_block_grad_plain_(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    first_out: int,
    vocabulary: int,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
) -> None:
    z = capped_logits(logits, softcap, logit_scale)  # [t, block]
    probability = (z.sub_(lse[:, None]) if softcap is None else z - lse[:, None]).exp_()
    _write_cross_entropy_grad(
        logits,
        probability,
        z,
        labels,
        lse,
        first_out,
        vocabulary,
        ignore_index,
        label_smoothing,
        softcap,
        logit_scale,
    )


def _write_cross_entropy_grad(
    logits,
    probability,
    z,
    labels,
    lse,
    first_out,
    vocabulary,
    ignore_index,
    label_smoothing,
    softcap,
    logit_scale,
):
    grad = probability
    if label_smoothing:
        grad -= label_smoothing / vocabulary
    position = labels - first_out
    here = (position >= 0) & (position < logits.shape[1])
    share = here.to(grad.dtype) * (label_smoothing - 1)
    grad.scatter_add_(1, position.masked_fill(~here, 0)[:, None], share[:, None])
    if softcap is not None:
        grad *= 1 - (z / softcap).square_()
    if logit_scale != 1:
        grad *= logit_scale
    if grad is not logits:
        logits.copy_(grad)
    logits.index_fill_(0, (labels == ignore_index).nonzero()[:, 0], 0.0)


def capped_logits(logits: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """``softcap * tanh(logit_scale * logits / softcap)`` in float32; ``logits`` itself where that
    changes nothing."""
    z = logits.to(accumulate_dtype(logits.dtype))
    if logit_scale != 1:
        z = z * logit_scale
    return z if softcap is None else (z / softcap).tanh_().mul_(softcap)
