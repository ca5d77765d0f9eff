"""The functional API, registered as ``torch.library`` custom ops: schema, CPU, CUDA and fake in one file.

CPU tensors (and float64 anywhere) take ``eager``; CUDA tensors take the Triton kernels, imported on first use.
Names that end in ``_`` write their arguments. Order is always (out, in); ``t`` counts tokens.
"""

import torch
from torch import Tensor

from . import eager

__all__ = [
    "cross_entropy_block_grad_",
    "cross_entropy_grad_",
    "gather_features",
    "importance_marginals",
    "importance_update_",
    "score_marginals",
    "subnet_adamw_",
    "subnet_grad",
    "subnet_grad_partials",
]


def _k(idx: Tensor | None, size: int) -> int:
    return size if idx is None else idx.shape[0]


def _check(condition: bool, op: str, problem: str) -> None:
    if not condition:
        raise ValueError(f"losia_kernels.ops.{op}: {problem}")


def _check_index(op: str, name: str, idx: Tensor | None, like: Tensor) -> None:
    """Shape, dtype and device only: reading the values would wait for the GPU. ``Subnet`` checks those."""
    if idx is None:
        return
    _check(idx.dim() == 1 and idx.dtype == torch.int64, op,
           f"{name} must be a 1-D int64 tensor, got {tuple(idx.shape)} {idx.dtype}")
    _check(idx.device == like.device, op, f"{name} is on {idx.device}, the data on {like.device}")


def _check_same(op: str, names: str, *tensors: Tensor, dtype: bool = True) -> None:
    first = tensors[0]
    for tensor in tensors[1:]:
        _check(tensor.shape == first.shape, op,
               f"{names} must have one shape, got {[tuple(t.shape) for t in tensors]}")
        _check(tensor.device == first.device, op, f"{names} are on {[str(t.device) for t in tensors]}")
        _check(not dtype or tensor.dtype == first.dtype, op, f"{names} have dtypes {[t.dtype for t in tensors]}")


def _check_kind(op: str, kind: str) -> None:
    _check(kind in eager.KINDS, op, f"kind must be one of {eager.KINDS}, got {kind!r}")


# gather_features ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("losia::gather_features", mutates_args=())
def gather_features(x: Tensor, idx: Tensor) -> Tensor:
    """Columns ``idx`` of an activation: ``x [..., n]``, ``idx [k]`` int64 -> contiguous ``[..., k]`` of x's dtype.

    Any leading dimensions, any strides. The X_S of Eq. 9. Errors: ValueError for an index that is not 1-D int64 on
    x's device; values are not checked here (``Subnet`` does).
    """
    _check(x.dim() >= 1, "gather_features", "x must have at least one dimension")
    _check_index("gather_features", "idx", idx, x)
    if x.is_cuda:
        from .kernels.gather import launch_gather_features

        return launch_gather_features(x, idx)
    return eager.gather_features(x, idx)


@gather_features.register_fake
def _(x, idx):
    return x.new_empty(*x.shape[:-1], idx.shape[0])


# subnet_grad ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("losia::subnet_grad_partials", mutates_args=())
def subnet_grad_partials(dy: Tensor, x: Tensor, out_idx: Tensor | None = None, in_idx: Tensor | None = None) -> Tensor:
    """``subnet_grad`` before its reduction: ``[splits, k_out, k_in]`` float32, one summand per range of tokens.

    ``subnet_adamw_`` takes it as it is, which saves writing and reading the sum.
    """
    op = "subnet_grad"
    _check(dy.shape[:-1] == x.shape[:-1], op,
           f"dy {tuple(dy.shape)} and x {tuple(x.shape)} must agree in all but the last dimension")
    _check(dy.dtype == x.dtype, op, f"dy is {dy.dtype}, x is {x.dtype}; they must be the same")
    _check(dy.device == x.device, op, f"dy is on {dy.device}, x on {x.device}")
    _check_index(op, "out_idx", out_idx, dy)
    _check_index(op, "in_idx", in_idx, x)
    if dy.is_cuda and dy.dtype != torch.float64:
        from .kernels.subnet_grad import launch_subnet_grad

        return launch_subnet_grad(dy, x, out_idx, in_idx)
    return eager.subnet_grad_partials(dy, x, out_idx, in_idx)


@subnet_grad_partials.register_fake
def _(dy, x, out_idx=None, in_idx=None):
    k_out, k_in = _k(out_idx, dy.shape[-1]), _k(in_idx, x.shape[-1])
    splits = 1
    if dy.is_cuda and dy.dtype != torch.float64:
        from .kernels._launch import token_splits

        splits = token_splits(dy.numel() // dy.shape[-1], k_out, k_in)
    return dy.new_empty(splits, k_out, k_in, dtype=eager.accumulate_dtype(dy.dtype))


def subnet_grad(dy: Tensor, x: Tensor, out_idx: Tensor | None = None, in_idx: Tensor | None = None) -> Tensor:
    """Gradient of the subnet, Eq. 9: ``dy[..., out_idx].T @ x[..., in_idx]``, summed over all tokens.

    ``dy [..., out]`` and ``x [..., n]`` share their leading dimensions and dtype (float32, float16, bfloat16);
    ``out_idx [k_out]``, ``in_idx [k_in]`` int64; None takes all (x gathered before, or the output layer).
    Returns ``[k_out, k_in]`` float32 (float64 for float64). Deterministic: the tokens are split into ranges whose
    sums are added in fixed order.
    """
    partials = subnet_grad_partials(dy, x, out_idx, in_idx)
    return partials[0] if partials.shape[0] == 1 else partials.sum(0)


# subnet_adamw_ --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("losia::subnet_adamw_", mutates_args=("weight", "subnet", "exp_avg", "exp_avg_sq"))
def subnet_adamw_(
    weight: Tensor,
    subnet: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    out_idx: Tensor,
    in_idx: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int | None = None,
) -> None:
    """One AdamW step on ``subnet`` and, in the same pass, its new values into ``weight[out_idx][:, in_idx]``.

    ``weight [out, in]`` float32 / float16 / bfloat16; ``exp_avg``, ``exp_avg_sq`` ``[k_out, k_in]`` float32;
    ``grad`` ``[k_out, k_in]``, or ``[splits, k_out, k_in]`` as ``subnet_grad_partials`` returns it;
    ``step`` counts this matrix's updates from 1. Decoupled decay, eps outside the square root of the corrected second
    moment (torch.optim.AdamW).

    ``subnet [k_out, k_in]`` in float32 is the master copy, and the weight gets it rounded to nearest. In the weight's
    16-bit dtype there is no master: with ``seed`` the new values are rounded stochastically, without it to nearest
    (the reference's behaviour, which loses small updates).
    """
    op = "subnet_adamw_"
    shape = (out_idx.shape[0], in_idx.shape[0])
    _check_index(op, "out_idx", out_idx, weight)
    _check_index(op, "in_idx", in_idx, weight)
    _check(weight.dim() == 2, op, f"weight must be [out, in], got {tuple(weight.shape)}")
    _check(subnet.shape == shape, op, f"subnet is {tuple(subnet.shape)}, the indices give {shape}")
    _check(grad.dim() in (2, 3) and grad.shape[-2:] == shape, op, f"grad is {tuple(grad.shape)}, expected {shape}")
    _check(grad.device == weight.device, op, f"grad is on {grad.device}, weight on {weight.device}")
    _check_same(op, "subnet, exp_avg, exp_avg_sq", subnet, exp_avg, exp_avg_sq, dtype=False)
    _check(subnet.device == weight.device, op, f"subnet is on {subnet.device}, weight on {weight.device}")
    _check(exp_avg.dtype == exp_avg_sq.dtype == eager.accumulate_dtype(weight.dtype), op,
           f"moments must be {eager.accumulate_dtype(weight.dtype)}, got {exp_avg.dtype}, {exp_avg_sq.dtype}")
    _check(subnet.dtype in (exp_avg.dtype, weight.dtype), op,
           f"subnet must be {exp_avg.dtype} (master) or {weight.dtype} (weight's dtype), got {subnet.dtype}")
    _check(seed is None or subnet.dtype in (torch.bfloat16, torch.float16), op,
           f"seed asks for stochastic rounding of a 16-bit subnet, but subnet is {subnet.dtype}")
    _check(step >= 1, op, f"step counts from 1, got {step}")
    if weight.is_cuda and weight.dtype != torch.float64 and weight.numel():
        from .kernels.subnet_adamw import launch_subnet_adamw_ as run
    else:
        run = eager.subnet_adamw_
    run(weight, subnet, grad, exp_avg, exp_avg_sq, out_idx, in_idx, lr, beta1, beta2, eps, weight_decay, step, seed)


@subnet_adamw_.register_fake
def _(weight, subnet, grad, exp_avg, exp_avg_sq, out_idx, in_idx, lr, beta1, beta2, eps, weight_decay, step, seed=None):
    return None


# importance -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("losia::importance_update_", mutates_args=("importance", "uncertainty"))
def importance_update_(
    importance: Tensor,
    uncertainty: Tensor,
    weight: Tensor,
    grad: Tensor,
    beta1: float,
    beta2: float,
    kind: str = "sensitivity",
    grad_scale: float = 1.0,
) -> None:
    """Smoothed importance and its uncertainty, Eqs. 3-6, in one pass over ``weight`` and ``grad``; all ``[out, in]``.

    With ``g = grad * grad_scale``: I is ``|g w - (g w)^2 / 2|`` ("sensitivity"), ``|g w|`` ("first_order"),
    ``(g w)^2 / 2`` ("second_order") or ``|g|`` ("gradient"). Then ``importance <- beta1 importance + (1 - beta1) I``
    and, with the new importance, ``uncertainty <- beta2 uncertainty + (1 - beta2) |I - importance|``. Both are kept
    in float32 or bfloat16; the arithmetic is float32. ``grad_scale`` undoes a scaling of the loss.
    """
    op = "importance_update_"
    _check_kind(op, kind)
    _check_same(op, "importance, uncertainty", importance, uncertainty)
    _check_same(op, "importance, weight, grad", importance, weight, grad, dtype=False)
    if weight.is_cuda and weight.dtype != torch.float64 and weight.numel():
        from .kernels.importance import launch_importance_update_ as run
    else:
        run = eager.importance_update_
    run(importance, uncertainty, weight, grad, beta1, beta2, kind, grad_scale)


@importance_update_.register_fake
def _(importance, uncertainty, weight, grad, beta1, beta2, kind="sensitivity", grad_scale=1.0):
    return None


@torch.library.custom_op("losia::importance_marginals", mutates_args=())
def importance_marginals(
    weight: Tensor, grad: Tensor, kind: str = "sensitivity", grad_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Row and column sums of I (see ``importance_update_``) without writing I.

    ``weight``, ``grad`` ``[out, in]`` -> ``([out], [in])`` float32. Deterministic.
    """
    op = "importance_marginals"
    _check_kind(op, kind)
    _check_same(op, "weight, grad", weight, grad, dtype=False)
    if weight.is_cuda and weight.dtype != torch.float64 and weight.numel():
        from .kernels.importance import launch_importance_marginals as run
    else:
        run = eager.importance_marginals
    return run(weight, grad, kind, grad_scale)


@importance_marginals.register_fake
def _(weight, grad, kind="sensitivity", grad_scale=1.0):
    dtype = eager.accumulate_dtype(weight.dtype)
    return weight.new_empty(weight.shape[0], dtype=dtype), weight.new_empty(weight.shape[1], dtype=dtype)


@torch.library.custom_op("losia::score_marginals", mutates_args=())
def score_marginals(
    importance: Tensor, uncertainty: Tensor | None = None, out_idx: Tensor | None = None, in_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Row and column sums of the score ``importance * uncertainty`` (or of ``importance`` alone), never written.

    ``[out, in]`` float32 or bfloat16 -> ``([out], [in])`` float32. The row sums run over ``in_idx`` only, the column
    sums over ``out_idx`` only, where given: the second pass of both greedy orders (Algorithm 1) in one call.
    Deterministic; a non-finite score shows in the sums.
    """
    op = "score_marginals"
    _check(importance.dim() == 2, op, f"importance must be [out, in], got {tuple(importance.shape)}")
    if uncertainty is not None:
        _check_same(op, "importance, uncertainty", importance, uncertainty)
    _check_index(op, "out_idx", out_idx, importance)
    _check_index(op, "in_idx", in_idx, importance)
    if importance.is_cuda and importance.dtype != torch.float64 and importance.numel():
        from .kernels.scores import launch_score_marginals as run
    else:
        run = eager.score_marginals
    return run(importance, uncertainty, out_idx, in_idx)


@score_marginals.register_fake
def _(importance, uncertainty=None, out_idx=None, in_idx=None):
    out_features, in_features = importance.shape
    dtype = eager.accumulate_dtype(importance.dtype)
    return importance.new_empty(out_features, dtype=dtype), importance.new_empty(in_features, dtype=dtype)


# cross-entropy --------------------------------------------------------------------------------------------------------


def _check_logits(op: str, logits: Tensor, labels: Tensor, softcap: float | None) -> None:
    _check(logits.dim() == 2, op, f"logits must be [t, V], got {tuple(logits.shape)}")
    _check(labels.shape == logits.shape[:1] and labels.dtype == torch.int64, op,
           f"labels must be int64 [{logits.shape[0]}], got {tuple(labels.shape)} {labels.dtype}")
    _check(labels.device == logits.device, op, f"labels are on {labels.device}, logits on {logits.device}")
    _check(softcap is None or softcap > 0, op, f"softcap must be positive or None, got {softcap}")


@torch.library.custom_op("losia::cross_entropy_grad_", mutates_args=("logits",))
def cross_entropy_grad_(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    write_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every token, ``logits [t, V]`` replaced by the gradient of the losses' sum.

    With ``z = softcap * tanh(logit_scale * logits / softcap)`` (scaled only, if ``softcap`` is None) and
    ``lse = logsumexp(z)``: ``loss = lse - (1 - label_smoothing) z[label] - label_smoothing mean(z) + z_loss lse^2``.
    ``labels [t]`` int64; ``ignore_index`` gives no loss and no gradient. Returns ``(losses [t], lse [t])`` in float32.
    ``write_grad=False`` leaves the logits as they are. A label out of range raises on the CPU; on a GPU, which nobody
    waits for here, its loss and gradient are NaN.
    """
    _check_logits("cross_entropy_grad_", logits, labels, softcap)
    if logits.is_cuda and logits.dtype != torch.float64:
        from .kernels.cross_entropy import launch_cross_entropy_grad_ as run
    else:
        run = eager.cross_entropy_grad_
    return run(logits, labels, ignore_index, label_smoothing, z_loss, softcap, logit_scale, write_grad)


@cross_entropy_grad_.register_fake
def _(logits, labels, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, logit_scale=1.0,
      write_grad=True):
    dtype = eager.accumulate_dtype(logits.dtype)
    return logits.new_empty(logits.shape[0], dtype=dtype), logits.new_empty(logits.shape[0], dtype=dtype)


@torch.library.custom_op("losia::cross_entropy_block_grad_", mutates_args=("logits",))
def cross_entropy_block_grad_(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    first_out: int,
    vocabulary: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """The gradient of ``cross_entropy_grad_`` for a block of the vocabulary, in place, once ``lse [t]`` is known.

    ``logits [t, block]`` are those of the outputs from ``first_out`` on, of ``vocabulary`` in all.
    """
    _check_logits("cross_entropy_block_grad_", logits, labels, softcap)
    if logits.is_cuda and logits.dtype != torch.float64:
        from .kernels.cross_entropy import launch_cross_entropy_block_grad_ as run
    else:
        run = eager.cross_entropy_block_grad_
    run(logits, labels, lse, first_out, vocabulary, ignore_index, label_smoothing, z_loss, softcap, logit_scale)


@cross_entropy_block_grad_.register_fake
def _(logits, labels, lse, first_out, vocabulary, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None,
      logit_scale=1.0):
    return None
