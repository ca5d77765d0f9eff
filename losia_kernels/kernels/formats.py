"""Moments in fewer bits, and a float32 in two 16-bit parts: ``losia_kernels.ops.rounding``, bit
for bit."""

import triton
import triton.language as tl

from .device import hash_u32, stochastic_round, store_as


@triton.jit
def load_moment(ptrs, scale_ptrs, map_ptr, mask, mask_out):
    """The tile's moments in float32; ``map_ptr [256]`` and one scale a row are read for codes
    alone."""
    stored = tl.load(ptrs, mask=mask, other=0)
    if ptrs.dtype.element_ty == tl.uint8:
        scale = tl.load(scale_ptrs, mask=mask_out, other=0.0)  # [BLOCK_OUT]
        # fma by zero: a product, rounded, that the compiler cannot contract with what is subtracted
        # from it
        return tl.fma(
            tl.load(map_ptr + stored.to(tl.int32)),
            tl.broadcast_to(scale[:, None], stored.shape),
            0.0,
        )
    return stored.to(tl.float32)


@triton.jit
def store_moment(
    ptrs, scale_ptrs, map_ptr, value, mask, mask_out, counter, seed, SIGNED: tl.constexpr
):
    """As it is in float32, rounded stochastically in bfloat16, or as codes: a row of the tile is
    one block."""
    if ptrs.dtype.element_ty == tl.float32:
        tl.store(ptrs, value, mask=mask)
    elif ptrs.dtype.element_ty == tl.bfloat16:
        store_as(ptrs, stochastic_round(value, counter, seed, tl.bfloat16).to(tl.float32), mask)
    else:
        value = tl.where(mask, value, 0.0)
        scale = tl.max(tl.abs(value), axis=1)  # [BLOCK_OUT]
        tl.store(scale_ptrs, scale, mask=mask_out)
        relative = tl.div_rn(
            value, tl.broadcast_to(tl.where(scale > 0, scale, 1.0)[:, None], value.shape)
        )
        code = encode(relative, map_ptr, hash_u32(counter, seed), SIGNED)
        tl.store(ptrs, code.to(tl.uint8), mask=mask)


@triton.jit
def encode(relative, map_ptr, noise, SIGNED: tl.constexpr):
    """One of the two codes around each value, by chance; no positive unsigned value becomes 0
    (``rounding.encode``)."""
    lower = tl.zeros(relative.shape, dtype=tl.int32)
    for bit in tl.static_range(8):
        middle = lower + (128 >> bit)
        lower = tl.where(tl.load(map_ptr + middle) <= relative, middle, lower)
    upper = tl.minimum(lower + 1, 255)
    below = tl.load(map_ptr + lower)
    share = (noise >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24: uniform in [0, 1)
    up = share * (tl.load(map_ptr + upper) - below) < relative - below
    if not SIGNED:
        up |= (lower == 0) & (relative > 0)
    return tl.where(up, upper, lower)


@triton.jit
def join_float(high, remainder):
    """bfloat16 and int16 -> the float32 that they were split from."""
    bits = (high.to(tl.int16, bitcast=True).to(tl.int32) << 16) + remainder.to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def split_float(value):
    """Float32 -> its nearest bfloat16, ties away from zero, as float32, and the int16 that is
    missing."""
    bits = value.to(tl.uint32, bitcast=True)
    high = tl.where(value == value, (bits + 0x8000) & 0xFFFF0000, 0x7FC00000)
    low = tl.where(value == value, bits - high, 0)
    return high.to(tl.float32, bitcast=True), low.to(tl.int16)
