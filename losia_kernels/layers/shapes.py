"""The shape of a subnet: which share of a layer's outputs and of its inputs it takes."""

import re

from torch import nn

from ..config import LoSiAConfig

Factors = tuple[float, float]  # (p_out, p_in)

# Where a layer's two sides are as long as the residual stream, its name says whether it writes it.
WRITERS = (
    "o_proj",
    "out_proj",
    "c_proj",
    "proj",
    "dense",
    "o",
    "wo",
    "out_lin",
    "down_proj",
    "fc2",
)
WIDE = 1 / 2  # share of the stream that a wide subnet takes


def find_rank(name: str, config: LoSiAConfig) -> float | Factors:
    """The rank factor of the module ``name``: of the first in ``config.rank_pattern`` that
    matches, or the config's."""
    patterns = config.rank_pattern.items()
    return next((f for pattern, f in patterns if has_rank(name, pattern)), config.rank_factor)


def has_rank(name: str, pattern: str) -> bool:
    """Whether a key of ``rank_pattern`` means the module ``name``."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def find_factors(
    model: nn.Module, name: str, features: tuple[int, int], config: LoSiAConfig
) -> Factors:
    """The factors of the linear ``name`` with ``features = (out, in)``.

    A square subnet takes p of both sides. A wide one trains as many values: half of the side that
    is the residual stream and ``2 p**2`` of the other, as long as p is below a half.

    Raises:
        ValueError: ``shape="wide"``, and neither the model's config nor the layer's name tells
            which side is the residual stream.
    """
    p = find_rank(name, config)
    if isinstance(p, (tuple, list)):
        return p[0], p[1]
    if config.shape == "square" or p >= WIDE:
        return p, p
    narrow = p * p / WIDE
    return (WIDE, narrow) if _writes_stream(model, name, features) else (narrow, WIDE)


def _writes_stream(model: nn.Module, name: str, features: tuple[int, int]) -> bool:
    streams = _stream_sizes(model)
    writes, reads = (size in streams for size in features)
    if writes and reads:
        return name.rpartition(".")[2] in WRITERS
    if not (writes or reads):
        raise ValueError(
            f"{name}: LoSiAConfig.shape='wide' takes half of the residual stream, but neither of "
            f"the layer's {features[0]} outputs and {features[1]} inputs is the model's "
            f"hidden_size ({', '.join(map(str, sorted(streams))) or 'unknown'}); give the layer a "
            f"pair (p_out, p_in) in rank_pattern, or use shape='square'"
        )
    return writes


def _stream_sizes(model: nn.Module) -> set[int]:
    """Every ``hidden_size`` of the model's config and of the configs inside it."""
    config = getattr(model, "config", None)
    configs = [config, *vars(config).values()] if hasattr(config, "__dict__") else []
    found = (getattr(each, "hidden_size", None) for each in configs)
    return {size for size in found if isinstance(size, int)}
