"""LazyLogits: what an output layer would return, which notes what is done to it and is computed only
where something needs its values."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .cross_entropy import WeightGradient, autocast_dtype, losia_linear_cross_entropy
from .module import SubnetModule


@functools.cache
def warn_once(message: str) -> None:
    """Warn, the first time."""
    warnings.warn(message, stacklevel=3)


def lazy_logits(head: nn.Linear, made: "list[Source]", hidden: Tensor) -> "LazyLogits":
    """What ``head(hidden)`` would be; ``made`` gets the source."""
    if isinstance(head, SubnetModule):
        head.sync_before_use_(torch.is_grad_enabled() and head.subnet.requires_grad)
    dtype, device = autocast_dtype(hidden), hidden.device.type
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext
    if device != "meta":  # it has no autocast
        context = functools.partial(torch.autocast, device, dtype, enabled=dtype != hidden.dtype)
    logits = LazyLogits((*hidden.shape[:-1], head.out_features), dtype, hidden.device)
    logits.source = Source(head, hidden, context)
    made.append(logits.source)
    return logits


class Source:
    """An output layer, what it was given, under which autocast, and whether gradients were wanted.

    ``finished``: the model's forward has ended, after which nothing is noted any more, only
    computed.
    """

    def __init__(
        self, head: nn.Linear, hidden: Tensor, context: Callable[[], AbstractContextManager]
    ):
        self.head, self.hidden, self.context = head, hidden, context
        # kept, for the head may get others, as in torch.func.functional_call
        self.weight, self.bias = head.weight, head.bias
        self.differentiable, self.finished = torch.is_grad_enabled(), False
        # held, so that none gets another's address
        self.storages = [tensor.untyped_storage() for tensor in self._tensors()]
        self.state = self._state()

    def _tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.weight, self.bias, self.hidden) if tensor is not None]

    def _state(self) -> list[tuple]:
        """Differs once the logits can no longer be computed as they would have been."""
        return [
            (tensor.untyped_storage()._cdata, None if tensor.is_inference() else tensor._version)
            for tensor in self._tensors()
        ]

    def logits(self) -> Tensor:
        """Raises RuntimeError if what they are made of is no longer there."""
        if (
            self._state() != self.state
            or self.differentiable
            and self.head.weight is not self.weight
        ):
            raise RuntimeError(
                "the logits of a forward with labels were not kept, and the output layer or the hidden states have "
                "changed since: read them before, or set LoSiAConfig.fused_loss=False"
            )
        with torch.set_grad_enabled(self.differentiable), self.context():
            if self.differentiable:
                return type(self.head).forward(self.head, self.hidden)
            return F.linear(self.hidden, self.weight, self.bias)

    def cross_entropy(self, labels: Tensor, **options) -> Tensor:
        head = self.head
        subnet: Tensor | None = None
        out_idx = on_gradient = None
        if isinstance(head, SubnetModule):
            subnet = head.subnet
            out_idx = None if subnet.shape[0] == head.out_features else head.out_idx
            on_gradient = (
                None if head.observe_callback is None else functools.partial(hand_over, head)
            )
        elif head.weight.requires_grad:
            subnet = head.weight
        with self.context():
            return losia_linear_cross_entropy(
                self.hidden.reshape(-1, head.in_features),
                head.weight,
                labels,
                subnet,
                out_idx,
                bias=head.bias,
                on_gradient=on_gradient,
                **options,
            )


def hand_over(head: SubnetModule, gradient: WeightGradient) -> None:
    if head.observe_callback is not None:  # else: a graph from before the layer stopped observing
        head.observe_callback(gradient)


class LazyLogits(Tensor):
    """Logits ``softcap * tanh(scale * raw / softcap)`` in some shape ``[..., V]`` that have not
    been computed.

    ``whole()`` computes them, once: from the source, or by doing to the parent's what was done to
    this one's parent.
    """

    source: Source
    parent: "LazyLogits | None"
    noted: Callable[[Tensor], Tensor]
    value: Tensor | None
    scale: float
    softcap: float | None

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> "LazyLogits":
        differentiable = torch.is_grad_enabled()
        self: Any = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device, requires_grad=differentiable
        )
        self.source, self.parent, self.noted, self.value = None, None, None, None
        self.scale, self.softcap = 1.0, None
        if differentiable:
            with torch._C.DisableTorchFunctionSubclass():
                self.register_hook(_raise_on_gradient)
        return self

    def then(self, noted, like: Tensor, scale: float, softcap: float | None) -> "LazyLogits":
        """What ``noted(self)`` would be: of the shape and dtype of ``like``."""
        child = LazyLogits(like.shape, like.dtype, self.source.hidden.device)
        child.source, child.parent, child.noted = self.source, self, noted
        child.scale, child.softcap = scale, softcap
        return child

    @property
    def is_lazy(self) -> bool:
        return self.value is None and (self.parent is None or self.parent.is_lazy)

    def whole(self) -> Tensor:
        if self.value is None:
            if self.parent is None:
                self.value = self.source.logits()
            else:
                with torch.set_grad_enabled(self.source.differentiable), self.source.context():
                    self.value = self.noted(self.parent.whole())
        return self.value

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("input")
        if isinstance(first, cls):
            if func in _METADATA:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if first.is_lazy:
                result = None if first.source.finished else _do_lazily(func, first, args, kwargs)
                if result is not None:
                    return result
                if first.source.differentiable:  # an evaluation reads them with good reason
                    name = getattr(func, "__name__", str(func))
                    warn_once(
                        f"LoSiA: a forward with labels computed its logits after all: {name} needs them"
                    )
        args, kwargs = tree_map_only(cls, cls.whole, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        args, kwargs = tree_map_only(cls, cls.whole, (args, kwargs or {}))
        return func(*args, **kwargs)


def _raise_on_gradient(grad: Tensor) -> None:
    raise RuntimeError(
        "a gradient has come to logits that were not computed: a custom autograd function took them as its input; set "
        "LoSiAConfig.fused_loss=False"
    )


def _do_lazily(func, logits: LazyLogits, args: tuple, kwargs: dict) -> Tensor | None:
    """``func(*args, **kwargs)``, whose first argument is ``logits``, without computing them; None
    if it cannot be."""
    if func is F.cross_entropy:
        return _cross_entropy(
            logits, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"}
        )
    rest = args[1:]
    scale, softcap = logits.scale, logits.softcap
    if func in _SCALES:
        if kwargs or len(rest) != 1 or type(rest[0]) not in (int, float) or not rest[0] > 0:
            return None
        factor = 1 / rest[0] if _SCALES[func] == "divide" else rest[0]
        scale, softcap = scale * factor, None if softcap is None else softcap * factor
    elif func in _TANH:
        if softcap is not None:
            return None
        softcap = 1.0
    elif func is Tensor.to:
        if kwargs or rest != (torch.float32,):
            return None
    elif func not in _RESHAPES:
        return None
    with torch._C.DisableTorchFunctionSubclass():
        like = torch.empty(logits.shape, dtype=logits.dtype, device="meta")
    like = func(like, *rest, **kwargs)
    if like.shape[-1:] != logits.shape[-1:] or like.numel() != logits.numel():
        return None
    return logits.then(lambda value: func(value, *rest, **kwargs), like, scale, softcap)


def _cross_entropy(
    logits,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
) -> Tensor | None:
    """F.cross_entropy, whose parameters these are."""
    classes = target.dtype == torch.int64 and target.dim() == 1 and logits.dim() == 2
    if (
        not classes
        or reduction == "none"
        or any(old is not None for old in (weight, size_average, reduce))
    ):
        return None
    loss = logits.source.cross_entropy(
        target,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        softcap=logits.softcap,
        logit_scale=logits.scale,
    )
    if torch.is_autocast_enabled(logits.device.type):  # which takes cross_entropy in float32
        return loss
    return loss.to(logits.dtype)


_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda")),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
}
_SCALES = {
    Tensor.mul: "multiply",
    Tensor.__mul__: "multiply",
    Tensor.__rmul__: "multiply",
    torch.mul: "multiply",
    Tensor.div: "divide",
    Tensor.__truediv__: "divide",
    torch.div: "divide",
}
_TANH = {Tensor.tanh, torch.tanh}
_RESHAPES = {
    Tensor.float,
    Tensor.view,
    Tensor.reshape,
    Tensor.contiguous,
    Tensor.flatten,
    torch.flatten,
    torch.reshape,
}
