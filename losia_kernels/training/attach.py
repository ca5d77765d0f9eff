"""attach(): what LoSiAAdamW's step does, for any torch optimizer that holds the subnets."""

import functools
import warnings
from collections.abc import Mapping
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

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
    _check_copies()
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
    optimizer.param_groups[:] = _split_groups(optimizer.param_groups, timeline)

    made_state_alone = False
    blank: dict[Tensor, dict] = {}  # zeros in place of what is forgotten until the next step
    forget = functools.partial(_forget, optimizer, timeline.config.reset_step, blank)

    def rewarm(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        nonlocal made_state_alone
        made_state_alone = only_makes_state(optimizer)
        timeline.check_step(optimizer)
        timeline.forget_moved(forget, timeline.layers)
        begin_anew()
        for layer in timeline.layers:
            layer.sync_(finish=True)
        for group in optimizer.param_groups:
            group["scheduled_lr"] = group["lr"]
            if group.get("layer_group") is not None:  # one added later has none
                group["lr"] = group["lr"] * timeline.lr_factor(group["layer_group"])
            scale = group.get("subnet_lr_scale", 1.0)
            group["lr"] = group["lr"] * scale
            if group.get("weight_decay"):  # a value decays as fast as in full fine-tuning
                group["plain_weight_decay"] = group["weight_decay"]
                group["weight_decay"] = group["weight_decay"] / scale

    def write_back(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for group in optimizer.param_groups:
            _give_back(group)
        found_inf = getattr(optimizer, "found_inf", None)
        if made_state_alone:  # by a step that is none
            for parameter, state in optimizer.state.items():
                blank[parameter] = {key: _zero(value) for key, value in state.items()}
            optimizer.state.update(blank)
        if made_state_alone or timeline.idle:
            return
        if found_inf is not None and bool(found_inf):
            return  # there for the time of a GradScaler's step: the optimizer has changed nothing
        timeline.check_first_step()
        timeline.observe()  # the weights do not have the new values yet
        for layers in [*timeline.groups, timeline.dense]:
            timeline.placement.write_back_(layers)
        with torch.no_grad():
            timeline.advance(forget)

    def complete_state(optimizer: torch.optim.Optimizer) -> None:
        for subnet in blank:
            optimizer.state[subnet] = optimizer.state.get(subnet) or blank[subnet]

    def begin_anew() -> None:
        """The optimizer makes the state of what has moved: it need not be zeros."""
        for subnet, zeros in blank.items():
            if optimizer.state.get(subnet) is zeros:  # else another was loaded
                del optimizer.state[subnet]
        blank.clear()

    plain_zero_grad = optimizer.zero_grad

    @functools.wraps(plain_zero_grad)
    def zero_grad(*args: Any, **kwargs: Any) -> None:
        plain_zero_grad(*args, **kwargs)
        timeline.drop_gradients()

    plain_add = optimizer.add_param_group

    @functools.wraps(plain_add)
    def add_param_group(param_group: dict) -> None:
        """Subnets that are unfrozen later move, are rewarmed and scaled as the others."""
        known = len(optimizer.param_groups)
        plain_add(param_group)
        added = optimizer.param_groups[known:]
        optimizer.param_groups[known:] = _split_groups(added, timeline)

    plain_step = type(optimizer).step

    @torch._disable_dynamo  # what it does differs from step to step
    @functools.wraps(plain_step)
    def finished_step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            return plain_step(self, *args, **kwargs)
        finally:  # also one that was broken off, as by an interrupt
            for group in self.param_groups:
                _give_back(group)

    step = MethodType(finished_step, optimizer)  # as schedulers want to see

    def undo() -> None:
        begin_anew()
        for name in ("zero_grad", "add_param_group"):
            optimizer.__dict__.pop(name, None)
        if optimizer.__dict__.get("step") is step:  # no scheduler has wrapped it
            del optimizer.step
        for group in optimizer.param_groups:
            group.pop("layer_group", None)
            group.pop("subnet_lr_scale", None)

    optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
    optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
    optimizer.step = step  # type: ignore[method-assign]
    state = TimelineState(timeline, optimizer)
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        state.load_around(optimizer)
    timeline.handles += [
        optimizer.register_step_pre_hook(rewarm),
        optimizer.register_step_post_hook(write_back),
        optimizer.register_state_dict_pre_hook(complete_state),
        SimpleNamespace(remove=undo),
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
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "attach: LBFGS evaluates the loss several times within a step, for which the subnets' "
            "values would have to be in the weights; use LoSiAAdamW or another first-order optimizer"
        )
    driven = any("layer_group" in group for group in optimizer.param_groups)
    if isinstance(optimizer, LoSiAAdamW) or driven:
        raise ValueError("attach: the optimizer drives the subnets already")
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise ValueError(
            "attach: the optimizer has a learning-rate scheduler already; attach first, then make it"
        )
    if optimizer.state and not any(map(_stepped, optimizer.state.values())):
        raise ValueError(
            f"attach: {type(optimizer).__name__} makes its state when it is made, not for a subnet "
            f"that has moved; use another optimizer"
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


def _stepped(state: dict) -> bool:
    return float(state.get("step", 1)) > 0


@functools.cache
def _check_copies() -> None:
    """From the first attach of the process on: copies of what it has grouped lose its hooks."""
    register_optimizer_step_pre_hook(_check_driven)


def _check_driven(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    attached = any("layer_group" in group for group in optimizer.param_groups)
    if attached and not isinstance(getattr(optimizer, "timeline", None), Timeline):
        raise RuntimeError(
            f"a copy of an attached {type(optimizer).__name__} (deepcopy, pickle, torch.save of it "
            f"whole, or its state loaded by another) drives no model: make a new one for the model "
            f"that it is to train, attach it, and load_state_dict"
        )


def _give_back(group: dict) -> None:
    """What a step has changed of a group's options."""
    for name, kept in (("lr", "scheduled_lr"), ("weight_decay", "plain_weight_decay")):
        if kept in group:
            group[name] = group.pop(kept)


def _split_groups(groups: list[dict], timeline: Timeline) -> list[dict]:
    """Of each parameter group one for each layer group in it and each scale of the learning rate
    there, and one for the rest."""
    place_of = {
        id(layer.subnet): (number, timeline.scale_of(layer))
        for number, layers in enumerate(timeline.groups)
        for layer in layers
    }
    split: list[dict] = []
    for group in groups:
        places = [place_of.get(id(parameter), (None, 1.0)) for parameter in group["params"]]
        for number, scale in [*dict.fromkeys(sorted(place_of.values())), (None, 1.0)]:
            here = [i for i, place in enumerate(places) if place == (number, scale)]
            per_parameter: dict[str, list] = {  # of an optimizer that was given names, those too
                key: [group[key][i] for i in here]
                for key in ("params", "param_names")
                if key in group
            }
            if here:
                split.append(
                    {**group, **per_parameter, "layer_group": number, "subnet_lr_scale": scale}
                )
    for group in split:
        if isinstance(group["lr"], Tensor):  # torchao's: schedulers fill it in place
            group["lr"] = group["lr"].clone()
    return split


def _forget(
    optimizer: torch.optim.Optimizer, reset_step: bool, blank: dict[Tensor, dict], subnet: Tensor
) -> None:
    """Drop the moments of the old subnet; with ``reset_step`` everything, so that the step count
    restarts too, and ``blank`` gets zeros: torch.distributed.checkpoint saves and loads one set of
    keys, whatever has moved.

    Raises ValueError, naming the optimizer, for moments that zeros do not stand for: quantized
    ones.
    """
    if reset_step:
        before = optimizer.state.pop(subnet, {})
        blank[subnet] = {key: _zero(value) for key, value in before.items() if key[:6] != "losia_"}
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


def _zero(value: Any) -> Any:
    if isinstance(value, Tensor) and type(local(value)) is Tensor:
        return torch.zeros_like(value)
    return 0 if isinstance(value, (int, float)) else value  # what is quantized says nothing of it
