"""The timeline in an optimizer's state_dict: the clock, the config and the importance of the layers
that observe."""

import json
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..config import LoSiAConfig
from ..layers.idle import IDLE_BY_HAND
from ..layers.module import SubnetModule
from ..parallel.placement import local, placed_as
from .checks import SELECTING, parameters_of
from .importance import Observer
from .timeline import Timeline

# What a resumed run may choose anew: all other fields say where the timeline stands or what the
# state means.
_FREE_FIELDS = (
    "init_subnet",
    "output_init",
    "seed",
    "fused_loss",
    *SELECTING,
)


_WHOSE = {True: "full fine-tuning (lr_of='full')", False: "the subnets (lr_of='subnet')"}


class TimelineState:
    """Makes ``optimizer.state_dict()`` carry the timeline, and ``load_state_dict`` restore it or
    refuse before anything changes. Tensors and plain values only."""

    def __init__(self, timeline: Timeline, optimizer: torch.optim.Optimizer):
        self._timeline = timeline
        self._loaded: dict[str, Any] = {}
        options = {
            f"{type(optimizer).__name__}.{name}": value
            for name, value in optimizer.defaults.items()
        }
        timeline.ranks.check_same(options)
        self._load_hooks: list[Any] = [
            optimizer.register_load_state_dict_pre_hook(self._check_loaded),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]
        timeline.handles += [
            optimizer.register_state_dict_pre_hook(_take_names),
            optimizer.register_state_dict_post_hook(self._save),
            *self._load_hooks,
            SimpleNamespace(remove=lambda: _take_names(optimizer)),
        ]

    def load_around(self, optimizer: torch.optim.Optimizer) -> None:
        """For an optimizer whose own ``load_state_dict`` runs no hooks (bitsandbytes'): do there
        what they would do."""
        plain = optimizer.load_state_dict

        def load_state_dict(state_dict: dict, *args: Any, **kwargs: Any) -> None:
            plain(self._check_loaded(optimizer, state_dict), *args, **kwargs)
            self._load(optimizer)

        for handle in self._load_hooks:
            handle.remove()
            self._timeline.handles.remove(handle)
        optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]
        undo = SimpleNamespace(remove=lambda: optimizer.__dict__.pop("load_state_dict", None))
        self._timeline.handles.append(undo)

    def _save(self, optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
        """What is saved stays in the optimizer by name: torch.distributed.checkpoint's flattened
        form loads nothing but what the optimizer in hand has names for."""
        timeline = self._timeline
        position = {parameter: i for i, parameter in enumerate(parameters_of(optimizer))}
        state = dict(state_dict["state"])
        for layer, observer in timeline.observers.items():
            i = position[layer.subnet]
            tensors = _tensors_of(layer, observer)
            state[i] = {**state.get(i, {}), **{f"losia_{k}": v for k, v in tensors.items()}}
            if layer.subnet in optimizer.state:
                optimizer.state[layer.subnet] |= {f"losia_{name}": None for name in tensors}
        config = json.dumps(asdict(timeline.config))  # one value, whichever fields there are
        clock = {"losia_step": timeline.step, "losia_config": config}
        groups = [{**group, **clock} for group in state_dict["param_groups"]]
        for group in optimizer.param_groups:
            group |= dict.fromkeys(clock)
        return {**state_dict, "state": state, "param_groups": groups}

    def _check_loaded(self, optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
        """Take out what is ours, after checking that it fits; the optimizer loads the rest."""
        timeline, saved = self._timeline, state_dict["param_groups"][0]
        if "losia_step" not in saved:
            raise ValueError(
                "the optimizer state was not saved by a LoSiA run: it has no losia_step"
            )
        config = json.loads(saved["losia_config"])
        free: tuple[str, ...] = _FREE_FIELDS
        if any(layer.membership and layer.membership.by_hand for layer in timeline.layers):
            free += IDLE_BY_HAND
        for name, now in asdict(timeline.config).items():
            then = config.get(name, now)
            if name == "period" and (timeline.clock.auto or then == "auto"):
                continue  # with "auto" it becomes the checkpoint's
            if then != now and name not in free:
                raise ValueError(
                    f"the checkpoint was made with LoSiAConfig.{name}={then!r}, this run has {now!r}; "
                    f"resume with the same config, or start anew from the exported weights"
                )
        known = {name: config[name] for name in ("init_subnet", "moves", "lr_of") if name in config}
        then_scaled = LoSiAConfig(**known).scales_lr
        if len(known) == 3 and then_scaled != timeline.config.scales_lr:
            raise ValueError(
                f"the checkpoint's learning rates are meant for {_WHOSE[then_scaled]}, this run's "
                f"for {_WHOSE[not then_scaled]}: init_subnet was {config['init_subnet']!r}, now "
                f"{timeline.config.init_subnet!r}; give the same, or the same lr_of"
            )
        index = [i for group in state_dict["param_groups"] for i in group["params"]]
        subnets: dict[Tensor, SubnetModule] = {layer.subnet: layer for layer in timeline.layers}
        observed: dict[SubnetModule, dict[str, Tensor]] = {}
        state = {}
        for i, parameter in zip(index, parameters_of(optimizer), strict=False):
            entries = state_dict["state"].get(i, {})
            layer = subnets.get(parameter)
            ours = {
                k.removeprefix("losia_"): v
                for k, v in entries.items()
                if k.startswith("losia_") and isinstance(v, Tensor)  # else: a name alone
            }
            rest = {k: v for k, v in entries.items() if not k.startswith("losia_")}
            if layer is not None:
                _check_shapes(layer, rest, ours)
                if ours:
                    observed[layer] = ours
            if not _is_blank(rest):
                state[i] = rest
        clock, step = timeline.clock, saved["losia_step"]
        period = config["period"] if clock.auto else clock.config.period
        due = () if period == "auto" else clock.schedule_of(period).observing(step)
        timeline.placement.check_complete(
            any(layer not in observed for group in due for layer in timeline.groups[group]),
            f"the loaded state lacks the importance of the layers that observe at step {step}: "
            f"before loading call timeline.resume_at({step}), or load by losia_kernels.checkpoint",
        )
        self._loaded = {
            "step": step,
            "period": config["period"],
            "observed": observed,
        }
        groups = [
            {k: v for k, v in g.items() if not k.startswith("losia_")}
            for g in state_dict["param_groups"]
        ]
        return {**state_dict, "state": state, "param_groups": groups}

    def _load(self, optimizer: torch.optim.Optimizer) -> None:
        timeline, loaded, self._loaded = self._timeline, self._loaded, {}
        if timeline.clock.auto and loaded["period"] != "auto":
            timeline.settle_period(loaded["period"])
        timeline.resume_at(loaded["step"])
        timeline.unplaced = {
            layer
            for number, layers in enumerate(timeline.groups)
            for layer in layers
            if timeline.clock.has_moved(number)
        }
        for layer, tensors in loaded["observed"].items():
            observer, device = timeline.observers[layer], layer.out_idx.device
            observer.tensors = {k: local(v).to(device, copy=True) for k, v in tensors.items()}
            held = any(bool(tensor.any()) for tensor in observer.tensors.values())
            observer.seen = timeline.ranks.any_rank(held)
        timeline.check_position(timeline.layers)


def _take_names(optimizer: torch.optim.Optimizer) -> None:
    for named in [*optimizer.param_groups, *optimizer.state.values()]:
        for key in [key for key in named if str(key).startswith("losia_")]:
            del named[key]


def _tensors_of(layer: SubnetModule, observer: Observer) -> dict[str, Tensor]:
    """The importance of a layer that observes: zeros before its first gradient, for
    torch.distributed.checkpoint wants one set of keys a step."""
    tensors = observer.tensors or observer.make_state(local(layer.matrix))
    return {
        name: tensor
        if name in observer.replicated
        else placed_as(tensor, layer.out_features, layer.weight)
        for name, tensor in tensors.items()
    }


def _is_blank(state: dict) -> bool:
    """Of a subnet that had just moved, or of no step: zeros, for which an optimizer makes what it
    begins with."""
    if "step" in state:
        return float(state["step"]) == 0
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    return not any(bool(local(tensor).any()) for tensor in tensors)


def _check_shapes(layer: SubnetModule, state: dict, observed: dict) -> None:
    for key, value in state.items():
        alike = isinstance(value, Tensor) and value.dim() == 2 and not key.endswith("_scale")
        if alike and any(
            size not in (1, k) for size, k in zip(value.shape, layer.subnet.shape, strict=True)
        ):
            # 1: a factored moment, as Adafactor's
            raise ValueError(
                f"{layer.name}: the checkpoint's {key} is {tuple(value.shape)}, the subnet {tuple(layer.subnet.shape)}"
            )
    for key, value in observed.items():
        if value.dim() == 2 and value.shape != layer.matrix.shape:
            raise ValueError(
                f"{layer.name}: the checkpoint's {key} is {tuple(value.shape)}, the weight {tuple(layer.matrix.shape)}"
            )
