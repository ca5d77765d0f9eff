"""Partial sums of ranges of tokens, added in the order of the ranges: whoever does it, the same
bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, Problem, cover, has_dependent_launches, launch_config, tile_of
from .tiles import tile_grid, tile_offsets, tile_ptrs

# "launch": torch's sum; "dependent": a kernel that is there when the product ends, and waits for it
# (Hopper's programmatic dependent launch; elsewhere an ordinary one); "in_kernel": the last program
# of a tile to end. None of them waits for a program that may not have begun.
SUMS = ("launch", "dependent", "in_kernel")


@triton.jit
def split_ptrs(partials_ptr, offs_out, offs_in, split, rows, width, TURNED: tl.constexpr):
    """Into ``[splits, rows, width]``, or ``[splits, width, rows]`` where the gradient is turned."""
    first = partials_ptr + tl.cast(split, tl.int64) * rows * width
    if TURNED:
        return tile_ptrs(first, offs_out, offs_in, 1, rows)
    return tile_ptrs(first, offs_out, offs_in, width, 1)


@triton.jit
def sum_tile(
    partials_ptr,  # as split_ptrs
    total_ptr,  # [k_out, k_in], or turned, float32
    offs_out,
    offs_in,
    splits,
    rows,
    width,
    k_out,
    k_in,
    TURNED: tl.constexpr,
):
    # whole rows are loaded, wide; past L1, where an older version of a line could be
    mask = (offs_out < rows)[:, None] & (offs_in < width)[None, :]
    ptrs = split_ptrs(partials_ptr, offs_out, offs_in, 0, rows, width, TURNED)
    total = tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    for split in range(1, splits):
        ptrs = split_ptrs(partials_ptr, offs_out, offs_in, split, rows, width, TURNED)
        total += tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    total_ptrs = split_ptrs(total_ptr, offs_out, offs_in, 0, k_out, k_in, TURNED)
    tl.store(total_ptrs, total, mask=(offs_out < k_out)[:, None] & (offs_in < k_in)[None, :])


@triton.jit
def sum_kernel(
    partials_ptr,  # [splits, rows, width] float32
    total_ptr,  # [k_out, k_in] float32
    splits,
    rows,
    width,
    k_out,
    k_in,
    DEPENDENT: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    tiles_in = tl.cdiv(k_in, BLOCK_IN)
    tile_out, tile_in = tl.program_id(0) // tiles_in, tl.program_id(0) % tiles_in
    offs_out, offs_in, _ = tile_offsets(tile_out, tile_in, k_out, k_in, BLOCK_OUT, BLOCK_IN)
    sum_tile(
        partials_ptr, total_ptr, offs_out, offs_in, splits, rows, width, k_out, k_in, TURNED=False
    )


@tile_of("sum")
def choose_tile(problem: Problem) -> LaunchConfig:
    return LaunchConfig(block_out=4, block_in=cover(problem.n_in, 16, 256), num_warps=4)


def launch_sum(partials: Tensor, total: Tensor) -> None:
    """The rows of ``partials [splits, rows, width]`` that ``total [k_out, k_in]`` has, summed into
    it; both float32 and contiguous."""
    if total.numel() == 0:
        return
    config = launch_config("sum", total, n_out=total.shape[0], n_in=total.shape[1])
    dependent = has_dependent_launches(total.device)
    with torch.cuda.device_of(total):
        sum_kernel[tile_grid(config, *total.shape)](
            partials,
            total,
            *partials.shape,
            *total.shape,
            DEPENDENT=dependent,
            BLOCK_OUT=config.block_out,
            BLOCK_IN=config.block_in,
            **config.compiler,
            **({"launch_pdl": True} if dependent else {}),
        )
