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
    is the residual stream and ``2 p**2`` of the other, as long as p is below a half. A layer of
    which neither side is the stream, as between the two halves of a low-rank projection, is square,
    and so is one whose other side is too short.
    """
    p = find_rank(name, config)
    if isinstance(p, (tuple, list)):
        return p[0], p[1]
    if config.shape == "square" or p >= WIDE:
        return p, p
    writes, reads = (size in stream_sizes(model) for size in features)
    if writes and reads:
        writes = name.rpartition(".")[2] in WRITERS
    elif not (writes or reads):
        return p, p
    factors = wide_factors(p, writes)
    if int(factors[writes] * features[writes]) < config.alignment:  # of the other side
        return p, p
    return factors


def wide_factors(p: float, writes: bool) -> Factors:
    """Of a layer that writes the residual stream, or reads it; ``p`` below a half."""
    narrow = p * p / WIDE
    return (WIDE, narrow) if writes else (narrow, WIDE)


def stream_sizes(model: nn.Module) -> set[int]:
    """How long the model's residual streams may be: every ``hidden_size`` of its config and of the
    configs inside that, and the size of each embedding."""
    config = getattr(model, "config", None)
    configs = [config, *vars(config).values()] if hasattr(config, "__dict__") else []
    found = [getattr(each, "hidden_size", None) for each in configs]
    found += [m.embedding_dim for m in model.modules() if isinstance(m, nn.Embedding)]
    return {size for size in found if isinstance(size, int)}
