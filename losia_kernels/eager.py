"""The package's operations in plain torch: the CPU path, and the error that a kernel may at most double.

Each function computes what the kernel of the same name computes, in the same dtypes: arithmetic in float32
(float64 for float64 inputs), stores in the tensor's own dtype. Order is always (out, in).
"""

import torch
from torch import Tensor

KINDS = ("sensitivity", "first_order", "second_order", "gradient")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def select_last(x: Tensor, idx: Tensor | None) -> Tensor:
    """``x[..., idx]``; all of ``x`` when ``idx`` is None."""
    return x if idx is None else x.index_select(-1, idx)


def gather_features(x: Tensor, idx: Tensor) -> Tensor:
    return x.index_select(-1, idx).contiguous()  # [..., k]


def subnet_grad_partials(dy: Tensor, x: Tensor, out_idx: Tensor | None, in_idx: Tensor | None) -> Tensor:
    dy_sub = select_last(dy.reshape(-1, dy.shape[-1]), out_idx)  # [t, k_out]
    x_sub = select_last(x.reshape(-1, x.shape[-1]), in_idx)  # [t, k_in]
    dtype = accumulate_dtype(dy.dtype)
    return (dy_sub.to(dtype).T @ x_sub.to(dtype)).unsqueeze(0)  # [1, k_out, k_in]


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
    seed: int | None,
) -> None:
    grad = (grad.sum(0) if grad.dim() == 3 else grad).to(exp_avg.dtype)  # [k_out, k_in]
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denom = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    value = subnet.to(exp_avg.dtype)  # the master itself, or a 16-bit subnet in float32
    if weight_decay:
        value *= 1 - lr * weight_decay
    value.addcdiv_(exp_avg, denom, value=-lr / (1 - beta1**step))
    if seed is not None:
        value = stochastic_round(value, subnet.dtype, seed)
    subnet.copy_(value)
    weight[out_idx[:, None], in_idx] = subnet.to(weight.dtype)


def hash_u32(counter: Tensor, seed: int) -> Tensor:
    """Counter-based random 32-bit integers (int64 tensor): murmur3's finalizer of ``counter * golden + seed``."""
    mask = 0xFFFFFFFF
    h = (counter * 0x9E3779B1 + seed) & mask
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & mask
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & mask
    return h ^ (h >> 16)


def stochastic_round(value: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Round float32 ``value`` to bfloat16 or float16, up with the probability of the remainder.

    The random bits depend on ``seed`` and the element's flat position only. Non-finite values pass unchanged.
    """
    dropped = {torch.bfloat16: 16, torch.float16: 13}[dtype]  # mantissa bits that float32 has and dtype has not
    counter = torch.arange(value.numel(), device=value.device).view(value.shape)
    noise = hash_u32(counter, seed) & ((1 << dropped) - 1)
    bits = value.contiguous().view(torch.int32).to(torch.int64) + noise
    bits = (bits >> dropped) << dropped
    rounded = bits.to(torch.int32).view(torch.float32)
    return torch.where(torch.isfinite(value), rounded, value).to(dtype)


def importance_of(weight: Tensor, grad: Tensor, kind: str, grad_scale: float = 1.0) -> Tensor:
    """I of one micro-batch (Eq. 3), ``[out, in]`` in float32: how much the loss changes without a weight."""
    dtype = accumulate_dtype(weight.dtype)
    grad = grad.to(dtype) * grad_scale
    if kind == "gradient":
        return grad.abs()
    first = grad * weight.to(dtype)
    if kind == "first_order":
        return first.abs()
    second = 0.5 * first * first
    return second if kind == "second_order" else (first - second).abs()


def importance_update_(
    importance: Tensor,
    uncertainty: Tensor,
    weight: Tensor,
    grad: Tensor,
    beta1: float,
    beta2: float,
    kind: str,
    grad_scale: float,
) -> None:
    now = importance_of(weight, grad, kind, grad_scale)
    mean = beta1 * importance.to(now.dtype) + (1 - beta1) * now
    deviation = beta2 * uncertainty.to(now.dtype) + (1 - beta2) * (now - mean).abs()
    importance.copy_(mean)
    uncertainty.copy_(deviation)


def importance_marginals(weight: Tensor, grad: Tensor, kind: str, grad_scale: float) -> tuple[Tensor, Tensor]:
    now = importance_of(weight, grad, kind, grad_scale)
    return now.sum(1), now.sum(0)  # [out], [in]


def score_marginals(
    importance: Tensor, uncertainty: Tensor | None, out_idx: Tensor | None, in_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(importance.dtype)
    score = importance.to(dtype)
    if uncertainty is not None:
        score = score * uncertainty.to(dtype)
    out_sums = select_last(score, in_idx).sum(1)  # [out], over the given inputs
    in_sums = (score if out_idx is None else score.index_select(0, out_idx)).sum(0)  # [in], over the given outputs
    return out_sums, in_sums


def cross_entropy_grad_(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
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
            logits, probability, z, labels, lse, 0, logits.shape[1], ignore_index, label_smoothing, z_loss, softcap,
            logit_scale,
        )  # fmt: skip
    else:
        lse = z.logsumexp(-1)
    losses = lse - (1 - label_smoothing) * target - label_smoothing * mean + z_loss * lse.square()
    return losses.masked_fill_(ignored, 0.0), lse


def softmax_(z: Tensor) -> Tensor:
    """``z [t, V]`` becomes its softmax; returns its logsumexp ``[t]``. One pass of exponentials for both."""
    largest = z.amax(-1)
    torch.softmax(z, -1, out=z)
    return largest - z.amax(-1).log_()  # the largest probability is exp(largest - logsumexp)


def cross_entropy_block_grad_(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    first_out: int,
    vocabulary: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
) -> None:
    z = capped_logits(logits, softcap, logit_scale)  # [t, block]
    probability = (z.sub_(lse[:, None]) if softcap is None else z - lse[:, None]).exp_()
    _write_cross_entropy_grad(
        logits, probability, z, labels, lse, first_out, vocabulary, ignore_index, label_smoothing, z_loss, softcap,
        logit_scale,
    )  # fmt: skip


def _write_cross_entropy_grad(
    logits, probability, z, labels, lse, first_out, vocabulary, ignore_index, label_smoothing, z_loss, softcap,
    logit_scale,
):  # fmt: skip
    grad = probability
    if z_loss:
        grad *= (1 + 2 * z_loss * lse)[:, None]
    if label_smoothing:
        grad -= label_smoothing / vocabulary
    position = labels - first_out
    here = (position >= 0) & (position < logits.shape[1])
    share = torch.where(here, label_smoothing - 1, 0.0).to(grad.dtype)
    grad.scatter_add_(1, position.masked_fill(~here, 0)[:, None], share[:, None])
    if softcap is not None:
        grad *= 1 - (z / softcap).square_()
    if logit_scale != 1:
        grad *= logit_scale
    if grad is not logits:
        logits.copy_(grad)
    logits.index_fill_(0, (labels == ignore_index).nonzero()[:, 0], 0.0)


def capped_logits(logits: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """``softcap * tanh(logit_scale * logits / softcap)`` in float32; ``logits`` itself where that changes nothing."""
    z = logits.to(accumulate_dtype(logits.dtype))
    if logit_scale != 1:
        z = z * logit_scale
    return z if softcap is None else (z / softcap).tanh_().mul_(softcap)
