"""Float32 values in fewer bits: stochastic rounding, 8-bit codes in blocks, bfloat16 with its
remainder beside it.

Random bits depend on a seed and an element's flat position only: the same in every run, on the CPU
and in the kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.codes import CODE_BLOCK, dynamic_map


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def hash_u32(counter: Tensor, seed: int) -> Tensor:
    """Counter-based random 32-bit integers (int64 tensor): murmur3's finalizer of ``counter *
    golden + seed``."""
    mask = 0xFFFFFFFF
    h = (counter * 0x9E3779B1 + seed) & mask
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & mask
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & mask
    return h ^ (h >> 16)


def stochastic_round(value: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Round float32 ``value`` to bfloat16 or float16, up with the probability of the remainder.

    Non-finite values pass unchanged.
    """
    # mantissa bits that float32 has and dtype has not
    dropped = {torch.bfloat16: 16, torch.float16: 13}[dtype]
    noise = hash_u32(_positions(value), seed) & ((1 << dropped) - 1)
    bits = value.contiguous().view(torch.int32).to(torch.int64) + noise
    bits = (bits >> dropped) << dropped
    rounded = bits.to(torch.int32).view(torch.float32)
    return torch.where(torch.isfinite(value), rounded, value).to(dtype)


def _positions(value: Tensor) -> Tensor:
    return torch.arange(value.numel(), device=value.device).view(value.shape)


# 8 bits -------------------------------------------------------------------------------------------


def code_blocks(k_in: int) -> int:
    """Scales of a row of ``k_in`` codes."""
    return -(-k_in // CODE_BLOCK)


def encode(value: Tensor, signed: bool, seed: int) -> tuple[Tensor, Tensor]:
    """``value [k_out, k_in]`` float32 as codes (uint8) and the largest magnitude of each block
    ``[k_out, blocks]``.

    A value becomes one of the two codes around it, the upper one with the probability of its
    distance from the lower one, so that the mean is right. But a positive unsigned value never
    becomes 0: it is a second moment, and what is divided by its root would be lost to all bounds.
    """
    k_in = value.shape[1]
    map_ = dynamic_map(signed, value.device)
    padded = F.pad(value, (0, -k_in % CODE_BLOCK))
    blocks = padded.unflatten(1, (-1, CODE_BLOCK))  # [k_out, blocks, CODE_BLOCK]
    scale = blocks.abs().amax(-1)
    relative = blocks / torch.where(scale > 0, scale, 1.0)[..., None]
    relative = relative.flatten(1)[:, :k_in].contiguous()
    lower = (torch.searchsorted(map_, relative, right=True) - 1).clamp_(min=0)
    upper = (lower + 1).clamp_(max=255)
    share = (hash_u32(_positions(value), seed) >> 8).float() * 2.0**-24  # uniform in [0, 1)
    up = share * (map_[upper] - map_[lower]) < relative - map_[lower]
    if not signed:
        up |= (lower == 0) & (relative > 0)
    return torch.where(up, upper, lower).to(torch.uint8), scale


def decode(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The float32 values of ``encode``; all zeros where the scale is 0, whatever the codes are."""
    each = scale.repeat_interleave(CODE_BLOCK, dim=1)[:, : codes.shape[1]]
    return dynamic_map(signed, codes.device)[codes.int()] * each


# bfloat16 and remainder ---------------------------------------------------------------------------


def split_float(value: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 as its nearest bfloat16 (ties away from zero) and the int16 that is missing:
    ``join_float`` is exact.

    Ties cannot go to even as torch's rounding has them: 65,537 values would share an even bfloat16.
    NaN stays NaN.
    """
    bits = value.contiguous().view(torch.int32)
    high = (bits.to(torch.int64) + 0x8000) >> 16
    low = bits - (high << 16).to(torch.int32)
    nan = value.isnan()
    high, low = torch.where(nan, 0x7FC0, high), torch.where(nan, 0, low)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_float(value: Tensor, remainder: Tensor) -> Tensor:
    """The float32 that ``split_float`` split."""
    bits = (value.contiguous().view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)
    return bits.view(torch.float32)
