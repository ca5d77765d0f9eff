"""Who writes a subnet: torch's count of writes, made whole where torch itself does not count."""

import functools
import threading
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class SubnetParameter(nn.Parameter):
    """A parameter that also counts what is written through ``.data``, as averages of weights, SAM
    and ``vector_to_parameters`` do: so no values have to be compared, nor a GPU waited for, to know
    that it is what it was. Its layer, the ``owner``, is told before."""

    owner: "weakref.ref[Any] | None" = None

    @property
    def data(self) -> Tensor:
        self._tell_owner()
        return self.detach()  # which, unlike torch's, shares the count

    @data.setter
    def data(self, value: Tensor) -> None:
        self._tell_owner()
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        if not self.is_inference():
            torch.autograd.graph.increment_version(self)

    def _tell_owner(self) -> None:
        layer = self.owner() if self.owner is not None else None
        if layer is not None and not torch.compiler.is_compiling():
            layer.note_access_()

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = nn.Parameter(self.detach(), self.requires_grad)
        return plain.__reduce_ex__(protocol)


class Written(Protocol):
    """What is watched."""

    _parameters: Any

    def note_stepped_(self, optimizer: str) -> None: ...
    def note_access_(self) -> None: ...


_LOCK = threading.Lock()
_ALIVE: "weakref.WeakSet[Any]" = weakref.WeakSet()  # whose subnets may be stepped


def watch(layer: Written) -> None:
    """Tell ``layer`` of optimizers that step its subnet and do not write it back; hooks torch's
    optimizers from the first layer of the process on."""
    with _LOCK:
        _ALIVE.add(layer)
    _watch_from_now_on()


@functools.cache
def _watch_from_now_on() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """torch's fused optimizers are not counted, nor are kernels that write past torch, as
    bitsandbytes'. Of other parameters nothing is touched."""
    with _LOCK:  # other threads may make layers
        layers = set(_ALIVE)
    timeline: Any = getattr(optimizer, "timeline", None)
    if getattr(timeline, "drives", False):
        layers -= set(timeline.layers)  # whose steps end with the weights written
    if not layers:
        return
    owners = {id(layer._parameters.get("subnet")): layer for layer in layers}
    of_torch = type(optimizer).__module__.startswith("torch.optim")
    for group in optimizer.param_groups:
        stepped = [p for p in group["params"] if p.grad is not None and id(p) in owners]
        if group.get("fused") or not of_torch:
            torch.autograd.graph.increment_version(stepped)
        for parameter in stepped:
            owners[id(parameter)].note_stepped_(type(optimizer).__name__)
