"""The package's operations in plain torch: the CPU path, and the error that a kernel may at most
double.

Each function computes what the kernel of the same name computes, in the same dtypes: arithmetic in
float32 (float64 for float64 inputs), stores in the tensor's own dtype. Order is always (out, in).
"""

import torch
from torch import Tensor

from .rounding import (
    FIRST_MOMENT,
    SECOND_MOMENT,
    decode,
    encode,
    join_float,
    split_float,
    stochastic_round,
)

KINDS = ("sensitivity", "first_order", "second_order", "gradient")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def select_last(x: Tensor, idx: Tensor | None) -> Tensor:
    """``x[..., idx]``; all of ``x`` when ``idx`` is None."""
    return x if idx is None else x.index_select(-1, idx)


def gather_features(x: Tensor, idx: Tensor) -> Tensor:
    return x.index_select(-1, idx).contiguous()  # [..., k]


def subnet_grad_partials(
    dy: Tensor, x: Tensor, out_idx: Tensor | None, in_idx: Tensor | None
) -> Tensor:
    dy_sub = select_last(dy.reshape(-1, dy.shape[-1]), out_idx)  # [t, k_out]
    x_sub = select_last(x.reshape(-1, x.shape[-1]), in_idx)  # [t, k_in]
    dtype = accumulate_dtype(dy.dtype)
    if (
        dy.is_cuda and dy.dtype.itemsize == 2
    ):  # on the matrix units, which round as the kernel's product does
        return torch.mm(dy_sub.T, x_sub, out_dtype=dtype).unsqueeze(0)
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
    exp_avg_scale: Tensor | None = None,
    exp_avg_sq_scale: Tensor | None = None,
    remainder: Tensor | None = None,
) -> None:
    dtype = accumulate_dtype(weight.dtype)
    grad = (grad.sum(0) if grad.dim() == 3 else grad).to(dtype)  # [k_out, k_in]
    first = _load_moment(exp_avg, exp_avg_scale, signed=True).lerp_(grad, 1 - beta1)
    second = _load_moment(exp_avg_sq, exp_avg_sq_scale, signed=False).mul_(beta2)
    second.addcmul_(grad, grad, value=1 - beta2)
    denom = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    value = (
        subnet.to(dtype) if remainder is None else join_float(subnet, remainder)
    )  # the master itself, or a copy
    if weight_decay:
        value *= 1 - lr * weight_decay
    value.addcdiv_(first, denom, value=-lr / (1 - beta1**step))
    if remainder is not None:
        value, rest = split_float(value)
        remainder.copy_(rest)
    elif seed is not None and subnet.dtype in (torch.bfloat16, torch.float16):
        value = stochastic_round(value, subnet.dtype, seed)
    subnet.copy_(value)
    write_subnet_(weight, out_idx, in_idx, subnet)
    if first is not exp_avg and seed is not None:  # ops refuse such moments without a seed
        _store_moment(exp_avg, exp_avg_scale, first, signed=True, seed=seed ^ FIRST_MOMENT)
        _store_moment(exp_avg_sq, exp_avg_sq_scale, second, signed=False, seed=seed ^ SECOND_MOMENT)


def subnets_adamw_(
    weights,
    subnets,
    grads,
    exp_avgs,
    exp_avg_sqs,
    out_idx,
    in_idx,
    lr,
    step,
    seeds,
    beta1,
    beta2,
    eps,
    weight_decay,
    exp_avg_scales,
    exp_avg_sq_scales,
    remainders,
):
    for number in range(len(weights)):
        extra = (
            each[number] if each else None
            for each in (exp_avg_scales, exp_avg_sq_scales, remainders)
        )
        subnet_adamw_(
            weights[number],
            subnets[number],
            grads[number],
            exp_avgs[number],
            exp_avg_sqs[number],
            out_idx[number],
            in_idx[number],
            lr[number],
            beta1,
            beta2,
            eps,
            weight_decay,
            step[number],
            seeds[number] if seeds else None,
            *extra,
        )


def write_subnet_(weight: Tensor, out_idx: Tensor, in_idx: Tensor, values: Tensor) -> None:
    """``weight[out_idx][:, in_idx] = values``; of a contiguous weight in half the time of two
    indices."""
    if not weight.is_contiguous():
        weight[out_idx[:, None], in_idx] = values.to(weight.dtype)
        return
    positions = torch.add(in_idx, out_idx[:, None], alpha=weight.shape[1])  # [k_out, k_in]
    weight.view(-1).scatter_(0, positions.view(-1), values.to(weight.dtype).reshape(-1))


def _load_moment(moment: Tensor, scale: Tensor | None, signed: bool) -> Tensor:
    """In float32: the tensor itself if it is that already."""
    return (
        moment.to(accumulate_dtype(moment.dtype))
        if scale is None
        else decode(moment, scale, signed)
    )


def _store_moment(
    moment: Tensor, scale: Tensor | None, value: Tensor, signed: bool, seed: int
) -> None:
    if scale is None:
        moment.copy_(stochastic_round(value, moment.dtype, seed))
        return
    codes, scales = encode(value, signed, seed)
    moment.copy_(codes)
    scale.copy_(scales)


def importance_of(weight: Tensor, grad: Tensor, kind: str, grad_scale: float = 1.0) -> Tensor:
    """I of one micro-batch (Eq. 3), ``[out, in]`` in float32: how much the loss changes without a
    weight."""
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


def importance_marginals(
    weight: Tensor, grad: Tensor, kind: str, grad_scale: float
) -> tuple[Tensor, Tensor]:
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
    in_sums = (score if out_idx is None else score.index_select(0, out_idx)).sum(
        0
    )  # [in], over the given outputs
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
            logits,
            probability,
            z,
            labels,
            lse,
            0,
            logits.shape[1],
            ignore_index,
            label_smoothing,
            z_loss,
            softcap,
            logit_scale,
        )
    else:
        lse = z.logsumexp(-1)
    losses = lse - (1 - label_smoothing) * target - label_smoothing * mean + z_loss * lse.square()
    return losses.masked_fill_(ignored, 0.0), lse


def softmax_(z: Tensor) -> Tensor:
    """``z [t, V]`` becomes its softmax; returns its logsumexp ``[t]``. One pass of exponentials for
    both."""
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
        logits,
        probability,
        z,
        labels,
        lse,
        first_out,
        vocabulary,
        ignore_index,
        label_smoothing,
        z_loss,
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
    z_loss,
    softcap,
    logit_scale,
):
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
    """``softcap * tanh(logit_scale * logits / softcap)`` in float32; ``logits`` itself where that
    changes nothing."""
    z = logits.to(accumulate_dtype(logits.dtype))
    if logit_scale != 1:
        z = z * logit_scale
    return z if softcap is None else (z / softcap).tanh_().mul_(softcap)
