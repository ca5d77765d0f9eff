"""``x[..., idx]`` -> contiguous: the part of an activation that LoSiA-Pro keeps for the backward
(X_S of Eq. 9)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import load_index
from .launch import LaunchConfig, Problem, cdiv, cover, launch_config, padded, tile_of


@triton.jit
def gather_features_kernel(
    x_ptr,  # [t, n], any strides
    idx_ptr,  # [k] int64
    out_ptr,  # [t, width], contiguous: zeros past k
    tokens,
    k_in,
    width,
    stride_x_t,
    stride_x_in,
    BLOCK_T: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    ALIGN: tl.constexpr,
):
    # Neighbouring programs read the same tokens, whose lines they share in the cache.
    tiles_in = tl.cdiv(width, BLOCK_IN)
    first_t = (tl.program_id(0) // tiles_in).to(tl.int64) * BLOCK_T
    first_in = tl.program_id(0) % tiles_in * BLOCK_IN
    offs_t = first_t + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    offs_in = first_in + tl.arange(0, BLOCK_IN)  # [BLOCK_IN]
    idx = load_index(idx_ptr, offs_in, k_in, ALIGN)  # read once for all tokens of the tile
    mask = (offs_t < tokens)[:, None] & (offs_in < k_in)[None, :]
    ptrs = x_ptr + offs_t[:, None] * stride_x_t + (idx * stride_x_in)[None, :]
    x = tl.load(ptrs, mask=mask, other=0.0)  # [BLOCK_T, BLOCK_IN]
    # Stored flat, so that the wide stores do not spread the threads of a load: neighbours share its
    # cache lines.
    offs = tl.arange(0, BLOCK_T * BLOCK_IN)
    offs_t = first_t + offs // BLOCK_IN
    offs_in = first_in + offs % BLOCK_IN
    flat = tl.reshape(x, (BLOCK_T * BLOCK_IN,))
    tl.store(out_ptr + offs_t * width + offs_in, flat, mask=(offs_t < tokens) & (offs_in < width))


@tile_of("gather_features")
def choose_tile(problem: Problem) -> LaunchConfig:
    return LaunchConfig(block_t=16, block_in=cover(problem.n_in, 16, 256), num_warps=4)


def launch_gather_features(x: Tensor, idx: Tensor, alignment: int = 1) -> Tensor:
    """``x [..., n]``, ``idx [k]`` int64 -> ``[..., k]`` in rows of ``padded(k)``; see
    ``ops.gather_features``."""
    k_in = idx.shape[0]
    width = padded(k_in)
    out = x.new_empty(*x.shape[:-1], width)
    kept = out if width == k_in else out[..., :k_in]
    if kept.numel() == 0:
        return kept
    x = x.reshape(-1, x.shape[-1])  # copies only where the leading dimensions have no common stride
    tokens = x.shape[0]
    config = launch_config("gather_features", x, tokens=tokens, n_in=k_in)
    grid = (cdiv(tokens, config.block_t) * cdiv(width, config.block_in),)
    with torch.cuda.device_of(x):
        gather_features_kernel[grid](
            x,
            idx.contiguous(),
            out,
            tokens,
            k_in,
            width,
            *x.stride(),
            BLOCK_T=config.block_t,
            BLOCK_IN=config.block_in,
            ALIGN=alignment,
            **config.compiler,
        )
    return kept
