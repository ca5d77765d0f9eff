"""AdamW on subnets, written into their weights in the same pass: of one layer, and of all of a
model at once."""

from typing import Any

import torch
from torch import Tensor

from ..kernels.codes import FIRST_MOMENT, SECOND_MOMENT
from .registry import check, refuse, register
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

    ``weight [out, in]`` float32 / float16 / bfloat16; ``exp_avg``, ``exp_avg_sq`` ``[k_out, k_in]``
    float32; ``grad`` ``[k_out, k_in]``, or ``[splits, k_out, k_in]`` as ``subnet_grad_partials``
    returns it; ``step`` counts this matrix's updates from 1. Decoupled decay, eps outside the
    square root of the corrected second moment (torch.optim.AdamW).

    ``subnet [k_out, k_in]`` in float32 is the master copy, and the weight gets it rounded to
    nearest. In the weight's 16-bit dtype there is no master: with ``seed`` the new values are
    rounded stochastically, without it to nearest (the reference's behaviour, which loses small
    updates).
    """
    op = "subnet_adamw_"
    _check_matrix(op, weight, subnet, grad, exp_avg, exp_avg_sq, out_idx, in_idx)
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
    if weight.is_cuda and weight.dtype != torch.float64 and weight.numel():
        from ..kernels.subnet_adamw import launch_subnet_adamw_ as run
    else:
        run = subnet_adamw_plain_
    run(
        weight,
        subnet,
        grad,
        exp_avg,
        exp_avg_sq,
        out_idx,
        in_idx,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        seed,
    )


@subnet_adamw_.register_fake
def _(
    weight,
    subnet,
    grad,
    exp_avg,
    exp_avg_sq,
    out_idx,
    in_idx,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    step,
    seed=None,
):
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
) -> None:
    """``subnet_adamw_`` on many matrices, in one launch for each combination of dtypes; the same
    bits.

    One entry a matrix in every list; an empty list is none for all. All but weights are contiguous.
    ``seeds`` are needed for all that is rounded stochastically: 16-bit subnets (without seeds to
    nearest) and moments that are not float32. Moments are float32, bfloat16, or uint8 codes of
    ``losia_kernels.ops.rounding`` with ``exp_avg_scales``, ``exp_avg_sq_scales`` ``[k_out,
    ceil(k_in / 256)]`` float32. With ``remainders`` ``[k_out, k_in]`` int16 a bfloat16 subnet and
    its remainder are the float32 master, exactly, and the weight gets it rounded to nearest, ties
    away from zero.
    """
    op = "subnets_adamw_"
    if not weights:
        return
    lists = (subnets, grads, exp_avgs, exp_avg_sqs, out_idx, in_idx, lr, step)
    optional = (seeds, exp_avg_scales, exp_avg_sq_scales, remainders)
    if any(len(each) != len(weights) for each in lists) or any(
        len(each) not in (0, len(weights)) for each in optional
    ):
        refuse(
            op,
            f"the lists must have one entry for each of the {len(weights)} weights, got "
            f"{[len(each) for each in (*lists, *optional)]}",
        )
    none = [None] * len(weights)
    extras: list[list[Any]] = [
        each or none for each in (exp_avg_scales, exp_avg_sq_scales, remainders)
    ]
    for matrix in zip(weights, *lists[:6], *extras, strict=True):
        _check_matrix(op, *matrix[:7])
        _check_state(op, bool(seeds), *matrix[1:])
    if min(step) < 1:
        refuse(op, f"step counts from 1, got {min(step)}")
    if weights[0].is_cuda and weights[0].dtype != torch.float64:
        from ..kernels.adamw import launch_subnets_adamw_ as run
    else:
        run = subnets_adamw_plain_
    run(
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
    )


@subnets_adamw_.register_fake
def _(
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
    return None


def subnet_adamw_plain_(
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


def subnets_adamw_plain_(
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
        subnet_adamw_plain_(
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


def _check_matrix(op, weight, subnet, grad, exp_avg, exp_avg_sq, out_idx, in_idx) -> None:
    """Comparisons alone, words only once one fails: this runs for every matrix in every step."""
    if not out_idx.dtype == in_idx.dtype == torch.int64:
        refuse(op, f"out_idx and in_idx must be int64, got {out_idx.dtype}, {in_idx.dtype}")
    indexed = out_idx.shape + in_idx.shape
    if (
        not subnet.shape == exp_avg.shape == exp_avg_sq.shape == grad.shape[-2:] == indexed
        or grad.dim() > 3
    ):
        refuse(
            op,
            f"out_idx and in_idx are {tuple(out_idx.shape)} and {tuple(in_idx.shape)}, so subnet, exp_avg, "
            f"exp_avg_sq and grad must be {tuple(indexed)} (or grad [splits, k_out, k_in]), "
            f"got {[tuple(tensor.shape) for tensor in (subnet, exp_avg, exp_avg_sq, grad)]}",
        )
    if weight.dim() != 2:
        refuse(op, f"weight must be [out, in], got {tuple(weight.shape)}")
    if not (
        weight.device
        == subnet.device
        == grad.device
        == exp_avg.device
        == exp_avg_sq.device
        == out_idx.device
        == in_idx.device
    ):
        devices = [
            str(each.device)
            for each in (weight, subnet, grad, exp_avg, exp_avg_sq, out_idx, in_idx)
        ]
        refuse(
            op,
            f"weight, subnet, grad, exp_avg, exp_avg_sq, out_idx, in_idx are on {', '.join(devices)}",
        )
    master = accumulate_dtype(weight.dtype)
    if subnet.dtype != master and subnet.dtype != weight.dtype:
        refuse(
            op,
            f"subnet must be {master} (master) or {weight.dtype} (weight's dtype), got {subnet.dtype}",
        )


def _check_state(
    op,
    seeded,
    subnet,
    grad,
    exp_avg,
    exp_avg_sq,
    out_idx,
    in_idx,
    exp_avg_scale,
    exp_avg_sq_scale,
    remainder,
) -> None:
    exact, dtype = accumulate_dtype(subnet.dtype), exp_avg.dtype
    if dtype != exp_avg_sq.dtype or dtype not in (exact, torch.bfloat16, torch.uint8):
        refuse(
            op,
            f"moments must both be {exact}, torch.bfloat16 or torch.uint8, got {dtype}, {exp_avg_sq.dtype}",
        )
    if dtype != exact and (subnet.dtype == torch.float64 or not seeded):
        refuse(op, f"{dtype} moments need seeds for their rounding, and no float64 subnet")
    addressed = [subnet, grad, exp_avg, exp_avg_sq, out_idx, in_idx]
    if dtype == torch.uint8:
        scales = [exp_avg_scale, exp_avg_sq_scale]
        shape = (subnet.shape[0], code_blocks(subnet.shape[1]))
        if any(
            scale is None or scale.shape != shape or scale.dtype != torch.float32
            for scale in scales
        ):
            refuse(op, f"uint8 moments need float32 scales of shape {shape}")
        addressed += scales
    elif exp_avg_scale is not None or exp_avg_sq_scale is not None:
        refuse(op, f"scales belong to uint8 moments, got {dtype}")
    if remainder is not None:
        if subnet.dtype != torch.bfloat16:
            refuse(op, f"a remainder belongs to a bfloat16 subnet, got {subnet.dtype}")
        if remainder.dtype != torch.int16 or remainder.shape != subnet.shape:
            refuse(
                op,
                f"the remainder must be int16 {tuple(subnet.shape)}, got {remainder.dtype} "
                f"{tuple(remainder.shape)}",
            )
        addressed.append(remainder)
    for tensor in addressed:
        if not tensor.is_contiguous():
            refuse(
                op,
                f"subnets, gradients, state and indices must be contiguous, got strides {tensor.stride()} of "
                f"{tuple(tensor.shape)}",
            )
