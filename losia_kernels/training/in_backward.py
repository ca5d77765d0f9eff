"""Updates inside the backward: no gradient outlives the layer that it belongs to."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from ..layers.module import SubnetModule
from ..parallel.ranks import Ranks
from .timeline import Timeline


def check_in_backward(layers: Iterable[SubnetModule], ranks: Ranks) -> None:
    """Raise ValueError for what reduces or scales gradients after the backward."""
    if ranks.group is not None:
        raise ValueError(
            "LoSiAAdamW: in_backward=True would update before the gradients of several processes "
            "are reduced; leave it off under torch.distributed"
        )
    for layer in layers:
        if layer.weight.dtype == torch.float16:
            raise ValueError(
                f"LoSiAAdamW: {layer.name} is float16, whose loss must be scaled, and "
                f"in_backward=True would update by scaled gradients; use bfloat16"
            )


class InBackward:
    """Updates each subnet by ``update(group, layer)`` as soon as a backward has its whole gradient,
    and frees that.

    Whole means summed over all uses of the layer in the graph: torch then has done every ``dx``
    that needs the old weight. Layers that observe keep their gradient for the step: their
    importance is of the weight before the update.
    """

    def __init__(self, timeline: Timeline, update: Callable[[int, SubnetModule], None]):
        self._timeline = timeline
        self._update = update
        self._updated: set[SubnetModule] = set()
        self._running = -1  # torch's number of a backward that has updated and not come to its end
        for number, layers in enumerate(timeline.groups):
            for layer in layers:
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
        self._notice_backward(layer)
        if layer in self._updated:
            raise RuntimeError(
                f"{layer.name}: a second gradient before step(), but with in_backward=True the first "
                f"is spent. It allows one backward a step: no gradient accumulation, no "
                f"retain_graph, no reentrant checkpointing of a layer that is used twice"
            )
        self._updated.add(layer)
        self._update(group, layer)
        subnet.grad = None

    def _notice_backward(self, layer: SubnetModule) -> None:
        """One that was broken off (out of memory, an interrupt) is not the step's: what it has updated
        is updated anew by the one that is tried instead."""
        # of reentrant checkpointing the one around, in which the layer was run again
        now = layer.used_in if layer.used_in >= 0 else torch._C._current_graph_task_id()
        if now == self._running:
            return
        if self._running >= 0:
            self._updated.clear()
        self._running = now
        Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._running = -1
