"""AdamW on all subnets of a model in one launch: each program looks up which matrix its tile
belongs to."""

import functools
import operator
import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import CODE_BLOCK, FIRST_MOMENT, SECOND_MOMENT, dynamic_map
from .device import load_index, stochastic_round, store_as
from .formats import join_float, load_moment, split_float, store_moment
from .launch import LaunchConfig, cdiv, launch_config
from .tiles import tile_offsets, tile_ptrs

DTYPES = {
    torch.float64: tl.float64,  # a gradient
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.uint8: tl.uint8,
}
RUN = tl.constexpr(4)  # neighbours of a row that one store writes
FIRST, SECOND = tl.constexpr(FIRST_MOMENT), tl.constexpr(SECOND_MOMENT)

# A row of the table, one a matrix: addresses, sizes, and what changes with the step (floats in the
# low 32 bits).
(
    WEIGHT,
    SUBNET,
    GRAD,
    EXP_AVG,
    EXP_AVG_SQ,
    OUT_IDX,
    IN_IDX,
    EXP_AVG_SCALE,
    EXP_AVG_SQ_SCALE,
    REMAINDER,
    K_OUT,
    K_IN,
    STRIDE_WEIGHT_OUT,
    STRIDE_WEIGHT_IN,
    IN_RUNS,
    FIRST_TILE,
    SEED,
    DECAY,
    STEP_SIZE,
    ROOT_CORRECTION,
) = (tl.constexpr(field) for field in range(20))
FIELDS = tl.constexpr(20)
ROW = struct.Struct("<17q f4x f4x f4x")


@triton.jit
def adamw(
    value,
    grad,
    exp_avg,
    exp_avg_sq,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    decay,  # 1 - lr * weight_decay
    step_size,  # lr / (1 - beta1^step)
    root_correction,  # sqrt(1 - beta2^step)
):
    """One step in float32 -> new ``(value, exp_avg, exp_avg_sq)``; eps outside the corrected
    root."""
    exp_avg += (grad - exp_avg) * one_minus_beta1
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    denom = tl.div_rn(tl.sqrt_rn(exp_avg_sq), root_correction) + eps
    return value * decay - tl.div_rn(step_size * exp_avg, denom), exp_avg, exp_avg_sq


@triton.jit
def load_pointer(row_ptr, FIELD: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row_ptr + FIELD).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def load_float(row_ptr, FIELD: tl.constexpr):
    return tl.load(row_ptr + FIELD).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def subnets_adamw_kernel(
    table_ptr,  # [matrices, FIELDS] int64
    matrix_ptr,  # [tiles] int32: the tile's matrix
    signed_map_ptr,  # [256], for uint8 moments
    unsigned_map_ptr,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    WEIGHT_DTYPE: tl.constexpr,
    SUBNET_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    MOMENT_DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,  # a 16-bit subnet
    HAS_REMAINDER: tl.constexpr,
    ALIGNED: tl.constexpr,  # all addresses and rows start at multiples of 16
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,  # for uint8 moments the block that shares a scale
):
    row = table_ptr + tl.load(matrix_ptr + tl.program_id(0)) * FIELDS
    tile = tl.program_id(0) - tl.load(row + FIRST_TILE).to(tl.int32)
    k_out, k_in = tl.load(row + K_OUT).to(tl.int32), tl.load(row + K_IN).to(tl.int32)
    if ALIGNED:
        k_in = tl.multiple_of(k_in, 16)
    seed = tl.load(row + SEED).to(tl.int32)
    tiles_in = tl.cdiv(k_in, BLOCK_IN)
    tile_out, tile_in = tile // tiles_in, tile % tiles_in
    offs_out, offs_in, mask = tile_offsets(tile_out, tile_in, k_out, k_in, BLOCK_OUT, BLOCK_IN)
    mask_out = offs_out < k_out

    grad_ptrs = tile_ptrs(load_pointer(row, GRAD, GRAD_DTYPE, ALIGNED), offs_out, offs_in, k_in, 1)
    grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)

    avg_ptr = load_pointer(row, EXP_AVG, MOMENT_DTYPE, ALIGNED)
    sq_ptr = load_pointer(row, EXP_AVG_SQ, MOMENT_DTYPE, ALIGNED)
    avg_ptrs = tile_ptrs(avg_ptr, offs_out, offs_in, k_in, 1)
    sq_ptrs = tile_ptrs(sq_ptr, offs_out, offs_in, k_in, 1)
    offs_scale = offs_out * tiles_in + tile_in
    avg_scale_ptrs = load_pointer(row, EXP_AVG_SCALE, tl.float32, False) + offs_scale
    sq_scale_ptrs = load_pointer(row, EXP_AVG_SQ_SCALE, tl.float32, False) + offs_scale
    exp_avg = load_moment(avg_ptrs, avg_scale_ptrs, signed_map_ptr, mask, mask_out)
    exp_avg_sq = load_moment(sq_ptrs, sq_scale_ptrs, unsigned_map_ptr, mask, mask_out)

    subnet_ptr = load_pointer(row, SUBNET, SUBNET_DTYPE, ALIGNED)
    rest_ptr = load_pointer(row, REMAINDER, tl.int16, ALIGNED)
    subnet_ptrs = tile_ptrs(subnet_ptr, offs_out, offs_in, k_in, 1)
    rest_ptrs = tile_ptrs(rest_ptr, offs_out, offs_in, k_in, 1)
    value = tl.load(subnet_ptrs, mask=mask, other=0.0)
    if HAS_REMAINDER:
        value = join_float(value, tl.load(rest_ptrs, mask=mask, other=0))
    value, exp_avg, exp_avg_sq = adamw(
        value.to(tl.float32),
        grad,
        exp_avg,
        exp_avg_sq,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        eps,
        load_float(row, DECAY),
        load_float(row, STEP_SIZE),
        load_float(row, ROOT_CORRECTION),
    )
    counter = offs_out[:, None] * k_in + offs_in[None, :]  # position in the subnet, modulo 2^32
    if HAS_REMAINDER:
        value, rest = split_float(value)
        tl.store(rest_ptrs, rest, mask=mask)
    elif STOCHASTIC:
        value = stochastic_round(value, counter, seed, SUBNET_DTYPE).to(tl.float32)
    store_as(subnet_ptrs, value, mask)

    out_idx_ptr = load_pointer(row, OUT_IDX, tl.int64, ALIGNED)
    in_idx_ptr = load_pointer(row, IN_IDX, tl.int64, ALIGNED)
    weight_out = tl.load(out_idx_ptr + offs_out, mask=mask_out, other=0)
    weight_ptr = load_pointer(row, WEIGHT, WEIGHT_DTYPE, ALIGNED)
    stride_out = tl.load(row + STRIDE_WEIGHT_OUT)
    if tl.load(row + IN_RUNS) != 0:  # memory gets whole sectors, and does not read them before
        weight_in = load_index(in_idx_ptr, offs_in, k_in, RUN)
        weight_ptr = tl.multiple_of(weight_ptr, 16)
        stride_out = tl.multiple_of(stride_out, RUN)
        in_row = (offs_in < tl.multiple_of(k_in, RUN))[None, :]
        weight_ptrs = tile_ptrs(weight_ptr, weight_out, weight_in, stride_out, 1)
        store_as(weight_ptrs, value, mask_out[:, None] & in_row)
    else:
        weight_in = load_index(in_idx_ptr, offs_in, k_in, 1)
        stride_in = tl.load(row + STRIDE_WEIGHT_IN)
        weight_ptrs = tile_ptrs(weight_ptr, weight_out, weight_in, stride_out, stride_in)
        store_as(weight_ptrs, value, mask)
    store_moment(
        avg_ptrs,
        avg_scale_ptrs,
        signed_map_ptr,
        exp_avg,
        mask,
        mask_out,
        counter,
        seed ^ FIRST,
        True,
    )
    store_moment(
        sq_ptrs,
        sq_scale_ptrs,
        unsigned_map_ptr,
        exp_avg_sq,
        mask,
        mask_out,
        counter,
        seed ^ SECOND,
        False,
    )


def launch_subnets_adamw_(
    updates: Sequence[Any], beta1: float, beta2: float, eps: float, weight_decay: float
) -> None:
    """``ops.subnets_adamw_`` on the device, of ``ops.adamw.Update``s: one launch for each device
    and combination of dtypes."""
    kinds: dict[tuple, list[Any]] = {}
    for update in updates:
        weight, subnet, grad, exp_avg = update[:4]
        kind = weight.device, weight.dtype, subnet.dtype, grad.dtype, exp_avg.dtype
        kinds.setdefault(kind, []).append(update)
    for (device, *dtypes), alike in kinds.items():
        first = alike[0]
        has_codes, has_remainder = dtypes[3] == torch.uint8, first.remainder is not None
        config = launch_config("subnets_adamw_", first.subnet, n_in=CODE_BLOCK)
        first_tiles, matrix_of_tile = tile_map(
            tuple(update.subnet.shape for update in alike), config, device
        )
        table, aligned = make_table(alike, first_tiles, beta1, beta2, weight_decay)
        compiler = config.compiler
        if has_codes:
            compiler |= {"num_warps": 8}  # four spill
        with torch.cuda.device_of(first.weight):
            subnets_adamw_kernel[(len(matrix_of_tile),)](
                _to_device(table, device),
                matrix_of_tile,
                *(dynamic_map(signed, device) if has_codes else None for signed in (True, False)),
                1 - beta1,
                beta2,
                1 - beta2,
                eps,
                *(DTYPES[dtype] for dtype in dtypes),
                STOCHASTIC=first.seed is not None and dtypes[1].itemsize == 2 and not has_remainder,
                HAS_REMAINDER=has_remainder,
                ALIGNED=aligned,
                BLOCK_OUT=config.block_out,
                BLOCK_IN=config.block_in,
                **compiler,
            )


def make_table(
    updates: Sequence[Any],
    first_tiles: Sequence[int],
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> tuple[Tensor, bool]:
    """What the kernel reads about each matrix, on the host, and whether everything is aligned to 16
    bytes."""
    rows, bits = bytearray(), 0
    for update, first_tile in zip(updates, first_tiles, strict=True):
        tensors = update[:7] + update[10:13]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        k_out, k_in = update.subnet.shape
        rows += ROW.pack(
            *addresses,
            k_out,
            k_in,
            *update.weight.stride(),
            stores_runs(update),
            first_tile,
            signed_32_bits(update.seed or 0),
            1 - update.lr * weight_decay,
            update.lr / (1 - beta1**update.step),
            (1 - beta2**update.step) ** 0.5,
        )
        bits = functools.reduce(operator.or_, addresses, bits | k_in)
    return torch.frombuffer(rows, dtype=torch.int64).view(-1, FIELDS.value), bits % 16 == 0


def stores_runs(update: Any) -> bool:
    """Whether ``RUN`` values at a time lie together in the weight, where one store may write
    them."""
    (stride_out, stride_in), k_in = update.weight.stride(), update.subnet.shape[1]
    sizes = update.alignment | k_in | stride_out
    return stride_in == 1 and sizes % RUN.value == 0 and update.weight.data_ptr() % 16 == 0


def signed_32_bits(value: int) -> int:
    """The low 32 bits as an int32, which the table's field is read as."""
    return (value + 2**31) % 2**32 - 2**31


@functools.lru_cache(maxsize=256)
def tile_map(
    shapes: tuple[tuple[int, int], ...], config: LaunchConfig, device: torch.device
) -> tuple[tuple[int, ...], Tensor]:
    """The number of each matrix's first tile, and the matrix of each tile ``[tiles]`` on the
    device."""
    tiles = [cdiv(k_out, config.block_out) * cdiv(k_in, config.block_in) for k_out, k_in in shapes]
    firsts = [sum(tiles[:number]) for number in range(len(tiles))]
    matrix_of_tile = torch.arange(len(shapes), dtype=torch.int32).repeat_interleave(
        torch.tensor(tiles)
    )
    _check_not_captured(device)
    # waits, once: it is remembered, and the next to read it may do so on another stream
    return tuple(firsts), matrix_of_tile.to(device)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Without waiting: torch's allocator of pinned memory keeps it until the copy is done."""
    if device.type != "cuda":
        return tensor.to(device)
    _check_not_captured(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _check_not_captured(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a captured update would repeat the learning rates and steps of this one, which the host "
            "writes into a table each time: capture forward and backward, and call step() after replay; "
            "it is one copy and one launch"
        )
