"""AdamW on the subnet and, in the same pass, its new values into the rows and columns of the
weight."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import stochastic_round, store_as
from .formats import adamw
from .launch import launch_config
from .tiles import tile_grid, tile_offsets, tile_ptrs


@triton.jit(do_not_specialize=["seed"])
def subnet_adamw_kernel(
    weight_ptr,  # [out, in]
    subnet_ptr,  # [k_out, k_in], as are the moments
    grad_ptr,  # [splits, k_out, k_in]
    exp_avg_ptr,
    exp_avg_sq_ptr,
    out_idx_ptr,  # [k_out]
    in_idx_ptr,  # [k_in]
    k_out,
    k_in,
    stride_weight_out,
    stride_weight_in,
    stride_subnet_out,
    stride_subnet_in,
    stride_grad_split,
    stride_grad_out,
    stride_grad_in,
    stride_avg_out,
    stride_avg_in,
    stride_sq_out,
    stride_sq_in,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    decay,
    step_size,
    root_correction,
    seed,
    SPLITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_in = tl.cdiv(k_in, BLOCK_IN)
    offs_out, offs_in, mask = tile_offsets(
        tile // tiles_in, tile % tiles_in, k_out, k_in, BLOCK_OUT, BLOCK_IN
    )

    grad_ptrs = tile_ptrs(grad_ptr, offs_out, offs_in, stride_grad_out, stride_grad_in)
    grad = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    for _ in range(SPLITS):
        grad += tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
        grad_ptrs += stride_grad_split

    avg_ptrs = tile_ptrs(exp_avg_ptr, offs_out, offs_in, stride_avg_out, stride_avg_in)
    sq_ptrs = tile_ptrs(exp_avg_sq_ptr, offs_out, offs_in, stride_sq_out, stride_sq_in)
    exp_avg = tl.load(avg_ptrs, mask=mask, other=0.0)
    exp_avg_sq = tl.load(sq_ptrs, mask=mask, other=0.0)
    subnet_ptrs = tile_ptrs(subnet_ptr, offs_out, offs_in, stride_subnet_out, stride_subnet_in)
    value = tl.load(subnet_ptrs, mask=mask, other=0.0).to(tl.float32)
    value, exp_avg, exp_avg_sq = adamw(
        value,
        grad,
        exp_avg,
        exp_avg_sq,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        eps,
        decay,
        step_size,
        root_correction,
    )
    tl.store(avg_ptrs, exp_avg, mask=mask)
    tl.store(sq_ptrs, exp_avg_sq, mask=mask)
    if STOCHASTIC:
        counter = (
            offs_out[:, None] * k_in + offs_in[None, :]
        )  # flat position in the subnet, modulo 2^32
        value = stochastic_round(value, counter, seed, subnet_ptr.dtype.element_ty).to(tl.float32)
    store_as(subnet_ptrs, value, mask)

    weight_out = tl.load(out_idx_ptr + offs_out, mask=offs_out < k_out, other=0)
    weight_in = tl.load(in_idx_ptr + offs_in, mask=offs_in < k_in, other=0)
    store_as(
        tile_ptrs(weight_ptr, weight_out, weight_in, stride_weight_out, stride_weight_in),
        value,
        mask,
    )


def launch_subnet_adamw_(
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
    """``ops.subnet_adamw_`` on the device: everything read once and written once, the gradient's
    splits included."""
    k_out, k_in = subnet.shape
    grad = grad if grad.dim() == 3 else grad.unsqueeze(0)  # [splits, k_out, k_in]
    config = launch_config("subnet_adamw_", subnet, n_out=k_out, n_in=k_in)
    with torch.cuda.device_of(weight):
        subnet_adamw_kernel[tile_grid(config, k_out, k_in)](
            weight,
            subnet,
            grad,
            exp_avg,
            exp_avg_sq,
            out_idx.contiguous(),
            in_idx.contiguous(),
            k_out,
            k_in,
            *weight.stride(),
            *subnet.stride(),
            *grad.stride(),
            *exp_avg.stride(),
            *exp_avg_sq.stride(),
            1 - beta1,
            beta2,
            1 - beta2,
            eps,
            1 - lr * weight_decay,
            lr / (1 - beta1**step),
            (1 - beta2**step) ** 0.5,
            signed_32_bits(seed or 0),
            SPLITS=grad.shape[0],
            STOCHASTIC=seed is not None,
            BLOCK_OUT=config.block_out,
            BLOCK_IN=config.block_in,
            **config.compiler,
        )


def signed_32_bits(value: int) -> int:
    """The low 32 bits as an int32: one kernel signature for every seed."""
    return (value + 2**31) % 2**32 - 2**31
