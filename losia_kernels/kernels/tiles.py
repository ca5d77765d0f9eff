"""Tiles of an ``[out, in]`` matrix: where one lies, and its sums over inputs and over outputs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, Problem, cdiv, cover, tile_of


@triton.jit
def tile_offsets(
    tile_out, tile_in, size_out, size_in, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr
):
    offs_out = tile_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)  # [BLOCK_OUT]
    offs_in = tile_in * BLOCK_IN + tl.arange(0, BLOCK_IN)  # [BLOCK_IN]
    mask = (offs_out < size_out)[:, None] & (offs_in < size_in)[None, :]  # [BLOCK_OUT, BLOCK_IN]
    return offs_out, offs_in, mask


@triton.jit
def tile_ptrs(ptr, offs_out, offs_in, stride_out, stride_in):
    """Addresses of the entries (out, in), in 64 bits: a vocabulary times a width can pass 2^31."""
    return (
        ptr
        + offs_out.to(tl.int64)[:, None] * stride_out
        + offs_in.to(tl.int64)[None, :] * stride_in
    )


@triton.jit
def store_tile_sums(
    out_partials_ptr,  # [tiles_in, size_out]
    in_partials_ptr,  # [tiles_out, size_in]
    out_values,  # [BLOCK_OUT, BLOCK_IN], zero outside the matrix
    in_values,  # [BLOCK_OUT, BLOCK_IN], zero outside the matrix
    tile_out,
    tile_in,
    size_out,
    size_in,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Sums of ``out_values`` per output and of ``in_values`` per input, one summand of each per
    tile: no atomics."""
    offs_out, offs_in, _ = tile_offsets(tile_out, tile_in, size_out, size_in, BLOCK_OUT, BLOCK_IN)
    out_ptrs = out_partials_ptr + tl.cast(tile_in, tl.int64) * size_out + offs_out
    in_ptrs = in_partials_ptr + tl.cast(tile_out, tl.int64) * size_in + offs_in
    tl.store(out_ptrs, tl.sum(out_values, axis=1), mask=offs_out < size_out)
    tl.store(in_ptrs, tl.sum(in_values, axis=0), mask=offs_in < size_in)


@tile_of("subnets_adamw_", "importance_update_")
def choose_elementwise(problem: Problem) -> LaunchConfig:
    """Four entries a thread (64 threads a warp on AMD's gfx9): 16-byte accesses in float32; more of
    them spill on sm_80."""
    return LaunchConfig(
        block_out=4 if problem.arch.startswith("gfx9") else 2,
        block_in=cover(problem.n_in, 16, 256),
        num_warps=4,
    )


@tile_of("importance_marginals", "score_marginals")
def choose_sums(problem: Problem) -> LaunchConfig:
    return LaunchConfig(
        block_out=cover(problem.n_out, 16, 64), block_in=cover(problem.n_in, 16, 128), num_warps=8
    )


def tile_grid(config: LaunchConfig, size_out: int, size_in: int) -> tuple[int]:
    """One program per tile; those of one row of tiles lie next to each other."""
    return (cdiv(size_out, config.block_out) * cdiv(size_in, config.block_in),)


def empty_partials(matrix: Tensor, config: LaunchConfig) -> tuple[Tensor, Tensor]:
    """The float32 workspace of ``store_tile_sums``; summing it over its first dimension gives
    ``([out], [in])``."""
    size_out, size_in = matrix.shape
    tiles_out, tiles_in = (
        cdiv(size_out, config.block_out),
        cdiv(size_in, config.block_in),
    )
    out_partials = torch.empty(tiles_in, size_out, device=matrix.device, dtype=torch.float32)
    in_partials = torch.empty(tiles_out, size_in, device=matrix.device, dtype=torch.float32)
    return out_partials, in_partials
