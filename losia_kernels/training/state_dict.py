"""The timeline in an optimizer's state_dict: the clock, the config and the importance of the layers
that observe."""

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..layers.linear import LoSiALinear
from ..parallel.placement import as_shard, own
from ..parallel.ranks import is_sharded
from .importance import Observer, make_observer
from .timeline import SELECTING, Timeline, parameters_of

# What a resumed run may choose anew: all other fields say where the timeline stands or what the
# state means.
_FREE_FIELDS = (
    "init_subnet",
    "output_init",
    "seed",
    "fused_loss",
    *SELECTING,
)


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
        timeline.ranks.check_same(options, {})
        self._load_hooks: list[Any] = [
            optimizer.register_load_state_dict_pre_hook(self._check_loaded),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]
        timeline.handles += [optimizer.register_state_dict_post_hook(self._save), *self._load_hooks]

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
        timeline = self._timeline
        position = {parameter: i for i, parameter in enumerate(parameters_of(optimizer))}
        state = dict(state_dict["state"])
        for layer, observer in timeline.observers.items():
            tensors = self._shards(layer, observer) if timeline.sharded else observer.tensors
            if tensors:
                i = position[layer.subnet]
                state[i] = {
                    **state.get(i, {}),
                    **{f"losia_{k}": tensor for k, tensor in tensors.items()},
                }
        groups = [
            {**group, "losia_step": timeline.step, "losia_config": asdict(timeline.config)}
            for group in state_dict["param_groups"]
        ]
        return {**state_dict, "state": state, "param_groups": groups}

    def _shards(self, layer: LoSiALinear, observer: Observer) -> dict[str, Tensor]:
        """The observer's tensors, zeros before the first: torch.distributed.checkpoint wants one
        set of keys a step."""
        timeline = self._timeline
        if not observer.tensors:
            weight, observer = own(layer.weight), make_observer(timeline.config)
            observer.update(weight, torch.zeros_like(weight), 1.0, timeline.rows_of(layer))
        return {
            name: tensor
            if name == "in_importance"
            else as_shard(tensor, layer.out_features, layer.weight)
            for name, tensor in observer.tensors.items()
        }

    def _check_loaded(self, optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
        """Take out what is ours, after checking that it fits; the optimizer loads the rest."""
        timeline, saved = self._timeline, state_dict["param_groups"][0]
        if "losia_step" not in saved:
            raise ValueError(
                "the optimizer state was not saved by a LoSiA run: it has no losia_step"
            )
        for name, now in asdict(timeline.config).items():
            then = saved["losia_config"].get(name, now)
            if name == "period" and (timeline.auto or then == "auto"):
                continue  # with "auto" it becomes the checkpoint's
            if then != now and name not in _FREE_FIELDS:
                raise ValueError(
                    f"the checkpoint was made with LoSiAConfig.{name}={then!r}, this run has {now!r}; "
                    f"resume with the same config, or start anew from the exported weights"
                )
        index = [i for group in state_dict["param_groups"] for i in group["params"]]
        layers = [layer for group in [*timeline.groups, timeline.dense] for layer in group]
        subnets: dict[Tensor, LoSiALinear] = {layer.subnet: layer for layer in layers}
        observed: dict[LoSiALinear, dict[str, Tensor]] = {}
        state = {}
        for i, parameter in zip(index, parameters_of(optimizer), strict=False):
            entries = state_dict["state"].get(i, {})
            layer = subnets.get(parameter)
            ours = {
                k.removeprefix("losia_"): v for k, v in entries.items() if k.startswith("losia_")
            }
            rest = {k: v for k, v in entries.items() if not k.startswith("losia_")}
            if layer is not None:
                _check_shapes(layer, rest, ours)
                if ours:
                    observed[layer] = ours
            if rest:
                state[i] = rest
        period = saved["losia_config"]["period"] if timeline.auto else timeline.config.period
        due = (
            () if period == "auto" else timeline.schedule_of(period).observing(saved["losia_step"])
        )
        partial = timeline.sharded and not saved.get(
            "losia_whole"
        )  # what a whole one lacks nobody had seen
        if partial and any(
            layer not in observed for group in due for layer in timeline.groups[group]
        ):
            raise ValueError(
                f"the loaded state lacks the importance of the layers that observe at step {saved['losia_step']}: "
                f"before loading call timeline.resume_at({saved['losia_step']}), or load by losia_kernels.checkpoint"
            )
        self._loaded = {
            "step": saved["losia_step"],
            "period": saved["losia_config"]["period"],
            "observed": observed,
        }
        groups = [
            {k: v for k, v in g.items() if not k.startswith("losia_")}
            for g in state_dict["param_groups"]
        ]
        return {**state_dict, "state": state, "param_groups": groups}

    def _load(self, optimizer: torch.optim.Optimizer) -> None:
        timeline, loaded, self._loaded = self._timeline, self._loaded, {}
        if timeline.auto and loaded["period"] != "auto":
            timeline.settle_period(loaded["period"])
        timeline.resume_at(loaded["step"])
        for layer, tensors in loaded["observed"].items():
            device = layer.out_idx.device
            tensors = {
                k: own(tensor) if is_sharded(tensor) else tensor for k, tensor in tensors.items()
            }
            timeline.observers[layer].tensors = {
                k: tensor.to(device, copy=True) for k, tensor in tensors.items()
            }
        if timeline.sharded:  # zeros stand for an observer that has seen nothing yet
            observers = [timeline.observers[layer] for layer in loaded["observed"]]
            seen = timeline.ranks.any(
                [any(bool(t.any()) for t in observer.tensors.values()) for observer in observers]
            )
            for observer, anywhere in zip(observers, seen, strict=True):
                if not anywhere:
                    observer.tensors = {}
        timeline.check_position([layer for layers in timeline.groups for layer in layers])


def _check_shapes(layer: LoSiALinear, state: dict, observed: dict) -> None:
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
