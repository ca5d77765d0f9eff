"""Turn a model's linears into LoSiALinears, in place, and back."""

import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LoSiAConfig
from ..parallel.ranks import fingerprint, several_processes
from .fused_loss import fuse_loss, unfuse_loss
from .linear import LoSiAConv1D, LoSiALinear, losia_layers
from .targets import refuse_quantized

SUBNET_KEYS = ("subnet", "out_idx", "in_idx")
SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


@dataclass(frozen=True)
class Membership:
    """What ``apply_losia`` notes on each LoSiALinear as ``layer.losia``: its group in the timeline.

    ``group`` None: trained densely, without a slot. ``is_output``: the vocabulary projection.
    """

    group: int | None
    group_name: str
    config: LoSiAConfig
    is_output: bool = False


def matches(name: str, patterns: str | list[str] | tuple[str, ...] | None) -> bool:
    """PEFT's rule: a string is a regex for the whole name; a list holds names or their last
    components."""
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def apply_losia(
    model: nn.Module, config: LoSiAConfig | None = None, output_layer: str | None = None
) -> nn.Module:
    """Replace the target linears of ``model`` by LoSiALinears, in place; freeze all that is not
    trained.

    A target is an nn.Linear or GPT-2's Conv1D. Other weights in the blocks (a mixture's fused
    experts) stay frozen, as a warning says. Groups follow the model's blocks in order (Section
    3.3). ``output_layer`` names the vocabulary projection of a model without
    ``get_output_embeddings``; it is trained as ``config.output_dim_factor`` says and comes first.
    Initial subnets are drawn from ``config.seed``, the same in every process. Returns the model.

    Raises ValueError if nothing matches, if a name or the output layer cannot be found, if a target
    is quantized, is no plain linear or shares its weight with another target, if the model holds
    PEFT adapters, or if a rank factor selects no neuron; the model is then as it was. Warns of
    patterns in ``exclude_modules`` and ``rank_pattern`` that match nothing.
    """
    config = LoSiAConfig() if config is None else config
    if not isinstance(config, LoSiAConfig):
        raise TypeError(f"apply_losia: config must be a LoSiAConfig, got {type(config).__name__}")
    if next(losia_layers(model), None) is not None:
        raise ValueError("apply_losia: the model has LoSiALinears already; call remove_losia first")
    _refuse_adapters(model)
    output_name = _find_output_layer(model, output_layer, config)
    targets = _find_targets(model, config, output_name)
    blocks = group_by_block(model, targets, config)
    saved = _find_modules_to_save(model, config)

    generator = torch.Generator().manual_seed(config.seed)
    planned: list[tuple[str, tuple[float, float], Membership]] = []
    if output_name is not None and config.output_dim_factor > 0:
        dense = config.output_dim_factor == 1
        group = None if dense else 0
        planned.append(
            (
                output_name,
                (config.output_dim_factor, 1.0),
                Membership(group, output_name, config, True),
            )
        )
    first = sum(member.group is not None for _, _, member in planned)
    for number, (block, names) in enumerate(blocks.items(), start=first):
        for name in names:
            factor = find_rank_factor(name, config)
            planned.append((name, (factor, factor), Membership(number, block, config)))
    refuse_shared_weights(model, [name for name, _, _ in planned], saved)

    modules: dict[str, Any] = _named_modules(model)
    was_trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers = []
    try:
        for name, factors, member in planned:
            kind = layer_class(modules[name])
            assert kind is not None  # of a target
            layer = kind.from_linear(
                modules[name],
                factors,
                master=config.master_weights,
                generator=generator,
                name=name,
                alignment=config.alignment,
            )
            layer.losia = member
            layer.fingerprint = fingerprint(layer.weight) if several_processes() else None
            layers.append((name, layer))
    except ValueError:
        for parameter, requires_grad in was_trained:
            parameter.requires_grad_(requires_grad)
        raise
    _share_inputs(dict(layers))
    model.requires_grad_(False)
    _replace(model, {modules[name]: layer for name, layer in layers})
    for name in saved:
        modules[name].requires_grad_(True)
    with_matrices = [
        name
        for name, module in modules.items()
        if any(p.dim() > 1 for p in module.parameters(False))
    ]
    _tell_what_matches_nothing([name for name, _, _ in planned], with_matrices, config)
    if config.target_modules == "all-linear":
        _tell_what_stays_frozen(model, blocks, config)
    if config.fused_loss and output_name is not None:
        fuse_loss(model, output_name)
    return model


def remove_losia(model: nn.Module) -> nn.Module:
    """Turn every LoSiALinear back into an nn.Linear, in place: the original architecture with the
    trained weights."""
    unfuse_loss(model)
    layers = [layer for _, layer in losia_layers(model)]
    _finish_steps(layers)
    _replace(model, {layer: layer.to_linear() for layer in layers})
    return model


def export_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` with the original model's keys and nothing else (DDP and compile
    prefixes dropped)."""
    named = model.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in named if isinstance(module, LoSiALinear)}
    _finish_steps(layers.values())
    extra = {f"{name}.{key}" for name in layers for key in SUBNET_KEYS}
    inner = getattr(model, "_orig_mod", model)  # torch.compile around DDP, or the other way round
    prefix = "module." if isinstance(inner, nn.parallel.DistributedDataParallel) else ""
    return {
        key.replace("_orig_mod.", "").removeprefix(prefix): value
        for key, value in model.state_dict().items()
        if key not in extra
    }


def _finish_steps(layers: Iterable[LoSiALinear]) -> None:
    """Write back what an optimizer that knows nothing of the weight has stepped."""
    for layer in layers:
        layer.settle_(finish=True)


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained but are no subnet (``modules_to_save``)."""
    subnets = {id(layer.subnet) for _, layer in losia_layers(model)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in subnets:
            yield name, parameter


def _share_inputs(layers: dict[str, LoSiALinear]) -> None:
    """Let layers that read one input keep it whole, once, where the parts that they would gather
    are no smaller.

    Which do is known from their names: a guess that is wrong keeps what plain linears would have
    kept, and no more.
    """
    for parent in {name.rpartition(".")[0] for name in layers}:
        for names in SHARED_INPUTS:
            sharers = [
                layers[full]
                for name in names
                if (full := f"{parent}.{name}".removeprefix(".")) in layers
            ]
            if len(sharers) > 1 and len({layer.in_features for layer in sharers}) == 1:
                keeps = sum(layer.subnet.shape[1] for layer in sharers) >= sharers[0].in_features
                for layer in sharers:
                    layer.keeps_input = keeps


# what to replace ----------------------------------------------------------------------------------


def _named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """``model.named_modules()`` without what torch.compile adds to the names."""
    return {
        re.sub(r"(^|\.)_orig_mod(?=\.|$)", "", name).removeprefix("."): m
        for name, m in model.named_modules()
    }


def layer_class(module: nn.Module) -> type[LoSiALinear] | None:
    """What ``module`` becomes; None if it can hold no subnet."""
    if type(module) is nn.Linear:
        return LoSiALinear
    conv1d = getattr(
        sys.modules.get("transformers.pytorch_utils"), "Conv1D", None
    )  # a model of it has imported it
    return LoSiAConv1D if type(module) is conv1d else None


def _refuse_adapters(model: nn.Module) -> None:
    """An adapter's own linears are no targets, and under it the weight would be trained twice."""
    adapter = getattr(
        sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None
    )  # imported if there is one
    for name, module in model.named_modules():
        if adapter is not None and isinstance(module, adapter):
            raise ValueError(
                f"apply_losia: {name!r} holds a PEFT adapter: give the plain model (merge_and_unload() "
                f"makes one), or use LoSiAPeftConfig in the place of the adapter's config"
            )


def _find_output_layer(model: nn.Module, named: str | None, config: LoSiAConfig) -> str | None:
    """The name of the vocabulary projection; None if there is none and none is asked for."""
    modules = _named_modules(model)
    if named is not None:
        if named not in modules:
            raise ValueError(f"apply_losia: the model has no module {named!r} (output_layer)")
        found: Any = modules[named]
    else:
        get = getattr(model, "get_output_embeddings", None)
        found = get() if get is not None else None
    if type(found) is not nn.Linear:
        if config.output_dim_factor > 0 or named is not None:
            raise ValueError(
                f"apply_losia: output_dim_factor={config.output_dim_factor} needs a plain nn.Linear output layer, "
                f"found {type(found).__name__}; name it with output_layer=, or leave output_dim_factor at 0"
            )
        return None
    return next(name for name, module in modules.items() if module is found)


def _find_targets(model: nn.Module, config: LoSiAConfig, output_name: str | None) -> list[str]:
    everything = config.target_modules == "all-linear"
    listed = not isinstance(config.target_modules, str)
    if (
        listed
        and config.output_dim_factor == 0
        and output_name
        and matches(output_name, config.target_modules)
    ):
        raise ValueError(
            f"apply_losia: target_modules names {output_name!r}, the output layer, but it is trained by "
            f"output_dim_factor, the share of its outputs, which is 0"
        )
    left_out = (config.exclude_modules, config.modules_to_save)
    targets = []
    for name, module in _named_modules(model).items():
        wanted = everything or matches(name, config.target_modules)
        if (
            not wanted
            or not name
            or name == output_name
            or any(matches(name, patterns) for patterns in left_out)
        ):
            continue
        refuse_quantized(name, module)
        if layer_class(module) is not None:
            targets.append(name)
        elif not everything:
            hint = "; its weight is quantized or computed" if isinstance(module, nn.Linear) else ""
            raise ValueError(
                f"apply_losia: target_modules matches {name!r}, a {type(module).__name__}, but only a plain nn.Linear "
                f"can hold a subnet{hint}; exclude it with exclude_modules"
            )
    if not targets:
        kinds = sorted(
            {type(m).__name__ for m in model.modules() if getattr(m, "weight", None) is not None}
        )
        raise ValueError(
            f"apply_losia: target_modules={config.target_modules!r} matches no nn.Linear; "
            f"the modules with a weight are of type {', '.join(kinds) or 'none'}"
        )
    return targets


def group_by_block(
    model: nn.Module, targets: list[str], config: LoSiAConfig
) -> dict[str, list[str]]:
    """Targets by the block that holds them, in model order.

    A block is a child of an outermost ModuleList (of a Sequential in a model without one) that
    holds targets; a model with neither is one block. A target outside all blocks is its own group
    if it was named, else not a target.
    """
    containers: list[str] = []
    for kind in (nn.ModuleList, nn.Sequential):
        for name, module in _named_modules(model).items():
            inside = any(_is_within(name, container) for container in containers)
            if (
                isinstance(module, kind)
                and not inside
                and any(_is_within(target, name) for target in targets)
            ):
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
        elif config.target_modules != "all-linear":
            blocks[target] = [target]
    return blocks


def _is_within(name: str, container: str) -> bool:
    return name.startswith(container + ".") if container else bool(name)


def find_rank_factor(name: str, config: LoSiAConfig) -> float:
    """The rank factor of the module ``name``: of the first in ``config.rank_pattern`` that matches,
    or the config's."""
    return next(
        (f for pattern, f in config.rank_pattern.items() if _has_rank(name, pattern)),
        config.rank_factor,
    )


def _has_rank(name: str, pattern: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def _find_modules_to_save(model: nn.Module, config: LoSiAConfig) -> list[str]:
    names = [name for name in _named_modules(model) if matches(name, config.modules_to_save)]
    for wanted in config.modules_to_save or []:
        if not any(matches(name, [wanted]) for name in names):
            raise ValueError(
                f"apply_losia: modules_to_save names {wanted!r}, but the model has no such module"
            )
    return names


def refuse_shared_weights(model: nn.Module, names: list[str], saved: list[str]) -> None:
    """One storage under two subnets, or under a subnet and a dense update, would be written by
    both."""
    modules = _named_modules(model)
    owner: dict[int, str] = {}
    for name in names:
        first = owner.setdefault(id(modules[name].weight), name)
        if first != name:
            raise ValueError(
                f"apply_losia: {first!r} and {name!r} share one weight; exclude one with exclude_modules"
            )
    for name in saved:
        for parameter in modules[name].parameters():
            if id(parameter) in owner:
                raise ValueError(
                    f"apply_losia: {name!r} (modules_to_save) shares its weight with {owner[id(parameter)]!r}, which "
                    f"has a subnet; train it one way only"
                )


def _tell_what_matches_nothing(targets: list[str], modules: list[str], config: LoSiAConfig) -> None:
    excluded = config.exclude_modules or []
    unmatched = [
        *(
            ("exclude_modules", pattern)
            for pattern in ([excluded] if isinstance(excluded, str) else excluded)
            if not any(
                matches(name, excluded if isinstance(excluded, str) else [pattern])
                for name in modules
            )
        ),
        *(
            ("rank_pattern", pattern)
            for pattern in config.rank_pattern
            if not any(_has_rank(name, pattern) for name in targets)
        ),
    ]
    for option, pattern in unmatched:
        what = "module with a weight" if option == "exclude_modules" else "trained layer"
        warnings.warn(f"LoSiA: {option} names {pattern!r}, which matches no {what}", stacklevel=3)


def _tell_what_stays_frozen(
    model: nn.Module, blocks: dict[str, list[str]], config: LoSiAConfig
) -> None:
    """Warn, with names, of matrices inside the blocks that can hold no subnet: fused experts,
    routers, convolutions."""
    inside = tuple(f"{block}." for block in blocks)
    frozen: dict[str, int] = {}
    trainable = 0
    for name, module in _named_modules(model).items():
        if (
            not name.startswith(inside)
            or isinstance(module, nn.Embedding)
            or matches(name, config.exclude_modules)
        ):
            continue
        matrices = {key: p for key, p in module.named_parameters(recurse=False) if p.dim() > 1}
        if isinstance(module, LoSiALinear):
            trainable += module.weight.numel()
        elif matrices and not any(p.requires_grad for p in matrices.values()):
            kind = f"{re.sub(r'[.][0-9]+(?=[.])', '.*', name)} ({type(module).__name__}: {', '.join(matrices)})"
            frozen[kind] = frozen.get(kind, 0) + sum(p.numel() for p in matrices.values())
    if frozen:
        share = sum(frozen.values()) / (sum(frozen.values()) + trainable)
        warnings.warn(
            f"LoSiA: {share:.1%} of the blocks' weights stay frozen, for only linear layers can hold a subnet: "
            f"{'; '.join(frozen)}. Name them in modules_to_save to train them in full, in exclude_modules if not",
            stacklevel=3,
        )


def _replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put ``new[module]`` wherever ``module`` is: it may be registered under several names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])
