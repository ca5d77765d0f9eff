"""What an optimizer finds in a model before its first step, and what the first step shows."""

import sys
import warnings
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import asdict
from types import FrameType

import torch
from torch import Tensor, nn

from ..config import LoSiAConfig
from ..layers.agreement import computed, trained_beside
from ..layers.fused_loss import goes_round
from ..layers.module import Membership, SubnetModule
from ..layers.unchanged import check_unchanged
from ..parallel.placement import NO_DEEPSPEED, local, owned_by_deepspeed
from .importance import Observer

SELECTING = ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern")  # of a config
SCALED_THOUGH_CALIBRATED = (
    "calibrate places subnets where gradients are large, but their learning rates are scaled as for "
    "places at random, which is far too much there: set LoSiAConfig(init_subnet='calibrated'), or "
    "lr_of='subnet'"
)


def check_alike(members: Mapping[SubnetModule, Membership]) -> None:
    """Raise ValueError for layers of several configs, which differ in more than which layers they
    select."""
    shared = [
        {key: value for key, value in asdict(member.config).items() if key not in SELECTING}
        for member in members.values()
    ]
    names = {member.group: member.group_name for member in members.values()}
    first = next(iter(members))
    for (layer, member), config in zip(members.items(), shared, strict=True):
        if config != shared[0] or member.group_name != names[member.group]:
            raise ValueError(
                f"{first.name} and {layer.name} were converted apart, with configs or groups "
                f"that do not go together; one optimizer drives one config: convert the whole "
                f"model at once"
            )


def check_flags(layers: Sequence[SubnetModule]) -> None:
    """Raise ValueError for weights that were set to train beside their subnets, or if every subnet
    is frozen; warn of some that are. ``requires_grad_`` after the conversion does that."""
    for layer in layers:
        if layer.weight.requires_grad:
            raise ValueError(trained_beside(layer.name))
    frozen = [layer.name for layer in layers if not layer.subnet.requires_grad]
    if len(frozen) == len(layers):
        raise ValueError(
            f"no subnet requires a gradient, as after requires_grad_(False): set "
            f"subnet.requires_grad_(True) on the layers that are to train, such as {frozen[0]}"
        )
    if frozen:
        warnings.warn(
            f"LoSiA: {_some(frozen)}: frozen, for {len(frozen)} of {len(layers)} subnets require "
            f"no gradient",
            stacklevel=4,
        )


def warn_of_frozen_since(trained: Iterable[SubnetModule]) -> None:
    """Warn of layers that were to train when the optimizer was made, and are frozen now."""
    frozen = [layer.name for layer in trained if not layer.subnet.requires_grad]
    if frozen:
        warnings.warn(
            f"LoSiA: {_some(frozen)}: frozen since the optimizer was made, for their subnets require "
            f"no gradient any more: set subnet.requires_grad_(True)",
            stacklevel=4,
        )


def check_held(optimizer: torch.optim.Optimizer, layers: Iterable[SubnetModule]) -> None:
    """Raise RuntimeError if the optimizer would step subnets that the model no longer has, ValueError
    if their weights are computed now, so that no update would last."""
    held = {id(parameter) for parameter in parameters_of(optimizer)}
    for layer in layers:
        subnet = layer.held("subnet")
        if type(layer.held("weight")) is Tensor:
            raise ValueError(computed(layer.name))
        if layer.membership is None and subnet.grad is not None:
            raise RuntimeError(
                f"{layer.name}: its subnet has a gradient, but its adapter is not in the weight: "
                f"step before another adapter is activated, or this one disabled"
            )
        if id(subnet) not in held and subnet.requires_grad:
            if owned_by_deepspeed(subnet):
                raise RuntimeError(f"{layer.name}: {NO_DEEPSPEED}")
            raise RuntimeError(
                f"{layer.name}: the optimizer holds another subnet than the model; make the "
                f"optimizer after fully_shard or whatever else exchanges parameters"
            )


def check_dtypes(
    optimizer: torch.optim.Optimizer,
    layers: Iterable[SubnetModule],
    known: MutableMapping[SubnetModule, torch.dtype],
) -> None:
    """Before an update of ``layers``: raise RuntimeError for a subnet with another dtype than at the
    last one, if what the optimizer keeps of it still has that one.

    Args:
        known: the dtypes at the last update, which become those of now.
    """
    for layer in layers:
        subnet, before = layer.held("subnet"), known.get(layer)
        if subnet.dtype == before:
            continue
        for key, value in optimizer.state.get(subnet, {}).items():
            if isinstance(value, Tensor) and value.dtype == before and value.dim() == 2:
                raise RuntimeError(
                    f"{layer.name}: its subnet has become {subnet.dtype}, but the optimizer's {key} "
                    f"of it is {before}: cast the model before the first step, or make a new "
                    f"optimizer"
                )
        known[layer] = subnet.dtype


def only_makes_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch.distributed.checkpoint has called this step, at rate 0 with gradients of zeros that
    it made, to have a new optimizer make its state: no step of the clock."""
    if optimizer.state or any(float(group["lr"]) for group in optimizer.param_groups):
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_init_optim_state":
        frame = frame.f_back
    return frame is not None


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order of ``state_dict()["param_groups"]``."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_gradients(layers: Iterable[SubnetModule], updated: Collection[SubnetModule] = ()) -> None:
    """Warn of subnets that the first backward has left without a gradient.

    Costs nothing but a look at each ``grad``. A layer that a batch does not use (an expert that got
    no token) is no mistake, an output layer without a gradient always is: the loss reads its weight
    past it.

    Args:
        updated: layers that have had one, used and freed inside the backward.

    Raises:
        RuntimeError: the output layer is one.
    """
    layers = [layer for layer in layers if layer.subnet.requires_grad]
    without = [layer for layer in layers if layer.subnet.grad is None and layer not in updated]
    if len(without) == len(layers):
        warnings.warn(
            "LoSiA: no subnet has a gradient in the first step: was there a backward before it, "
            "and is the loss one of this model's?",
            stacklevel=4,
        )
        return
    for layer in without:
        if layer.membership is not None and layer.membership.is_output:
            raise RuntimeError(goes_round(layer.name))
    if without:
        warnings.warn(
            f"LoSiA: {len(without)} of {len(layers)} subnets got no gradient in the first step: "
            f"{_some([layer.name for layer in without])}. They train only if later batches reach "
            f"them; a kernel that reads weight itself, or a loss that leaves part of the model "
            f"out, never will",
            stacklevel=4,
        )


def warn_of_rates(config: LoSiAConfig, layers: Iterable[SubnetModule], step: int) -> None:
    """Before the first step of a run: warn of learning rates that ``lr_of="auto"`` has chosen for
    other places than the subnets are in."""
    placed = [layer for layer in layers if layer.subnet.shape != layer.matrix.shape]
    if step or config.lr_of != "auto" or not placed:
        return
    by_hand = all(layer.membership is None or layer.membership.by_hand for layer in placed)
    if config.scales_lr and by_hand and any(layer.calibrated for layer in placed):
        warnings.warn(f"LoSiA: {SCALED_THOUGH_CALIBRATED}", stacklevel=4)
    at_random = config.moves != "importance" and not any(layer.was_placed for layer in placed)
    if config.init_subnet == "calibrated" and at_random:
        warnings.warn(
            f"LoSiA: LoSiAConfig.init_subnet is 'calibrated', but the subnets are where they were "
            f"drawn at random: their learning rates are their own, {placed[0].name}'s a "
            f"{placed[0].matrix.numel() / placed[0].subnet.numel():.0f}th of what is right there; "
            f"call calibrate before the optimizer's first step, or set init_subnet='random'",
            stacklevel=4,
        )


def warn_of_unplaced(layers: Iterable[SubnetModule]) -> None:
    """Warn of layers whose optimizer state was loaded, and was of another place."""
    names = sorted(layer.name for layer in layers)
    if names:
        warnings.warn(
            f"LoSiA: {_some(names)}: the optimizer's state was loaded, but not where the subnets were "
            f"then, which model.state_dict() of the same checkpoint has: they are where they were "
            f"drawn, and their moments start anew",
            stacklevel=4,
        )


def warn_of_unobserved(
    model: nn.Module,
    group_name: str,
    layers: Collection[SubnetModule],
    observers: Mapping[SubnetModule, Observer],
    trained: Collection[SubnetModule],
) -> None:
    """Warn of layers that move now though no backward has shown their gradient (nobody observes where
    they move at random: though they have none in this step). Gradients without a
    backward that autograd has run show themselves by this alone: nothing would ever move. Zeros are
    none: those that ``zero_grad(set_to_none=False)`` leaves to a block that no batch uses."""
    seen = [
        observers[layer].seen if layer in observers else layer.held("subnet").grad is not None
        for layer in layers
    ]
    unseen = [layer for layer, used in zip(layers, seen, strict=True) if not used]
    if not unseen:
        return
    try:
        check_unchanged(model, unseen)
    except ValueError as error:
        warnings.warn(f"LoSiA: {error}", stacklevel=4)
    warn_of_frozen_since([layer for layer in unseen if layer in trained])
    given = (layer.subnet.grad for layer in layers if not any(seen))
    if any(grad is not None and bool(local(grad).any()) for grad in given):
        warnings.warn(
            f"LoSiA: {group_name} got gradients, but no backward has observed it in its slot, and "
            f"its subnets stay where they are. A replayed CUDA graph shows nothing to those who "
            f"observe: use losia_kernels.CapturedBackward",
            stacklevel=4,
        )


def warn_of_not_finite(layers: Iterable[SubnetModule]) -> None:
    """Warn of layers that found no place to move to, if the reason is that not even the last gradient
    of the slot was finite."""
    lost = [
        layer.name
        for layer in layers
        if layer.subnet.grad is not None and not bool(local(layer.subnet.grad).isfinite().all())
    ]
    if lost:
        warnings.warn(
            f"LoSiA: {_some(lost)}: no gradient of the slot was finite, so the subnets stay where "
            f"they are",
            stacklevel=4,
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
