"""Row and column sums of the score ``importance * uncertainty`` (Eq. 6), whole or restricted, in
one read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_config
from .tiles import empty_partials, store_tile_sums, tile_grid, tile_offsets, tile_ptrs


@triton.jit
def score_marginals_kernel(
    out_partials_ptr,  # [tiles_in, out]
    in_partials_ptr,  # [tiles_out, in]
    importance_ptr,  # [out, in]
    uncertainty_ptr,  # [out, in] or None
    out_chosen_ptr,  # [out] of 0 and 1, or None: all
    in_chosen_ptr,  # [in] of 0 and 1, or None: all
    size_out,
    size_in,
    stride_importance_out,
    stride_importance_in,
    stride_uncertainty_out,
    stride_uncertainty_in,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_in = tl.cdiv(size_in, BLOCK_IN)
    tile_out, tile_in = tile // tiles_in, tile % tiles_in
    offs_out, offs_in, mask = tile_offsets(
        tile_out, tile_in, size_out, size_in, BLOCK_OUT, BLOCK_IN
    )
    ptrs = tile_ptrs(importance_ptr, offs_out, offs_in, stride_importance_out, stride_importance_in)
    score = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    if uncertainty_ptr is not None:
        ptrs = tile_ptrs(
            uncertainty_ptr, offs_out, offs_in, stride_uncertainty_out, stride_uncertainty_in
        )
        score *= tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    # Selected by where, not by a product: an infinite score that was not chosen must not become
    # NaN.
    out_values = score
    if in_chosen_ptr is not None:
        chosen = tl.load(in_chosen_ptr + offs_in, mask=offs_in < size_in, other=0) != 0
        out_values = tl.where(chosen[None, :], score, 0.0)
    in_values = score
    if out_chosen_ptr is not None:
        chosen = tl.load(out_chosen_ptr + offs_out, mask=offs_out < size_out, other=0) != 0
        in_values = tl.where(chosen[:, None], score, 0.0)
    store_tile_sums(
        out_partials_ptr,
        in_partials_ptr,
        out_values,
        in_values,
        tile_out,
        tile_in,
        size_out,
        size_in,
        BLOCK_OUT,
        BLOCK_IN,
    )


def chosen(idx: Tensor | None, size: int) -> Tensor | None:
    """``idx`` as ``size`` zeros and ones."""
    if idx is None:
        return None
    return torch.zeros(size, device=idx.device, dtype=torch.int8).index_fill_(0, idx, 1)


def launch_score_marginals(
    importance: Tensor, uncertainty: Tensor | None, out_idx: Tensor | None, in_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``ops.score_marginals`` on the device: one read of both tensors. A repeated index counts
    once."""
    size_out, size_in = importance.shape
    config = launch_config("score_marginals", importance, n_out=size_out, n_in=size_in)
    out_partials, in_partials = empty_partials(importance, config)
    with torch.cuda.device_of(importance):
        score_marginals_kernel[tile_grid(config, size_out, size_in)](
            out_partials,
            in_partials,
            importance,
            uncertainty,
            chosen(out_idx, size_out),
            chosen(in_idx, size_in),
            size_out,
            size_in,
            *importance.stride(),
            *(importance if uncertainty is None else uncertainty).stride(),
            BLOCK_OUT=config.block_out,
            BLOCK_IN=config.block_in,
            **config.compiler,
        )
    return out_partials.sum(0), in_partials.sum(0)
