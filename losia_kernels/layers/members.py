"""Which of a model's layers train, and each one's place in the timeline: given by ``apply_losia`` or
by PEFT, or found here for layers that were placed by hand."""

from typing import Any

from torch import nn

from ..config import LoSiAConfig
from ..parallel.engines import check_engines
from ..parallel.placement import holds_values
from .module import Membership, SubnetModule, losia_layers
from .targets import check_shared_weights, group_by_block, output_name_of, plain_name
from .unchanged import check_unchanged


def find_members(
    model: nn.Module, config: LoSiAConfig | None = None
) -> dict[SubnetModule, Membership]:
    """The layers that train and their places, in model order; nothing is noted on them yet.

    Layers placed by hand take turns by blocks as in ``apply_losia``, of a model without any one
    after the other, the output layer first; those that train in full have no turn.

    Args:
        config: of layers placed by hand; None is the one they have, or ``LoSiAConfig()``.

    Raises:
        ValueError: there are none; some were converted and others placed by hand; the converted
            ones have another config; or what was placed by hand cannot be trained.
        TypeError: ``config`` is no LoSiAConfig.
    """
    if config is not None and not isinstance(config, LoSiAConfig):
        raise TypeError(f"config must be a LoSiAConfig, got {type(config).__name__}")
    named = {plain_name(name): layer for name, layer in losia_layers(unwrapped(model))}
    check_engines(model)
    given = {
        layer: layer.membership
        for layer in named.values()
        if layer.membership is not None and not layer.membership.by_hand
    }
    placed = {
        name: layer
        for name, layer in named.items()
        if layer.adoptable and (layer.membership is None or layer.membership.by_hand)
    }
    if given and placed:
        name, layer = next(iter(placed.items()))
        raise ValueError(
            f"{name}: a {type(layer).__name__} placed by hand beside those that apply_losia or "
            f"PEFT made; convert the whole model at once, or place all by hand"
        )
    if not given and not placed:
        raise ValueError(
            "the model has no layers to train: call apply_losia(model, config) first, or place "
            "LoSiALinears in it"
        )
    if placed:
        return _find_places(unwrapped(model), placed, config)
    if config not in (None, next(iter(given.values())).config):
        raise ValueError(
            "config: apply_losia (or PEFT) has been given one already; leave it out, or call "
            "remove_losia and apply_losia(model, config)"
        )
    check_unchanged(unwrapped(model), given)
    return given


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    inner = getattr(model, "_orig_mod", None)
    return model if inner is None else unwrapped(inner)


def _find_places(
    model: nn.Module, placed: dict[str, SubnetModule], config: LoSiAConfig | None
) -> dict[SubnetModule, Membership]:
    before = next((layer.membership for layer in placed.values() if layer.membership), None)
    config = config or (before.config if before else LoSiAConfig())
    for name, layer in placed.items():
        layer.name = name or layer.name
    check_unchanged(model, placed.values())
    for layer in placed.values():
        _check_placed(layer)
    check_shared_weights(model, list(placed), [])
    output = output_name_of(model)
    full = {name for name, layer in placed.items() if layer.subnet.shape == layer.matrix.shape}
    turns = [name for name in placed if name not in full]
    blocks = group_by_block(model, [name for name in turns if name != output], keep_outside=True)
    if list(blocks) == ["model"]:  # no blocks
        blocks = {name: [name] for name in blocks["model"]}
    if output in turns:
        blocks = {str(output): [str(output)], **blocks}
    groups = {
        name: (number, block)
        for number, (block, names) in enumerate(blocks.items())
        for name in names
    }
    places: dict[SubnetModule, Membership] = {}
    for name, layer in placed.items():
        group, block = groups.get(name, (None, name))
        places[layer] = Membership(group, block, config, name == output, by_hand=True)
    return places


def _check_placed(layer: Any) -> None:
    """Raise ValueError for a layer that something has made without its indices."""
    if not holds_values(layer.out_idx, layer.in_idx):
        return
    try:
        layer.current_subnet.check(
            (layer.out_features, layer.in_features), layer.name, layer.alignment
        )
    except ValueError as error:
        raise ValueError(
            f"{error}. Was the model made without its data, as from_pretrained makes what a "
            f"checkpoint lacks? Place the layers after loading, by LoSiALinear.from_linear"
        ) from None


def join_(members: dict[SubnetModule, Membership]) -> None:
    """Note each layer's place on it."""
    for layer, member in members.items():
        if member.by_hand:
            layer.membership = member
