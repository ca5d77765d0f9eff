"""AdamW on a subnet, written into its weight in the same pass."""

import torch
from torch import Tensor

from .. import eager
from ._op import check, check_index, check_same, register


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
    shape = (out_idx.shape[0], in_idx.shape[0])
    check_index(op, "out_idx", out_idx, weight)
    check_index(op, "in_idx", in_idx, weight)
    check(weight.dim() == 2, op, f"weight must be [out, in], got {tuple(weight.shape)}")
    check(subnet.shape == shape, op, f"subnet is {tuple(subnet.shape)}, the indices give {shape}")
    check(grad.dim() in (2, 3) and grad.shape[-2:] == shape, op, f"grad is {tuple(grad.shape)}, expected {shape}")
    check(grad.device == weight.device, op, f"grad is on {grad.device}, weight on {weight.device}")
    check_same(op, "subnet, exp_avg, exp_avg_sq", subnet, exp_avg, exp_avg_sq, dtype=False)
    check(subnet.device == weight.device, op, f"subnet is on {subnet.device}, weight on {weight.device}")
    check(exp_avg.dtype == exp_avg_sq.dtype == eager.accumulate_dtype(weight.dtype), op,
           f"moments must be {eager.accumulate_dtype(weight.dtype)}, got {exp_avg.dtype}, {exp_avg_sq.dtype}")
    check(subnet.dtype in (exp_avg.dtype, weight.dtype), op,
           f"subnet must be {exp_avg.dtype} (master) or {weight.dtype} (weight's dtype), got {subnet.dtype}")
    check(seed is None or subnet.dtype in (torch.bfloat16, torch.float16), op,
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
