"""What ``apply_losia`` would replace: which modules, in which groups, with which factors. Changes
nothing."""

import re
import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import LoSiAConfig
from .foreign import check_forward, check_not_quantized
from .linear import LoSiAConv1D, LoSiALinear
from .module import Membership
from .shapes import find_factors, has_rank
from .subnet import subnet_size

KINDS: dict[str, type[LoSiALinear]] = {  # what a module becomes, by its exact class
    "torch.nn.modules.linear.Linear": LoSiALinear,
    "transformers.pytorch_utils.Conv1D": LoSiAConv1D,
}


@dataclass(frozen=True)
class Target:
    """A module that is to train a subnet of ``factors = (p_out, p_in)``."""

    name: str
    module: Any
    factors: tuple[float, float]
    membership: Membership


@dataclass(frozen=True)
class Plan:
    """All targets in the order in which their subnets are drawn, what is trained densely beside
    them, the name of the output layer, trained or not, and linears that lie outside of the blocks
    and are no targets for that."""

    targets: list[Target]
    saved: list[nn.Module]
    output_layer: str | None
    blocks: list[str]
    outside: list[str]


def find_targets(model: nn.Module, config: LoSiAConfig, output_layer: str | None = None) -> Plan:
    """Choose as ``config`` says; ``output_layer`` names the vocabulary projection of a model
    without ``get_output_embeddings``.

    Raises:
        ValueError: nothing matches, a name or the output layer cannot be found, or a target is
            quantized, is no plain linear or shares its weight with another.
    """
    modules = named_modules(model)
    output_name = _find_output_layer(model, output_layer, config)
    names = _find_names(model, config, output_name)
    if config.target_modules == "all-linear":
        names = _leave_out_small(model, names, config)
    saved = _find_modules_to_save(model, config)
    targets: list[Target] = []
    if output_name is not None and config.output_dim_factor > 0:
        group = None if config.output_dim_factor == 1 else 0
        place = Membership(group, output_name, config, is_output=True)
        factors = config.output_dim_factor, 1.0
        targets.append(Target(output_name, modules[output_name], factors, place))
    first = sum(target.membership.group is not None for target in targets)
    blocks = group_by_block(model, names, config.target_modules != "all-linear")
    for number, (block, members) in enumerate(blocks.items(), start=first):
        for name in members:
            place = Membership(number, block, config)
            factors = find_factors(model, name, features_of(modules[name]), config)
            targets.append(Target(name, modules[name], factors, place))
    check_shared_weights(model, [target.name for target in targets], saved)
    for target in targets:
        check_forward(target.name, target.module)
    grouped = {name for members in blocks.values() for name in members}
    outside = [name for name in names if name not in grouped]
    return Plan(targets, [modules[name] for name in saved], output_name, list(blocks), outside)


def matches(name: str, patterns: str | list[str] | tuple[str, ...] | None) -> bool:
    """PEFT's rule: a string is a regex for the whole name; a list holds names or their last
    components."""
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def plain_name(name: str) -> str:
    """A module's name without what torch.compile adds to it."""
    return re.sub(r"(^|\.)_orig_mod(?=\.|$)", "", name).removeprefix(".")


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """``model.named_modules()`` by plain names."""
    return {plain_name(name): module for name, module in model.named_modules()}


def kind_of(module: nn.Module) -> type[LoSiALinear] | None:
    """What ``module`` becomes; None if it can hold no subnet."""
    return KINDS.get(f"{type(module).__module__}.{type(module).__qualname__}")


def features_of(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of a module that can hold a subnet."""
    kind = kind_of(module)
    assert kind is not None
    return kind.features_of(module)


def output_name_of(model: nn.Module) -> str | None:
    """The name of what ``get_output_embeddings`` gives; None without one."""
    get = getattr(model, "get_output_embeddings", None)
    found = get() if get is not None else None
    named = named_modules(model).items()
    return next((name for name, module in named if module is found), None)


def _find_output_layer(model: nn.Module, named: str | None, config: LoSiAConfig) -> str | None:
    """The name of the vocabulary projection; None if there is none and none is asked for."""
    modules = named_modules(model)
    if named is not None and named not in modules:
        raise ValueError(f"apply_losia: the model has no module {named!r} (output_layer)")
    name = output_name_of(model) if named is None else named
    found = None if name is None else modules[name]
    if type(found) is nn.Linear:
        return name
    if config.output_dim_factor > 0 or named is not None:
        raise ValueError(
            f"apply_losia: output_dim_factor={config.output_dim_factor} needs a plain nn.Linear "
            f"output layer, found {type(found).__name__}; name it with output_layer=, or leave "
            f"output_dim_factor at 0"
        )
    return None


def _find_names(model: nn.Module, config: LoSiAConfig, output_name: str | None) -> list[str]:
    everything = config.target_modules == "all-linear"
    listed = not isinstance(config.target_modules, str)
    frozen = listed and config.output_dim_factor == 0
    if frozen and output_name and matches(output_name, config.target_modules):
        raise ValueError(
            f"apply_losia: target_modules names {output_name!r}, the output layer, but it is "
            f"trained by output_dim_factor, the share of its outputs, which is 0"
        )
    left_out = (config.exclude_modules, config.modules_to_save)
    targets = []
    for name, module in named_modules(model).items():
        wanted = name and name != output_name
        wanted = wanted and (everything or matches(name, config.target_modules))
        if not wanted or any(matches(name, patterns) for patterns in left_out):
            continue
        check_not_quantized(name, module)
        if kind_of(module) is not None:
            targets.append(name)
        elif not everything:
            computed = isinstance(module, nn.Linear)
            hint = "; its weight is quantized or computed" if computed else ""
            raise ValueError(
                f"apply_losia: target_modules matches {name!r}, a {type(module).__name__}, but "
                f"only a plain nn.Linear can hold a subnet{hint}; exclude it with exclude_modules"
            )
    if not targets:
        weighted = [m for m in model.modules() if getattr(m, "weight", None) is not None]
        kinds = sorted({type(module).__name__ for module in weighted})
        raise ValueError(
            f"apply_losia: target_modules={config.target_modules!r} matches no nn.Linear; "
            f"the modules with a weight are of type {', '.join(kinds) or 'none'}"
        )
    return targets


def _leave_out_small(model: nn.Module, names: list[str], config: LoSiAConfig) -> list[str]:
    """Without the linears of which the factor selects no neuron, as a router's gate or a head of
    one output, unless all are such or ``rank_pattern`` names one: a warning names them."""
    small: dict[str, ValueError] = {}
    modules = named_modules(model)
    for name in names:
        features = features_of(modules[name])
        factors = find_factors(model, name, features, config)
        try:
            for factor, size in zip(factors, features, strict=True):
                subnet_size(factor, size, name, config.alignment)
        except ValueError as error:
            if any(has_rank(name, pattern) for pattern in config.rank_pattern):
                raise
            small[name] = error
    if len(small) == len(names):
        share = " (of that side a wide subnet takes 2 p^2)" if config.shape == "wide" else ""
        first = next(iter(small.values()))
        raise ValueError(f"rank_factor {config.rank_factor:g} is too small: {first}{share}")
    if small:
        warnings.warn(
            f"LoSiA: {', '.join(small)}: too small for a subnet at a rank factor of "
            f"{config.rank_factor}, so frozen; give them a factor in rank_pattern, name them in "
            f"modules_to_save to train them in full, or in exclude_modules if not",
            stacklevel=4,
        )
    return [name for name in names if name not in small]


def group_by_block(
    model: nn.Module, targets: list[str], keep_outside: bool
) -> dict[str, list[str]]:
    """Targets by the block that holds them, in model order.

    A block is a child of an outermost ModuleList (of a Sequential in a model without one) that
    holds targets; a model with neither is one block.

    Args:
        keep_outside: a target outside all blocks is a group of its own; else no target.
    """
    containers: list[str] = []
    for kind in (nn.ModuleList, nn.Sequential):
        for name, module in named_modules(model).items():
            inside = any(_is_within(name, container) for container in containers)
            holds = any(_is_within(target, name) for target in targets)
            if isinstance(module, kind) and not inside and holds:
                containers.append(name)
        if containers:
            break
    if not containers:
        return {"model": targets}
    blocks: dict[str, list[str]] = {}
    for target in targets:
        container = next((c for c in containers if _is_within(target, c)), None)
        if container is not None:
            depth = container.count(".") + 2 if container else 1
            blocks.setdefault(".".join(target.split(".")[:depth]), []).append(target)
        elif keep_outside:
            blocks[target] = [target]
    return blocks


def _is_within(name: str, container: str) -> bool:
    return name.startswith(container + ".") if container else bool(name)


def _find_modules_to_save(model: nn.Module, config: LoSiAConfig) -> list[str]:
    names = [name for name in named_modules(model) if matches(name, config.modules_to_save)]
    for wanted in config.modules_to_save or []:
        if not any(matches(name, [wanted]) for name in names):
            raise ValueError(
                f"apply_losia: modules_to_save names {wanted!r}, but the model has no such module"
            )
    return names


def check_shared_weights(model: nn.Module, names: list[str], saved: list[str]) -> None:
    """Raise ValueError for one storage under two subnets, or under a subnet and a dense update: it
    would be written by both."""
    modules: dict[str, Any] = named_modules(model)
    owner: dict[int, str] = {}
    for name in names:
        first = owner.setdefault(id(modules[name].weight), name)
        if first != name:
            raise ValueError(
                f"apply_losia: {first!r} and {name!r} share one weight; exclude one with "
                f"exclude_modules"
            )
    for name in saved:
        for parameter in modules[name].parameters():
            if id(parameter) in owner:
                raise ValueError(
                    f"apply_losia: {name!r} (modules_to_save) shares its weight with "
                    f"{owner[id(parameter)]!r}, which has a subnet; train it one way only"
                )
