"""What backwards have shown of the layers that observe. It counts once a step is taken: until then it
is as pending as the gradients that came with it, and is dropped with them."""

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from ..layers.cross_entropy import WeightGradient, row_blocks
from ..layers.module import SubnetModule
from ..ops.rounding import accumulate_dtype
from ..parallel.placement import Placement, local
from .importance import ALL, Observer


@dataclass(eq=False)
class Shown:
    """The dense gradient that one backward gave one layer, in as many parts as it came."""

    backward: int
    grad_scale: float
    parts: list[Tensor | WeightGradient] = field(default_factory=list)

    def add(self, part: Tensor | WeightGradient) -> None:
        if self.parts and isinstance(part, Tensor) and isinstance(self.parts[0], Tensor):
            self.parts[0] += part
        else:
            self.parts.insert(0 if isinstance(part, Tensor) else len(self.parts), part)

    def rows(self, outputs: slice) -> Tensor:
        total, *others = (part[outputs] for part in self.parts)
        for part in others:
            total = total + part
        return total


class Pending:
    """Holds what backwards show of the keys of ``observers``, and lets these see it at the step.

    Importance is of each micro-batch, so gradients are held one by one. Where an accumulation has
    more of them than weigh as much as a second state, they are judged into one.

    Args:
        observers: of the layers that observe; they know the steps taken.
    """

    def __init__(self, observers: dict[SubnetModule, Observer]):
        self._observers = observers
        self._ahead: dict[SubnetModule, Observer] = {}  # these know more than the steps taken
        self._shown: dict[SubnetModule, list[Shown]] = {}
        self._watched: dict[SubnetModule, tuple[weakref.ref[Tensor], list[Any]]] = {}
        # of each subnet with a gradient, that gradient's count of writes after its last backward
        self._given: dict[SubnetModule, tuple[weakref.ref[Tensor], int]] = {}
        self._judged_in: int | None = None  # the backward at whose end some are judged
        self._noticed_in: int | None = None  # at whose end the shards' gradients are looked at

    # what a backward shows ------------------------------------------------------------------------

    def watch(self, layer: SubnetModule) -> None:
        """Notice when the gradient of the layer's subnet was dropped, by whomever."""
        known = self._watched.get(layer)
        if known is not None and known[0]() is layer.subnet:
            return
        self.unwatch(layer)
        if not layer.subnet.requires_grad:
            return
        # Python's garbage collector does not see what a tensor's hook holds: it must not hold the
        # run
        before, after = (
            weakref.WeakMethod(self._before_gradient),
            weakref.WeakMethod(self._given_to),
        )
        owner = weakref.ref(layer)

        def call(method: weakref.WeakMethod, tensor: Tensor) -> None:
            act, layer = method(), owner()
            if act is not None and layer is not None:
                act(layer, tensor)

        subnet = layer.subnet
        self._watched[layer] = (
            weakref.ref(subnet),
            [
                subnet.register_hook(partial(call, before)),
                subnet.register_post_accumulate_grad_hook(partial(call, after)),
            ],
        )

    def unwatch(self, layer: SubnetModule) -> None:
        """The layer has stopped observing."""
        if layer in self._watched:
            for handle in self._watched.pop(layer)[1]:
                handle.remove()
        self.drop(layer)

    def add(
        self,
        layer: SubnetModule,
        gradient: Tensor | WeightGradient,
        grad_scale: float,
        placement: Placement,
    ) -> None:
        """A backward has given the layer a dense gradient, or a part of it."""
        if _is_captured(layer.out_idx):
            raise RuntimeError(
                f"{layer.name}: it observes, and a captured backward would show its gradient once and "
                f"not in replays: capture with losia_kernels.CapturedBackward, which shows it each "
                f"time and captures anew when others observe"
            )
        if isinstance(gradient, Tensor):
            gradient = placement.keep(layer, gradient)
        backward = _running_backward(layer)
        if placement.cut:
            self._notice_shards(layer, backward)
        shown = self._shown.setdefault(layer, [])
        if not shown or shown[-1].backward != backward:
            shown.append(Shown(backward, grad_scale))
            most = 0 if self._ahead else _most_held(layer, self._observers[layer])
            if len(self._backwards()) > most and self._judged_in != backward:
                self._judged_in = backward
                # not here: ranks need not come by this layer in the same order
                Variable._execution_engine.queue_callback(
                    partial(self._judge_early, backward, grad_scale, placement)
                )
        shown[-1].add(gradient)

    def _before_gradient(self, layer: SubnetModule, _: Tensor) -> None:
        """``layer.subnet`` is about to get a gradient: if it has none, or one that was zeroed since,
        what came with it before is void."""
        grad = layer.subnet.grad
        if grad is not None:
            version = self._given[layer][1] if layer in self._given else grad._version
            if grad._version == version or _is_captured(grad) or bool(grad.any()):
                return
        this = _running_backward(layer)
        self._ahead.pop(layer, None)
        self._shown[layer] = [x for x in self._shown.get(layer, []) if x.backward == this]

    def _given_to(self, layer: SubnetModule, subnet: Tensor) -> None:
        assert subnet.grad is not None
        self._given[layer] = weakref.ref(subnet), subnet.grad._version

    def _notice_shards(self, layer: SubnetModule, backward: int) -> None:
        """Of shards, whose gradient comes after what was shown and through hooks only if they were
        there when these were set: do here what hooks do of others."""
        subnet, version = self._given.get(layer, (lambda: None, 0))
        shard = subnet()
        if shard is not None and (
            shard.grad is None
            or shard.grad._version != version
            and not bool(local(shard.grad).any())
        ):
            self.drop(layer)
        if self._noticed_in != backward:
            self._noticed_in = backward
            Variable._execution_engine.queue_callback(self._notice_given)

    def _notice_given(self) -> None:
        """At the end of a backward, when FSDP has put the shards back where they were."""
        for layer in self._shown:
            if layer.subnet.grad is not None:
                self._given_to(layer, layer.subnet)

    def drop(self, layer: SubnetModule | None = None) -> None:
        """What was shown of the layer, or of all, comes to nothing."""
        for kept in (self._shown, self._ahead, self._given):
            if layer is None:
                kept.clear()
            else:
                kept.pop(layer, None)

    # what is made of it ---------------------------------------------------------------------------

    @torch.no_grad()
    def commit(self, grad_scale: float, placement: Placement) -> None:
        """A step is taken: let the observers see what came with the gradients that are there.

        Replicas all take part, whatever each has been shown. Nobody waits for the GPU.

        Args:
            grad_scale: of a rank that was shown nothing where others were.
        """
        for layer in {*self._shown, *self._ahead}:
            if layer.subnet.grad is None:
                self.drop(layer)
        self._judge(
            self._shown,
            lambda layer: self._ahead.get(layer) or self._observers[layer],
            grad_scale,
            placement,
        )
        self._observers.update(self._ahead)
        self.drop()
        for layer in self._observers:
            self.watch(layer)  # fully_shard may have exchanged the subnet

    @torch.no_grad()
    def _judge_early(self, backward: int, grad_scale: float, placement: Placement) -> None:
        """At the end of a backward, or of one inside it, which may go on to show more."""
        inside = torch._C._current_graph_task_id() != backward
        whole, rest = {}, {}
        for layer, shown in self._shown.items():
            whole[layer] = [x for x in shown if not inside or x.backward != backward]
            rest[layer] = [x for x in shown if inside and x.backward == backward]
        self._shown = rest
        self._judge(whole, self._ahead_of, grad_scale, placement)

    def _ahead_of(self, layer: SubnetModule) -> Observer:
        if layer not in self._ahead:
            observer = self._ahead[layer] = copy.copy(self._observers[layer])
            observer.tensors = {name: x.clone() for name, x in observer.tensors.items()}
        return self._ahead[layer]

    def _judge(
        self,
        shown: dict[SubnetModule, list[Shown]],
        observer_of: Callable[[SubnetModule], Observer],
        grad_scale: float,
        placement: Placement,
    ) -> None:
        """Let observers see what was shown, backward by backward."""
        layers = [layer for layer in self._observers if layer.subnet.requires_grad]
        if placement.cut or placement.ranks.size == 1 or not layers:
            for layer in layers:
                waiting = shown.pop(layer, [])
                while waiting:
                    _show(observer_of(layer), layer, waiting.pop(0), grad_scale, placement)
            return
        # replicas may have come by different layers, and all average all of them
        backwards = _backwards(shown) or [-1]
        of_layer = [{each.backward: each for each in shown.pop(layer, [])} for layer in layers]
        known = torch.tensor([[backward in held for backward in backwards] for held in of_layer])
        anyone = placement.ranks.all_reduce_max_(known.byte().to(layers[0].out_idx.device))
        for layer, held, used in zip(layers, of_layer, anyone, strict=True):
            for backward, flag in zip(backwards, used, strict=True):
                one = held.pop(backward, None)
                _show(observer_of(layer), layer, one, grad_scale, placement, flag)

    def _backwards(self) -> list[int]:
        return _backwards(self._shown)


def _show(
    observer: Observer,
    layer: SubnetModule,
    shown: Shown | None,
    grad_scale: float,
    placement: Placement,
    anyone: Tensor | None = None,
) -> None:
    """None: this rank adds nothing to what others were shown, if ``anyone`` was; else NaN has no
    effect."""
    weight, rows = placement.observed_weight(layer), placement.rows(layer)
    in_blocks = layer.membership is not None and layer.membership.is_output and not placement.cut
    for outputs in row_blocks(weight.shape) if in_blocks else [ALL]:
        if shown is None:  # contiguous as gradients are, whatever the weight is
            grad = weight.new_zeros(weight[outputs].shape)
        else:
            grad = shown.rows(outputs)
        if in_blocks:  # a rank may have parts that are computed in float32, and another one not
            grad = grad.to(accumulate_dtype(grad.dtype))
        grad = placement.mean_of_kept(grad)
        if shown is None and anyone is not None:
            grad.masked_fill_((anyone == 0).to(grad.device), torch.nan)
        scale = grad_scale if shown is None else shown.grad_scale
        observer.observe(weight.to(grad.device), grad, scale, rows, outputs)


def _is_captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _running_backward(layer: SubnetModule) -> int:
    """Torch's number of it. Of one inside another, as reentrant checkpointing's are, the outer one's,
    in which the layer's forward was run again."""
    return layer.used_in if layer.used_in >= 0 else torch._C._current_graph_task_id()


def _backwards(shown: dict[SubnetModule, list[Shown]]) -> list[int]:
    """In the order in which they ran."""
    return sorted({each.backward for held in shown.values() for each in held})


def _most_held(layer: SubnetModule, observer: Observer) -> int:
    """Up to so many gradients weigh no more than a second state beside one of them."""
    return observer.bytes_per_weight // layer.weight.element_size() + 1
