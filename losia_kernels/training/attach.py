"""attach(): what LoSiAAdamW's step does, for any torch optimizer that holds the subnets."""

import warnings
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import LoSiAConfig
from ..layers.members import find_members
from ..layers.module import Membership, SubnetModule
from ..parallel.placement import local
from .checks import only_makes_state
from .optimizer import LoSiAAdamW
from .state_dict import TimelineState
from .timeline import Timeline


def attach(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    total_steps: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    config: LoSiAConfig | None = None,
) -> Timeline:
    """Give any torch optimizer that holds the model's subnets the behaviour of LoSiAAdamW's step.

    Each of its steps then writes the subnets back into the weights, relocalizes and rewarms. Its
    parameter groups are split by layer group (same options), so call this before making a
    learning-rate scheduler. A relocalized subnet's state is dropped, and the optimizer makes it
    anew. A step that GradScaler makes a fused optimizer skip is none of the clock's.

    Args:
        optimizer: new, without a scheduler.
        model, total_steps, process_group, config: as for LoSiAAdamW.

    Returns:
        The timeline, which is also ``optimizer.timeline``; its ``detach()`` undoes the hooks.

    Raises:
        ValueError: having changed nothing, the optimizer lacks a subnet, drives the subnets already
            (LoSiAAdamW, a second attach), has a scheduler, has stepped, or sets its own learning
            rate, which cannot be rewarmed; or ``master="split"``, which is LoSiAAdamW's.
        TypeError: it is no torch optimizer.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"attach: expected the optimizer, then the model; got {type(optimizer).__name__} first"
        )
    members = find_members(model, config)
    check_attachable(optimizer, members)
    timeline = Timeline(model, total_steps, process_group, config)
    if any(member.config.master == "none" for member in members.values()):
        warnings.warn(
            f"LoSiA: {type(optimizer).__name__} rounds subnets that are kept in 16 bits to "
            f"nearest, which loses small updates: keep LoSiAConfig.master='float32', or use "
            f"LoSiAAdamW, which rounds stochastically",
            stacklevel=2,
        )
    optimizer.timeline = timeline  # type: ignore[attr-defined]
    _split_groups(optimizer, timeline)

    makes_state = False
    forget = partial(_forget, optimizer, timeline.config.reset_step)

    def rewarm(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        nonlocal makes_state
        makes_state = only_makes_state(optimizer)
        timeline.check_step(optimizer)
        timeline.forget_moved(forget, timeline.layers)
        for layer in timeline.layers:
            layer.sync_(finish=True)
        for group in optimizer.param_groups:
            # a step that raised has left it rewarmed
            group["lr"] = group.pop("scheduled_lr", group["lr"])
            group["scheduled_lr"] = group["lr"]
            if group.get("layer_group") is not None:  # one added later has none
                group["lr"] = group["lr"] * timeline.lr_factor(group["layer_group"])

    def write_back(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group.pop("scheduled_lr")
        found_inf = getattr(optimizer, "found_inf", None)
        # there for the time of a GradScaler's step: the optimizer has changed nothing
        if makes_state or (found_inf is not None and bool(found_inf)):
            return
        timeline.check_first_step()
        for layers in [*timeline.groups, timeline.dense]:
            timeline.placement.write_back_(layers)
        with torch.no_grad():
            timeline.advance(forget)

    def join_groups() -> None:
        for group in optimizer.param_groups:
            group.pop("layer_group", None)

    state = TimelineState(timeline, optimizer)
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        state.load_around(optimizer)
    timeline.handles += [
        optimizer.register_step_pre_hook(rewarm),
        optimizer.register_step_post_hook(write_back),
        SimpleNamespace(remove=join_groups),
    ]
    return timeline


def check_attachable(
    optimizer: torch.optim.Optimizer, members: Mapping[SubnetModule, Membership]
) -> None:
    """Raise ValueError for an optimizer that ``attach`` cannot give the behaviour."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer, member in members.items():
        if layer.subnet.requires_grad and id(layer.subnet) not in held:
            raise ValueError(
                f"attach: the optimizer does not hold the subnet of {layer.name}; make it from the "
                f"model's parameters when its layers are in place, after apply_losia"
            )
        if member.config.master == "split":
            raise ValueError(
                f"attach: LoSiAConfig.master='split' keeps half of each value in LoSiAAdamW's "
                f"state, which {type(optimizer).__name__} does not have; use 'float32'"
            )
    driven = any("layer_group" in group for group in optimizer.param_groups)
    if isinstance(optimizer, LoSiAAdamW) or driven:
        raise ValueError("attach: the optimizer drives the subnets already")
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise ValueError(
            "attach: the optimizer has a learning-rate scheduler already; attach first, then make it"
        )
    if optimizer.state:
        raise ValueError(
            "attach: the optimizer has taken steps already; attach before the first one"
        )
    if any(group["lr"] is None for group in optimizer.param_groups):
        raise ValueError(
            f"attach: {type(optimizer).__name__} sets its own learning rate, which cannot be "
            f"rewarmed; give it one (transformers' Adafactor: relative_step=False, lr=...)"
        )


def _split_groups(optimizer: torch.optim.Optimizer, timeline: Timeline) -> None:
    """A parameter group for each layer group in it, and one for the rest."""
    number_of = {
        id(layer.subnet): number
        for number, layers in enumerate(timeline.groups)
        for layer in layers
    }
    split: list[dict] = []
    for group in optimizer.param_groups:
        places = [number_of.get(id(parameter)) for parameter in group["params"]]
        for number in [*range(len(timeline.groups)), None]:
            here = [i for i, place in enumerate(places) if place == number]
            per_parameter: dict[str, list] = {  # of an optimizer that was given names, those too
                key: [group[key][i] for i in here]
                for key in ("params", "param_names")
                if key in group
            }
            if here:
                split.append({**group, **per_parameter, "layer_group": number})
    optimizer.param_groups[:] = split
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's: schedulers fill it in place
            group["lr"] = group["lr"].clone()


def _forget(optimizer: torch.optim.Optimizer, reset_step: bool, subnet: Tensor) -> None:
    """Drop the moments of the old subnet; with ``reset_step`` everything, so that the step count
    restarts too.

    Raises ValueError, naming the optimizer, for moments that zeros do not stand for: quantized
    ones.
    """
    if reset_step:
        optimizer.state.pop(subnet, None)
        return
    for key, value in optimizer.state.get(subnet, {}).items():
        if key == "step" or not isinstance(value, Tensor):
            continue
        if type(local(value)) is not Tensor or not value.is_floating_point():
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key} quantized, which cannot be zeroed alone: "
                f"reset_step=False needs another optimizer"
            )
        value.zero_()  # also those of another shape, as Adafactor's
