"""Helpers that run inside the kernels: rounding on store, random bits, matrix product."""

import triton
import triton.language as tl


@triton.jit
def hash_u32(counter, seed):
    """Random uint32 from a position and a seed: ``rounding.hash_u32``, bit for bit."""
    h = counter.to(tl.uint32) * 0x9E3779B1 + tl.cast(seed, tl.uint32)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def is_finite(value):
    return (value.to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000


@triton.jit
def stochastic_round(value, counter, seed, dtype: tl.constexpr):
    """Float32 ``value`` in bf16 or fp16, up with the probability of the remainder:
    ``rounding.stochastic_round``.

    ``counter`` is the element's flat position in its tensor.
    """
    # mantissa bits that float32 has and dtype has not
    DROPPED: tl.constexpr = 16 if dtype == tl.bfloat16 else 13
    noise = hash_u32(counter, seed) & ((1 << DROPPED) - 1)
    bits = ((value.to(tl.uint32, bitcast=True) + noise) >> DROPPED) << DROPPED
    rounded = bits.to(tl.float32, bitcast=True)
    return round_to(tl.where(is_finite(value), rounded, value), dtype)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """Float32 ``value`` in ``dtype``, rounded to nearest even as torch does."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter's own cast truncates
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(value == value, nearest, 0x7FC0)
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def store_as(ptrs, value, mask):
    """Store float32 ``value``, rounded to nearest in the dtype that ``ptrs`` point to."""
    tl.store(ptrs, round_to(value, ptrs.dtype.element_ty), mask=mask)


@triton.jit
def load_index(idx_ptr, offs, size, ALIGN: tl.constexpr):
    """``idx[offs]``, 0 past ``size``. With runs of ``ALIGN`` neighbours only their starts are read,
    and the compiler knows the rest: it can load 16 bytes at once where it would load single
    entries."""
    if ALIGN == 1:
        return tl.load(idx_ptr + offs, mask=offs < size, other=0)
    start = offs // ALIGN * ALIGN
    return (
        tl.multiple_of(tl.load(idx_ptr + start, mask=start < size, other=0), ALIGN) + offs % ALIGN
    )


@triton.jit
def dot(lhs, rhs, acc):
    """``acc + lhs @ rhs`` in float32; float32 operands keep all their bits (no TF32)."""
    if INTERPRETED:  # its product of bf16 operands is garbage
        return tl.dot(lhs.to(tl.float32), rhs.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(lhs, rhs, acc, input_precision="ieee")


# Asked of a decorated function, not of the environment: this is what triton decided when it was
# imported.
INTERPRETED = tl.constexpr(not isinstance(dot, triton.JITFunction))
