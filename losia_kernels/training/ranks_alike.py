"""What every rank must have alike: config and weights before the first step, then step and places."""

import warnings
from collections.abc import Iterable
from dataclasses import asdict

from torch import nn

from ..config import LoSiAConfig
from ..layers.module import SubnetModule, losia_layers
from ..parallel.placement import fingerprint
from ..parallel.ranks import Ranks, RanksDifferError


def check_same_start(ranks: Ranks, config: LoSiAConfig, model: nn.Module) -> None:
    """Raise RanksDifferError unless every rank has the same config and the same weights; warn if
    only since the conversion."""
    if ranks.size == 1:
        return
    fields = {f"LoSiAConfig.{name}": value for name, value in asdict(config).items()}
    named = dict(losia_layers(model))
    converted = {f"{name}.weight": layer.fingerprint for name, layer in named.items()}
    weights = {name: fingerprint(p) for name, p in model.named_parameters()}
    unread = {name for name, value in weights.items() if value is None} & converted.keys()
    ranks.check_same(fields, weights | {name: converted[name] for name in unread})
    try:
        ranks.check_same({}, converted)
    except RanksDifferError as error:
        warnings.warn(
            f"LoSiA: as apply_losia found them, {error}; now they are the same", stacklevel=5
        )


def check_same_position(ranks: Ranks, step: int, layers: Iterable[SubnetModule]) -> None:
    """Raise RanksDifferError unless every rank is at the same step with the same subnets."""
    if ranks.size > 1:
        subnets = {
            f"{layer.name}: {key}": fingerprint(getattr(layer, key))
            for layer in layers
            for key in ("out_idx", "in_idx")
        }
        ranks.check_same({"the step": step}, subnets)
