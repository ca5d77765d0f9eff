"""AdamW on subnets, written into their weights in the same pass: of one layer, and of all of a
model at once."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.codes import FIRST_MOMENT, SECOND_MOMENT
from .registry import check, check_alignment, invalid, register
from .rounding import (
    accumulate_dtype,
    code_blocks,
    decode,
    encode,
    join_float,
    split_float,
    stochastic_round,
)

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class Update(NamedTuple):
    """What one step of AdamW on one subnet takes, in the order of ``subnets_adamw_``.

    The new values go into ``subnet``, the moments (with their scales and the remainder), and
    ``weight[out_idx][:, in_idx]``. All but ``weight`` are contiguous.
    """

    weight: Tensor  # [out, in]
    subnet: Tensor  # [k_out, k_in], as are grad, the moments and the remainder
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    out_idx: Tensor  # [k_out] int64
    in_idx: Tensor  # [k_in] int64
    lr: float
    step: int  # this subnet's updates, from 1
    seed: int | None = None  # of what is rounded stochastically
    exp_avg_scale: Tensor | None = None  # [k_out, ceil(k_in / 256)] float32, of uint8 moments
    exp_avg_sq_scale: Tensor | None = None
    remainder: Tensor | None = None  # int16: what a bfloat16 subnet lacks of float32
    alignment: int = 1  # of in_idx, as in gather_features


def update_subnets_(
    updates: Sequence[Update], beta1: float, beta2: float, eps: float, weight_decay: float
) -> None:
    """``subnets_adamw_`` on ``updates``, whichever of the optional fields each of them has."""
    alike: dict[tuple[bool, bool, bool], list[Update]] = {}
    for update in updates:
        lacks = update.seed is None, update.exp_avg_scale is None, update.remainder is None
        alike.setdefault(lacks, []).append(update)
    for group in alike.values():
        columns = [[] if each[0] is None else list(each) for each in zip(*group, strict=True)]
        arguments: list[Any] = [*columns[:10], beta1, beta2, eps, weight_decay, *columns[10:]]
        subnets_adamw_(*arguments)


@register("losia::subnet_adamw_", mutates_args=("weight", "subnet", "exp_avg", "exp_avg_sq"))
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
    """One AdamW step on ``subnet`` and, in the same pass, its new values into ``weight[out_idx][:,
    in_idx]``.

    Decoupled decay, eps outside the square root of the corrected second moment (torch.optim.AdamW):
    ``m <- beta1 m + (1 - beta1) g``, ``v <- beta2 v + (1 - beta2) g^2``, ``w <- (1 - lr
    weight_decay) w - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)``.

    Args:
        weight: ``[out, in]`` float32, float16, bfloat16 or float64, any strides.
        subnet: ``[k_out, k_in]``; in float32 the master copy, which the weight gets rounded to
            nearest, in the weight's 16-bit dtype there is no master.
        grad: ``[k_out, k_in]``, any floating-point dtype.
        exp_avg: ``[k_out, k_in]`` float32 (float64 for float64), the first moment m.
        exp_avg_sq: as ``exp_avg``, the second moment v.
        out_idx: ``[k_out]`` int64, the subnet's rows of the weight.
        in_idx: ``[k_in]`` int64, its columns.
        lr: learning rate of this step.
        beta1, beta2, eps, weight_decay: those of torch.optim.AdamW.
        step: this matrix's updates, counted from 1.
        seed: of the stochastic rounding of a 16-bit subnet; without it to nearest (the reference's
            behaviour, which loses small updates).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a step below 1, a seed for a subnet
            that is not rounded. Nothing has changed then.
        RuntimeError: a GPU's stream is being captured, whose graph would repeat this step.
    """
    op = "subnet_adamw_"
    update = Update(weight, subnet, grad, exp_avg, exp_avg_sq, out_idx, in_idx, lr, step, seed)
    _check_matrix(op, update)
    check(
        exp_avg.dtype == exp_avg_sq.dtype == accumulate_dtype(weight.dtype),
        op,
        f"moments must be {accumulate_dtype(weight.dtype)}, got {exp_avg.dtype}, {exp_avg_sq.dtype}",
    )
    check(
        seed is None or subnet.dtype in SIXTEEN_BITS,
        op,
        f"seed asks for stochastic rounding of a 16-bit subnet, but subnet is {subnet.dtype}",
    )
    check(step >= 1, op, f"step counts from 1, got {step}")
    whole = update._replace(
        subnet=subnet.contiguous(),
        grad=grad.contiguous(),
        exp_avg=exp_avg.contiguous(),
        exp_avg_sq=exp_avg_sq.contiguous(),
        out_idx=out_idx.contiguous(),
        in_idx=in_idx.contiguous(),
    )
    _form_for(weight)([whole], beta1, beta2, eps, weight_decay)
    for values, tensor in (
        (whole.subnet, subnet),
        (whole.exp_avg, exp_avg),
        (whole.exp_avg_sq, exp_avg_sq),
    ):
        if values is not tensor:
            tensor.copy_(values)


@subnet_adamw_.register_fake
def _(*args, **kwargs):
    return None


@register(
    "losia::subnets_adamw_",
    mutates_args=(
        "weights",
        "subnets",
        "exp_avgs",
        "exp_avg_sqs",
        "exp_avg_scales",
        "exp_avg_sq_scales",
        "remainders",
    ),
)
def subnets_adamw_(
    weights: list[Tensor],
    subnets: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    out_idx: list[Tensor],
    in_idx: list[Tensor],
    lr: list[float],
    step: list[int],
    seeds: list[int],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    remainders: list[Tensor],
    alignments: list[int] | None = None,
) -> None:
    """``subnet_adamw_`` on many matrices, in one launch for each combination of dtypes; the same
    bits.

    One entry a matrix in every list (``Update`` says what each is); an empty list is none for all.
    All but weights are contiguous.

    Args:
        weights, subnets, grads, out_idx, in_idx, lr, step, beta1, beta2, eps, weight_decay: as in
            ``subnet_adamw_``.
        exp_avgs, exp_avg_sqs: ``[k_out, k_in]`` float32, bfloat16, or uint8 codes of
            ``losia_kernels.ops.rounding``.
        seeds: of all that is rounded stochastically: 16-bit subnets (without seeds to nearest) and
            moments that are not float32.
        exp_avg_scales, exp_avg_sq_scales: ``[k_out, ceil(k_in / 256)]`` float32, of uint8 moments.
        remainders: ``[k_out, k_in]`` int16; a bfloat16 subnet and its remainder are the float32
            master, exactly, and the weight gets it rounded to nearest, ties away from zero.
        alignments: promises of runs of that many neighbours in each ``in_idx``, as in
            ``gather_features``; they are stored together.

    Raises:
        ValueError: what ``subnet_adamw_`` refuses, lists of unlike lengths, state of another form,
            or an alignment that does not divide ``k_in``. Nothing has changed then.
        RuntimeError: as in ``subnet_adamw_``.
    """
    op = "subnets_adamw_"
    if not weights:
        return
    needed = (weights, subnets, grads, exp_avgs, exp_avg_sqs, out_idx, in_idx, lr, step)
    optional = (seeds, exp_avg_scales, exp_avg_sq_scales, remainders, alignments or [])
    if any(len(each) != len(weights) for each in needed) or any(
        len(each) not in (0, len(weights)) for each in optional
    ):
        raise invalid(
            op,
            f"the lists must have one entry for each of the {len(weights)} weights, got "
            f"{[len(each) for each in (*needed[1:], *optional)]}",
        )
    none = [None] * len(weights)
    columns = *(each or none for each in optional[:-1]), alignments or [1] * len(weights)
    updates = list(map(Update, *needed, *columns))
    for update in updates:
        _check_matrix(op, update)
        _check_state(op, update)
        check_alignment(op, update.alignment, update.in_idx)
    if min(step) < 1:
        raise invalid(op, f"step counts from 1, got {min(step)}")
    _form_for(weights[0])(updates, beta1, beta2, eps, weight_decay)


@subnets_adamw_.register_fake
def _(*args, **kwargs):
    return None


def _form_for(weight: Tensor) -> Callable[..., None]:
    if weight.is_cuda and weight.dtype != torch.float64 and weight.numel():
        from ..kernels.adamw import launch_subnets_adamw_

        return launch_subnets_adamw_
    return subnets_adamw_plain_


def subnets_adamw_plain_(
    updates: Sequence[Update], beta1: float, beta2: float, eps: float, weight_decay: float
) -> None:
    for update in updates:
        _update_plain_(update, beta1, beta2, eps, weight_decay)


def _update_plain_(
    update: Update, beta1: float, beta2: float, eps: float, weight_decay: float
) -> None:
    weight, subnet, grad, exp_avg, exp_avg_sq, out_idx, in_idx, lr, step, seed = update[:10]
    exp_avg_scale, exp_avg_sq_scale, remainder = update[10:13]
    dtype = accumulate_dtype(weight.dtype)
    grad = grad.to(dtype)  # [k_out, k_in]
    first = _load_moment(exp_avg, exp_avg_scale, signed=True).lerp_(grad, 1 - beta1)
    second = _load_moment(exp_avg_sq, exp_avg_sq_scale, signed=False).mul_(beta2)
    second.addcmul_(grad, grad, value=1 - beta2)
    denom = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    # the master itself, or a copy
    value = subnet.to(dtype) if remainder is None else join_float(subnet, remainder)
    if weight_decay:
        value *= 1 - lr * weight_decay
    value.addcdiv_(first, denom, value=-lr / (1 - beta1**step))
    if remainder is not None:
        value, rest = split_float(value)
        remainder.copy_(rest)
    elif seed is not None and subnet.dtype in SIXTEEN_BITS:
        value = stochastic_round(value, subnet.dtype, seed)
    subnet.copy_(value)
    write_subnet_(weight, out_idx, in_idx, subnet)
    if first is not exp_avg and seed is not None:  # without a seed there are no such moments
        _store_moment(exp_avg, exp_avg_scale, first, signed=True, seed=seed ^ FIRST_MOMENT)
        _store_moment(exp_avg_sq, exp_avg_sq_scale, second, signed=False, seed=seed ^ SECOND_MOMENT)


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


def _check_matrix(op: str, update: Update) -> None:
    """Comparisons alone, words only once one fails: this runs for every matrix in every step."""
    weight, subnet, grad, exp_avg, exp_avg_sq, out_idx, in_idx = tensors = update[:7]
    if not out_idx.dtype == in_idx.dtype == torch.int64:
        raise invalid(op, f"out_idx and in_idx must be int64, got {out_idx.dtype}, {in_idx.dtype}")
    indexed = out_idx.shape + in_idx.shape
    if not subnet.shape == exp_avg.shape == exp_avg_sq.shape == grad.shape == indexed:
        raise invalid(
            op,
            f"out_idx and in_idx are {tuple(out_idx.shape)} and {tuple(in_idx.shape)}, so subnet, exp_avg, "
            f"exp_avg_sq and grad must be {tuple(indexed)} each, "
            f"got {[tuple(tensor.shape) for tensor in (subnet, exp_avg, exp_avg_sq, grad)]}",
        )
    if weight.dim() != 2:
        raise invalid(op, f"weight must be [out, in], got {tuple(weight.shape)}")
    if not (
        weight.device
        == subnet.device
        == grad.device
        == exp_avg.device
        == exp_avg_sq.device
        == out_idx.device
        == in_idx.device
    ):
        raise invalid(
            op,
            "weight, subnet, grad, exp_avg, exp_avg_sq, out_idx, in_idx are on "
            f"{', '.join(str(tensor.device) for tensor in tensors)}",
        )
    master = accumulate_dtype(weight.dtype)
    if subnet.dtype != master and subnet.dtype != weight.dtype:
        raise invalid(
            op,
            f"subnet must be {master} (master) or {weight.dtype} (weight's dtype), got {subnet.dtype}",
        )


def _check_state(op: str, update: Update) -> None:
    subnet, remainder = update.subnet, update.remainder
    scales = [scale for scale in update[10:12] if scale is not None]
    exact, dtype = accumulate_dtype(subnet.dtype), update.exp_avg.dtype
    if dtype != update.exp_avg_sq.dtype or dtype not in (exact, torch.bfloat16, torch.uint8):
        raise invalid(
            op,
            f"moments must both be {exact}, torch.bfloat16 or torch.uint8, got {dtype}, "
            f"{update.exp_avg_sq.dtype}",
        )
    if dtype != exact and (subnet.dtype == torch.float64 or update.seed is None):
        raise invalid(op, f"{dtype} moments need seeds for their rounding, and no float64 subnet")
    if dtype == torch.uint8:
        shape = (subnet.shape[0], code_blocks(subnet.shape[1]))
        if len(scales) < 2 or any(
            scale.shape != shape or scale.dtype != torch.float32 for scale in scales
        ):
            raise invalid(op, f"uint8 moments need float32 scales of shape {shape}")
    elif scales:
        raise invalid(op, f"scales belong to uint8 moments, got {dtype}")
    if remainder is not None:
        if subnet.dtype != torch.bfloat16:
            raise invalid(op, f"a remainder belongs to a bfloat16 subnet, got {subnet.dtype}")
        if remainder.dtype != torch.int16 or remainder.shape != subnet.shape:
            raise invalid(
                op,
                f"the remainder must be int16 {tuple(subnet.shape)}, got {remainder.dtype} "
                f"{tuple(remainder.shape)}",
            )
    for tensor in (*update[1:7], *update[10:13]):
        if tensor is not None and not tensor.is_contiguous():
            raise invalid(
                op,
                f"subnets, gradients, state and indices must be contiguous, got strides {tensor.stride()} of "
                f"{tuple(tensor.shape)}",
            )
