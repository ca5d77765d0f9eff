"""``dy[:, out_idx].T @ x[:, in_idx]`` (Eq. 9), one partial sum per range of tokens; the forms are
in ``choose_variant``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import dot, load_index, store_as
from .gather import launch_gather_features
from .launch import (
    MAX_VECTOR,
    MULTIPROCESSORS,
    LaunchConfig,
    Problem,
    cdiv,
    cover,
    device_arch,
    has_dependent_launches,
    launch_config,
    padded,
    tile_of,
)
from .sums import SUMS, launch_sum, split_ptrs, sum_tile

VARIANTS = ("fused", "fused_wide", "gathered", "gathered_library")
# below this a split costs more in partial sums than it gains in parallelism
MIN_TOKENS_PER_SPLIT = 256
MAX_SPLITS = 16


@triton.jit
def subnet_grad_kernel(
    dy_ptr,  # [t, out], any strides
    x_ptr,  # [t, in], any strides
    out_idx_ptr,  # [k_out] int64, or None for all outputs
    in_idx_ptr,  # [k_in] int64, or None for all inputs
    partials_ptr,  # [splits, rows, width] float32, contiguous, or turned: [splits, width, rows]
    total_ptr,  # [k_out, k_in] float32, or turned; None: the partial sums are added elsewhere
    arrived_ptr,  # [tiles] int32, zeros: programs of a tile that have written theirs
    tokens,
    tokens_per_split,
    k_out,
    k_in,
    rows,  # k_out and k_in, padded: past an index the first neuron stands in
    width,
    stride_dy_t,
    stride_dy_out,
    stride_x_t,
    stride_x_in,
    BLOCK_T: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    ALIGN: tl.constexpr,
    PREFETCH: tl.constexpr,
    TURNED: tl.constexpr,
    AWAITED: tl.constexpr,  # by a launch that may begin while this one ends
):
    # Neighbouring programs differ in the inputs first: they read the same dy, from the cache.
    tiles_in = tl.cdiv(width, BLOCK_IN)
    first_out = tl.program_id(0) // tiles_in * BLOCK_OUT
    offs_out = first_out + tl.arange(0, BLOCK_OUT)  # [BLOCK_OUT]
    offs_in = tl.program_id(0) % tiles_in * BLOCK_IN + tl.arange(0, BLOCK_IN)  # [BLOCK_IN]
    split = tl.program_id(1).to(tl.int64)
    mask_out = (offs_out < rows)[None, :]
    mask_in = (offs_in < width)[None, :]

    out_idx = offs_out.to(tl.int64)
    if out_idx_ptr is not None:
        out_idx = load_index(out_idx_ptr, offs_out, k_out, ALIGN)
    in_idx = offs_in.to(tl.int64)
    if in_idx_ptr is not None:
        in_idx = load_index(in_idx_ptr, offs_in, k_in, ALIGN)
    dy_ptrs = dy_ptr + (out_idx * stride_dy_out)[None, :]  # [1, BLOCK_OUT]
    x_ptrs = x_ptr + (in_idx * stride_x_in)[None, :]  # [1, BLOCK_IN]

    start = split * tokens_per_split
    end = tl.minimum(start + tokens_per_split, tokens)
    acc = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    if PREFETCH:  # entries of 2 bytes cannot be copied asynchronously: a tile of dy is on its way while one is used
        offs_t = start + tl.arange(0, BLOCK_T).to(tl.int64)[:, None]  # [BLOCK_T, 1]
        dy_next = tl.load(dy_ptrs + offs_t * stride_dy_t, mask=(offs_t < end) & mask_out, other=0.0)
    # counted: over bounds in 64 bits Triton 3.6 waits for each product before it starts the next
    for step in range(0, tl.cdiv(end - start, BLOCK_T).to(tl.int32)):
        offs_t = start + step * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)[:, None]
        if PREFETCH:
            dy_sub = dy_next
            offs_next = offs_t + BLOCK_T
            dy_next = tl.load(
                dy_ptrs + offs_next * stride_dy_t, mask=(offs_next < end) & mask_out, other=0.0
            )
        else:
            dy_sub = tl.load(
                dy_ptrs + offs_t * stride_dy_t, mask=(offs_t < end) & mask_out, other=0.0
            )
        x_sub = tl.load(x_ptrs + offs_t * stride_x_t, mask=(offs_t < end) & mask_in, other=0.0)
        acc = dot(tl.trans(dy_sub), x_sub, acc)  # [BLOCK_OUT, BLOCK_IN]

    if AWAITED:
        tl.extra.cuda.gdc_launch_dependents()
    partials_ptrs = split_ptrs(partials_ptr, offs_out, offs_in, split, rows, width, TURNED)
    store_as(partials_ptrs, acc, (offs_out < rows)[:, None] & mask_in)
    if total_ptr is not None:
        tl.debug_barrier()  # all of this program's is written before it is counted
        arrived = tl.atomic_add(arrived_ptr + tl.program_id(0), 1, sem="acq_rel")
        splits = tl.num_programs(1)
        if arrived == splits - 1:  # the last one adds, whichever it is
            PIECE: tl.constexpr = BLOCK_OUT // 4  # in registers at once
            for first in range(0, BLOCK_OUT, PIECE):
                offs = first_out + first + tl.arange(0, PIECE)
                sum_tile(
                    partials_ptr, total_ptr, offs, offs_in, splits, rows, width, k_out, k_in, TURNED
                )


@tile_of("subnet_grad")
def choose_tile(problem: Problem) -> LaunchConfig:
    """One tile for each form; as many splits of the tokens as fill the device with the programs it
    holds ``at_once``."""
    arch, dtype, tokens, alignment = problem.arch, problem.dtype, problem.tokens, problem.alignment
    k_out, k_in = problem.n_out, problem.n_in
    variant = problem.variant or choose_variant(arch, dtype, k_in, alignment)
    wide_loads = variant.startswith("gathered") or alignment * dtype.itemsize >= MAX_VECTOR
    if variant not in VARIANTS:
        raise ValueError(f"subnet_grad has the variants {', '.join(VARIANTS)}, not {variant!r}")
    if dtype.itemsize > 2 and variant == "fused_wide":
        at_once, block_t, block_out, block_in, stages = 1, 16, 32, cover(k_in, 16, 128), 1
    elif dtype.itemsize > 2:
        at_once, block_t, block_out, block_in, stages = 2, 16, 64, 64, 1
    elif variant == "fused_wide" and k_in <= 128:
        at_once, block_t, block_out, block_in, stages = 2, 32, 64, 128, 3
    elif variant == "fused_wide":
        at_once, block_t, stages = 1, 32, 3
        block_out, block_in = choose_wide(problem)
    elif wide_loads and arch in ("sm_90", "sm_100") and k_in > 128:
        at_once, block_t, block_out, block_in, stages = 1, 64, 128, 256, 3
    elif wide_loads:
        at_once, block_t, block_out, block_in, stages = 2, 64, 128, 128, 3
    else:
        # block_out differs from block_in: tiles of one shape share one layout, which spreads the
        # gather over lines
        at_once, block_t, block_out, block_in, stages = 3, 32, 64, 128, 3
    if arch.startswith("gfx"):  # three would not fit its shared memory
        stages = min(stages, 2)
    if arch.startswith("gfx11") and dtype.itemsize == 2:  # wider tiles would not fit its registers
        block_t, block_out, block_in = 32, 64, min(block_in, 128)
    splits, tiles = 1, cdiv(k_out, block_out) * cdiv(k_in, block_in)
    if tiles and variant != "gathered_library":
        programs = at_once * MULTIPROCESSORS.get(arch, 128)
        splits = max(1, min(programs // tiles, tokens // MIN_TOKENS_PER_SPLIT, MAX_SPLITS))
    return LaunchConfig(
        block_t,
        block_out,
        block_in,
        splits,
        num_warps=8,
        num_stages=stages,
        variant=variant,
        prefetch=not wide_loads and dtype.itemsize == 2,
    )


def choose_wide(problem: Problem) -> tuple[int, int]:
    """Of the tiles of "fused_wide" that fit the registers, the one for which the cores read least."""
    tiles = [(64, cover(problem.n_in, 256, 512))]
    if problem.arch in ("sm_90", "sm_100"):  # elsewhere it spills
        tiles.append((128, 256))

    def entries_a_token(tile: tuple[int, int]) -> int:
        gathered = problem.chosen_from * cdiv(problem.n_in, tile[1])
        return gathered + problem.n_in * cdiv(problem.n_out, tile[0])

    return min(tiles, key=entries_a_token)


def choose_variant(arch: str, dtype: torch.dtype, k_in: int, alignment: int) -> str:
    """The form of the subnet's gradient ``dy[:, out_idx].T @ x``.

    - "fused": dy is gathered inside the product, once for every 128 inputs.
    - "fused_wide": the same with up to 512 inputs in a tile, so that dy is gathered once where
      ``k_in`` is no more.
    - "gathered": dy is gathered by a launch of its own, then a dense product whose loads are wide
      and asynchronous.
    - "gathered_library": the same, the product by the vendor's library.

    By counts, not by time (``python -m bench variants`` has them, and times them on a GPU): runs of
    neighbours are loaded 16 bytes at a time inside the product, and gathering first only adds
    bytes. Single entries of 2 bytes are bound by their number: "fused_wide" loads each once up to
    512 inputs, past that "gathered" does. Before sm_80 only the library multiplies well.
    """
    if arch.startswith("sm_") and int(arch[3:]) < 80:  # the compiler uses no matrix units there
        return "gathered_library"
    if alignment * dtype.itemsize >= MAX_VECTOR or dtype.itemsize > 2 or arch == "cpu":
        return "fused"
    return "fused_wide" if k_in <= 512 else "gathered"


def launch_subnet_grad(
    dy: Tensor, x: Tensor, out_idx: Tensor | None, in_idx: Tensor | None, alignment: int = 1
) -> Tensor:
    """``ops.subnet_grad`` on the device: the sums of the ranges of tokens, added in fixed order."""
    k_out, k_in = _size(dy, out_idx), _size(x, in_idx)
    sizes = {"n_out": k_out, "n_in": k_in, "chosen_from": dy.shape[-1]}
    both = out_idx is not None and in_idx is not None
    if turned := both and k_in > k_out:
        # the shorter side is gathered first, and the longer one in the product, once
        sizes = {"n_out": k_in, "n_in": k_out, "chosen_from": x.shape[-1]}
    config = launch_config(
        "subnet_grad",
        dy,
        tokens=dy.shape[:-1].numel(),
        alignment=MAX_VECTOR if out_idx is None else alignment,  # without a gather all is one run
        **sizes,
    )
    if config.sums not in SUMS:
        raise ValueError(f"splits are added by {', '.join(SUMS)}, not {config.sums!r}")
    total = None
    if config.splits > 1 and config.sums != "launch" and config.variant != "gathered_library":
        total = dy.new_empty(k_out, k_in, dtype=torch.float32)
    if turned:
        partials = launch_partials(x, dy, in_idx, out_idx, alignment, config, total, turned)
    else:
        partials = launch_partials(dy, x, out_idx, in_idx, alignment, config, total)
    if total is None:
        partials = partials[:, :k_out, :k_in]
        return partials[0].contiguous() if partials.shape[0] == 1 else partials.sum(0)
    if config.sums == "dependent":
        launch_sum(partials, total)
    return total


def _size(tokens: Tensor, idx: Tensor | None) -> int:
    return tokens.shape[-1] if idx is None else idx.shape[0]


def launch_partials(
    dy: Tensor,
    x: Tensor,
    out_idx: Tensor | None,
    in_idx: Tensor | None,
    alignment: int,
    config: LaunchConfig,
    total: Tensor | None = None,
    turned: bool = False,
) -> Tensor:
    """``[splits, rows, width]`` float32, ``k_out`` and ``k_in`` and what fills them up, one summand
    per range of tokens. ``total [k_out, k_in]`` gets their sum if the config has it added in the
    same launch. ``turned``: both are transposed."""
    tokens = dy.shape[:-1].numel()
    # copies only where the leading dimensions have no common stride
    dy = dy.reshape(tokens, dy.shape[-1])
    x = x.reshape(tokens, x.shape[-1])
    # two gathers in one wide tile would not fit the registers
    if in_idx is not None and config.variant != "fused":
        x, in_idx = launch_gather_features(x, in_idx, alignment), None
    if out_idx is not None and config.variant.startswith("gathered"):
        dy, out_idx = launch_gather_features(dy, out_idx, alignment), None
    if config.variant == "gathered_library":
        return (_library_product(x, dy) if turned else _library_product(dy, x)).unsqueeze(0)
    return _launch_product(dy, x, out_idx, in_idx, alignment, config, total, turned)


def _multiplies_bfloat16(dy: Tensor) -> bool:
    old = ("sm_5", "sm_6", "sm_7")
    return dy.dtype == torch.bfloat16 and not device_arch(dy.device).startswith(old)


def _library_product(dy: Tensor, x: Tensor) -> Tensor:
    # elsewhere torch has no product into a wider dtype, and before sm_80 none of bfloat16
    if dy.is_cuda and (dy.dtype == torch.float16 or _multiplies_bfloat16(dy)):
        return torch.mm(dy.T, x, out_dtype=torch.float32)
    return dy.float().T @ x.float()


def _sizes(tokens: Tensor, idx: Tensor | None) -> tuple[int, int]:
    """How many neurons of ``tokens [t, n]`` there are, and padded (``launch.padded``). What is
    computed of the padding is cut off; it only has to be there to be read."""
    size = _size(tokens, idx)
    width = padded(size)
    if idx is not None or width == size:
        return size, width if size else 0
    stride_t, stride = tokens.stride()
    if stride != 1 or stride_t < width or not tokens.shape[0]:
        return size, size
    end = tokens.storage_offset() + (tokens.shape[0] - 1) * stride_t + width
    there = end * tokens.element_size() <= tokens.untyped_storage().nbytes()
    return size, width if there else size


def _launch_product(
    dy: Tensor,
    x: Tensor,
    out_idx: Tensor | None,
    in_idx: Tensor | None,
    alignment: int,
    config: LaunchConfig,
    total: Tensor | None,
    turned: bool,
) -> Tensor:
    k_out, rows = _sizes(dy, out_idx)
    k_in, width = _sizes(x, in_idx)
    shape = (width, rows) if turned else (rows, width)
    partials = dy.new_empty(config.splits, *shape, dtype=torch.float32)
    if partials.numel() == 0:
        return partials
    out_idx = None if out_idx is None else out_idx.contiguous()
    in_idx = None if in_idx is None else in_idx.contiguous()
    tokens = dy.shape[0]
    tokens_per_split = cdiv(tokens, config.splits * config.block_t) * config.block_t
    tiles = cdiv(rows, config.block_out) * cdiv(width, config.block_in)
    arrived = None
    if adds := total is not None and config.sums == "in_kernel":
        # made anew, by a launch more: zeros that are kept would be those of another stream or graph
        arrived = torch.zeros(tiles, device=dy.device, dtype=torch.int32)
    with torch.cuda.device_of(dy):
        subnet_grad_kernel[tiles, config.splits](
            dy,
            x,
            out_idx,
            in_idx,
            partials,
            total if adds else None,
            arrived,
            tokens,
            tokens_per_split,
            k_out,
            k_in,
            rows,
            width,
            *dy.stride(),
            *x.stride(),
            BLOCK_T=config.block_t,
            BLOCK_OUT=config.block_out,
            BLOCK_IN=config.block_in,
            ALIGN=alignment,
            PREFETCH=config.prefetch and out_idx is not None,
            TURNED=turned,
            AWAITED=total is not None and not adds and has_dependent_launches(dy.device),
            **config.compiler,
        )
    return partials
