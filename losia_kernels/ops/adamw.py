"""AdamW on subnets, written into their weights in the same pass: of one layer, and of all of a model at once."""

import torch
from torch import Tensor

from .. import eager
from ..rounding import code_blocks
from ._op import check, check_index, check_same, refuse, register

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
    _check_matrix(op, weight, subnet, grad, exp_avg, exp_avg_sq, out_idx, in_idx)
    check(exp_avg.dtype == exp_avg_sq.dtype == eager.accumulate_dtype(weight.dtype), op,
           f"moments must be {eager.accumulate_dtype(weight.dtype)}, got {exp_avg.dtype}, {exp_avg_sq.dtype}")
    check(seed is None or subnet.dtype in SIXTEEN_BITS, op,
           f"seed asks for stochastic rounding of a 16-bit subnet, but subnet is {subnet.dtype}")
    check(step >= 1, op, f"step counts from 1, got {step}")
    if weight.is_cuda and weight.dtype != torch.float64 and weight.numel():
        from ..kernels.subnet_adamw import launch_subnet_adamw_ as run
    else:
        run = eager.subnet_adamw_
    run(weight, subnet, grad, exp_avg, exp_avg_sq, out_idx, in_idx, lr, beta1, beta2, eps, weight_decay, step, seed)


@subnet_adamw_.register_fake
def _(weight, subnet, grad, exp_avg, exp_avg_sq, out_idx, in_idx, lr, beta1, beta2, eps, weight_decay, step, seed=None):
    return None


@register("losia::subnets_adamw_", mutates_args=(
    "weights", "subnets", "exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales", "remainders",
))  # fmt: skip
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
    """``subnet_adamw_`` on many matrices, in one launch for each combination of dtypes; the same bits.

    One entry a matrix in every list; an empty list is none for all. Subnets, gradients and state are contiguous.
    ``seeds`` are needed for all that is rounded stochastically: 16-bit subnets (without seeds to nearest) and moments
    that are not float32. Moments are float32, bfloat16, or uint8 codes of ``losia_kernels.rounding`` with
    ``exp_avg_scales``, ``exp_avg_sq_scales`` ``[k_out, ceil(k_in / 256)]`` float32. With ``remainders``
    ``[k_out, k_in]`` int16 a bfloat16 subnet and its remainder are the float32 master, exactly, and the weight gets it
    rounded to nearest, ties away from zero.
    """
    op = "subnets_adamw_"
    if not weights:
        return
    lists = (subnets, grads, exp_avgs, exp_avg_sqs, out_idx, in_idx, lr, step)
    optional = (seeds, exp_avg_scales, exp_avg_sq_scales, remainders)
    if any(len(each) != len(weights) for each in lists) or any(len(each) not in (0, len(weights)) for each in optional):
        refuse(op, f"the lists must have one entry for each of the {len(weights)} weights, got "
                   f"{[len(each) for each in (*lists, *optional)]}")
    for number, matrix in enumerate(zip(weights, *lists[:6], strict=True)):
        _check_matrix(op, *matrix)
        first_scale, second_scale, remainder = (
            each[number] if each else None for each in (exp_avg_scales, exp_avg_sq_scales, remainders)
        )
        _, subnet, grad, exp_avg, exp_avg_sq, _, _ = matrix
        _check_state(op, subnet, grad, exp_avg, exp_avg_sq, first_scale, second_scale, remainder, bool(seeds))
        if step[number] < 1:
            refuse(op, f"step counts from 1, got {step[number]}")
    if weights[0].is_cuda and weights[0].dtype != torch.float64:
        from ..kernels.subnets_adamw import launch_subnets_adamw_ as run
    else:
        run = eager.subnets_adamw_
    run(weights, subnets, grads, exp_avgs, exp_avg_sqs, out_idx, in_idx, lr, step, seeds, beta1, beta2, eps,
        weight_decay, exp_avg_scales, exp_avg_sq_scales, remainders)  # fmt: skip


@subnets_adamw_.register_fake
def _(weights, subnets, grads, exp_avgs, exp_avg_sqs, out_idx, in_idx, lr, step, seeds, beta1, beta2, eps,
      weight_decay, exp_avg_scales, exp_avg_sq_scales, remainders):  # fmt: skip
    return None


def _check_matrix(op, weight, subnet, grad, exp_avg, exp_avg_sq, out_idx, in_idx) -> None:
    """``if`` before each message: this runs for every matrix in every step."""
    check_index(op, "out_idx", out_idx, weight)
    check_index(op, "in_idx", in_idx, weight)
    shape, device = (out_idx.shape[0], in_idx.shape[0]), weight.device
    if weight.dim() != 2:
        refuse(op, f"weight must be [out, in], got {tuple(weight.shape)}")
    if subnet.shape != shape:
        refuse(op, f"subnet is {tuple(subnet.shape)}, the indices give {shape}")
    if grad.dim() not in (2, 3) or grad.shape[-2:] != shape:
        refuse(op, f"grad is {tuple(grad.shape)}, expected {shape}")
    if grad.device != device:
        refuse(op, f"grad is on {grad.device}, weight on {device}")
    check_same(op, "subnet, exp_avg, exp_avg_sq", subnet, exp_avg, exp_avg_sq, dtype=False)
    if subnet.device != device:
        refuse(op, f"subnet is on {subnet.device}, weight on {device}")
    if subnet.dtype not in (weight.dtype, eager.accumulate_dtype(weight.dtype)):
        refuse(op, f"subnet must be {eager.accumulate_dtype(weight.dtype)} (master) or {weight.dtype} (weight's "
                   f"dtype), got {subnet.dtype}")


def _check_state(op, subnet, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, remainder, seeded) -> None:
    expected = (eager.accumulate_dtype(subnet.dtype), torch.bfloat16, torch.uint8)
    if exp_avg.dtype != exp_avg_sq.dtype or exp_avg.dtype not in expected:
        refuse(op, f"moments must both be one of {expected}, got {exp_avg.dtype}, {exp_avg_sq.dtype}")
    if exp_avg.dtype != expected[0] and (subnet.dtype == torch.float64 or not seeded):
        refuse(op, f"{exp_avg.dtype} moments need seeds for their rounding, and no float64 subnet")
    scales = (exp_avg_scale, exp_avg_sq_scale)
    if exp_avg.dtype == torch.uint8:
        shape = (subnet.shape[0], code_blocks(subnet.shape[1]))
        if any(scale is None or scale.shape != shape or scale.dtype != torch.float32 for scale in scales):
            refuse(op, f"uint8 moments need float32 scales of shape {shape}")
    elif scales != (None, None):
        refuse(op, f"scales belong to uint8 moments, got {exp_avg.dtype}")
    if remainder is not None:
        if subnet.dtype != torch.bfloat16:
            refuse(op, f"a remainder belongs to a bfloat16 subnet, got {subnet.dtype}")
        if remainder.dtype != torch.int16 or remainder.shape != subnet.shape:
            refuse(op, f"the remainder must be int16 {tuple(subnet.shape)}, got {remainder.dtype} "
                       f"{tuple(remainder.shape)}")
    for tensor in (subnet, grad, exp_avg, exp_avg_sq, *scales, remainder):
        if tensor is not None and not tensor.is_contiguous():
            refuse(op, f"subnets, gradients and state must be contiguous, got strides {tensor.stride()} of "
                       f"{tuple(tensor.shape)}")
