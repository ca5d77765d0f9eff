"""Importance of every weight from one micro-batch (Eqs. 3-6), smoothed in place or summed per
neuron."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import store_as
from .launch import launch_config
from .tiles import empty_partials, store_tile_sums, tile_grid, tile_offsets, tile_ptrs


@triton.jit
def load_importance(
    weight_ptr,
    grad_ptr,
    offs_out,
    offs_in,
    mask,
    stride_weight_out,
    stride_weight_in,
    stride_grad_out,
    stride_grad_in,
    grad_scale,
    KIND: tl.constexpr,
):
    """I of one tile in float32 (``ops.importance.importance_of``), 0 outside the mask."""
    grad = tl.load(
        tile_ptrs(grad_ptr, offs_out, offs_in, stride_grad_out, stride_grad_in),
        mask=mask,
        other=0.0,
    )
    value = grad.to(tl.float32) * grad_scale
    if KIND != "gradient":
        ptrs = tile_ptrs(weight_ptr, offs_out, offs_in, stride_weight_out, stride_weight_in)
        value *= tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    if KIND == "second_order":
        value = 0.5 * value * value
    if KIND == "sensitivity":
        value -= 0.5 * value * value
    return tl.abs(value)


@triton.jit
def importance_update_kernel(
    importance_ptr,  # [out, in], as are all four
    uncertainty_ptr,
    weight_ptr,
    grad_ptr,
    size_out,
    size_in,
    stride_importance_out,
    stride_importance_in,
    stride_uncertainty_out,
    stride_uncertainty_in,
    stride_weight_out,
    stride_weight_in,
    stride_grad_out,
    stride_grad_in,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    grad_scale,
    KIND: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_in = tl.cdiv(size_in, BLOCK_IN)
    offs_out, offs_in, mask = tile_offsets(
        tile // tiles_in, tile % tiles_in, size_out, size_in, BLOCK_OUT, BLOCK_IN
    )
    now = load_importance(
        weight_ptr,
        grad_ptr,
        offs_out,
        offs_in,
        mask,
        stride_weight_out,
        stride_weight_in,
        stride_grad_out,
        stride_grad_in,
        grad_scale,
        KIND,
    )
    mean_ptrs = tile_ptrs(
        importance_ptr, offs_out, offs_in, stride_importance_out, stride_importance_in
    )
    deviation_ptrs = tile_ptrs(
        uncertainty_ptr, offs_out, offs_in, stride_uncertainty_out, stride_uncertainty_in
    )
    mean = tl.load(mean_ptrs, mask=mask, other=0.0).to(tl.float32)
    deviation = tl.load(deviation_ptrs, mask=mask, other=0.0).to(tl.float32)
    new_mean = beta1 * mean + one_minus_beta1 * now  # Eq. 4
    # Eq. 5, with the new mean
    new_deviation = beta2 * deviation + one_minus_beta2 * tl.abs(now - new_mean)
    finite = now < float("inf")  # and no NaN; masked stores would not be vectors
    store_as(mean_ptrs, tl.where(finite, new_mean, mean), mask)
    store_as(deviation_ptrs, tl.where(finite, new_deviation, deviation), mask)


@triton.jit
def importance_marginals_kernel(
    out_partials_ptr,  # [tiles_in, out]
    in_partials_ptr,  # [tiles_out, in]
    weight_ptr,  # [out, in]
    grad_ptr,  # [out, in]
    size_out,
    size_in,
    stride_weight_out,
    stride_weight_in,
    stride_grad_out,
    stride_grad_in,
    grad_scale,
    KIND: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_in = tl.cdiv(size_in, BLOCK_IN)
    tile_out, tile_in = tile // tiles_in, tile % tiles_in
    offs_out, offs_in, mask = tile_offsets(
        tile_out, tile_in, size_out, size_in, BLOCK_OUT, BLOCK_IN
    )
    now = load_importance(
        weight_ptr,
        grad_ptr,
        offs_out,
        offs_in,
        mask,
        stride_weight_out,
        stride_weight_in,
        stride_grad_out,
        stride_grad_in,
        grad_scale,
        KIND,
    )
    store_tile_sums(
        out_partials_ptr,
        in_partials_ptr,
        now,
        now,
        tile_out,
        tile_in,
        size_out,
        size_in,
        BLOCK_OUT,
        BLOCK_IN,
    )


def launch_importance_update_(
    importance: Tensor,
    uncertainty: Tensor,
    weight: Tensor,
    grad: Tensor,
    beta1: float,
    beta2: float,
    kind: str,
    grad_scale: float,
) -> None:
    """``ops.importance_update_`` on the device: one read of the four tensors, one write of the
    first two."""
    size_out, size_in = weight.shape
    config = launch_config("importance_update_", weight, n_out=size_out, n_in=size_in)
    with torch.cuda.device_of(weight):
        importance_update_kernel[tile_grid(config, size_out, size_in)](
            importance,
            uncertainty,
            weight,
            grad,
            size_out,
            size_in,
            *importance.stride(),
            *uncertainty.stride(),
            *weight.stride(),
            *grad.stride(),
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            grad_scale,
            KIND=kind,
            BLOCK_OUT=config.block_out,
            BLOCK_IN=config.block_in,
            **config.compiler,
        )


def launch_importance_marginals(
    weight: Tensor, grad: Tensor, kind: str, grad_scale: float
) -> tuple[Tensor, Tensor]:
    """``ops.importance_marginals`` on the device: one read of both tensors, partial sums of every
    tile written."""
    size_out, size_in = weight.shape
    config = launch_config("importance_marginals", weight, n_out=size_out, n_in=size_in)
    out_partials, in_partials = empty_partials(weight, config)
    with torch.cuda.device_of(weight):
        importance_marginals_kernel[tile_grid(config, size_out, size_in)](
            out_partials,
            in_partials,
            weight,
            grad,
            size_out,
            size_in,
            *weight.stride(),
            *grad.stride(),
            grad_scale,
            KIND=kind,
            BLOCK_OUT=config.block_out,
            BLOCK_IN=config.block_in,
            **config.compiler,
        )
    return out_partials.sum(0), in_partials.sum(0)
