"""Updates inside the backward: no gradient outlives the layer that it belongs to."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layers.module import SubnetModule
from .timeline import Timeline


class InBackward:
    """Updates each subnet by ``update(group, layer)`` as soon as a backward has its whole gradient,
    and frees that.

    Whole means summed over all uses of the layer in the graph: torch then has done every ``dx``
    that needs the old weight. Layers that observe keep their gradient for the step: their
    importance is of the weight before the update. Raises ValueError for what reduces or scales
    gradients after the backward.
    """

    def __init__(self, timeline: Timeline, update: Callable[[int, SubnetModule], None]):
        if timeline.ranks.group is not None:
            raise ValueError(
                "LoSiAAdamW: in_backward=True would update before the gradients of several processes are "
                "reduced; leave it off under torch.distributed"
            )
        self._timeline = timeline
        self._update = update
        self._updated: set[SubnetModule] = set()
        for number, layers in enumerate(timeline.groups):
            for layer in layers:
                if layer.weight.dtype == torch.float16:
                    raise ValueError(
                        f"LoSiAAdamW: {layer.name} is float16, whose loss must be scaled, and "
                        f"in_backward=True would update by scaled gradients; use bfloat16"
                    )
                # a full one does not observe while ``calibrate`` looks
                if layer.subnet.shape != layer.matrix.shape:
                    timeline.handles.append(self._hook_up(number, layer))

    def _hook_up(self, group: int, layer: SubnetModule) -> Any:
        # Python's garbage collector does not see what a tensor's hook holds: it must not hold the
        # run
        update, owner = weakref.WeakMethod(self._when_whole), weakref.ref(layer)

        def hook(subnet: Tensor) -> None:
            act, layer = update(), owner()
            if act is not None and layer is not None:
                act(group, layer, subnet)

        return layer.subnet.register_post_accumulate_grad_hook(hook)

    def take_updated(self) -> set[SubnetModule]:
        """The layers updated since the last call: at the end of the step."""
        updated, self._updated = self._updated, set()
        return updated

    @torch.no_grad()
    def _when_whole(self, group: int, layer: SubnetModule, subnet: Tensor) -> None:
        if layer.observe_callback is not None:
            return
        if self._timeline.loss_divisor != 1:
            raise RuntimeError(
                f"in_backward=True: the timeline's loss_divisor is {self._timeline.loss_divisor}, but "
                f"updates inside the backward know neither accumulation nor a GradScaler"
            )
        if layer in self._updated:
            raise RuntimeError(
                f"{layer.name}: a second gradient before step(), but with in_backward=True the first "
                f"is spent. It allows one backward a step: no gradient accumulation, no "
                f"retain_graph, no reentrant checkpointing of a layer that is used twice"
            )
        self._updated.add(layer)
        self._update(group, layer)
        subnet.grad = None
