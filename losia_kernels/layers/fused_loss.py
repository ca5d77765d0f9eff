"""A model's own forward, with a loss that needs no logits: that of ``losia_linear_cross_entropy``.

While it is called with ``labels=``, its output layer returns ``LazyLogits``: a tensor that only
notes what is done to it. Scaling, soft-capping, casting and reshaping are noted, and
``cross_entropy`` of the result is computed without it ever existing. Anything else gets the logits,
computed as always. So no model's forward has to be known, and none is replaced: after the forward
the model is as it was.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..parallel.placement import is_gathered_for_use
from .lazy_logits import lazy_logits, warn_once
from .linear import LoSiALinear


def fuse_loss(model: nn.Module, output_layer: str) -> None:
    """Let ``model(labels=..., ...)`` compute its loss without logits, where that is exact.

    ``apply_losia`` does this if ``config.fused_loss`` and undoes it in ``remove_losia``. The logits
    in such a forward's output are computed if they are read, of which training warns once. An
    evaluation's loss needs no more memory than training's. Generation and calls without labels are
    as ever; so is a model under ``torch.compile``, and one that something else has changed (a
    warning says what).

    Args:
        output_layer: name of the vocabulary projection, an nn.Linear or a LoSiALinear.
    """
    FusedLoss(model, output_layer)


def unfuse_loss(model: nn.Module) -> None:
    """Undo ``fuse_loss``, also inside a wrapper such as DistributedDataParallel."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, FusedLoss):
                owner.remove()


class FusedLoss:
    """The two hooks on a model: for the time of its forward the output layer is lazy."""

    def __init__(self, model: nn.Module, output_layer: str):
        self.output_layer = output_layer
        self.handles = [
            model.register_forward_pre_hook(self.begin, with_kwargs=True),
            model.register_forward_hook(self.end, always_call=True),
        ]

    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling() or kwargs.get("labels") is None:
            return
        head: Any = model.get_submodule(self.output_layer)
        obstacle = find_obstacle(model, head)
        if obstacle:
            warn_once(
                f"LoSiA: {type(model).__name__} computes its loss from whole logits: {obstacle}"
            )
            return
        head.forward = functools.partial(lazy_logits, head, [])

    def end(self, model: nn.Module, args: tuple, output: object) -> None:
        head: Any = model.get_submodule(self.output_layer)
        lazy: Any = head.__dict__.get("forward")
        if getattr(lazy, "func", None) is lazy_logits:
            for source in lazy.args[1]:
                source.finished = True
            del head.forward
            returned = output is not None  # else the forward has raised
            if returned and not lazy.args[1] and torch.is_grad_enabled():
                check_called(head)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def check_called(head: nn.Module) -> None:
    """Raises RuntimeError for a trained output layer that a forward with labels did not call."""
    if isinstance(head, LoSiALinear) and head.subnet.requires_grad:
        raise RuntimeError(goes_round(head.name))


def goes_round(name: str) -> str:
    """What is said of a loss that leaves the output layer ``name`` without its gradient."""
    return (
        f"{name}: the loss gave the output layer's subnet no gradient, so it reads {name}.weight past "
        f"the layer, as the losses of TRL's SFTTrainer, DPOTrainer, GRPOTrainer and others do, and "
        f"Liger's. Turn that off if it can be (Liger: fused_linear_cross_entropy=False; apply_losia's "
        f"own fused loss needs no logits either), or set output_dim_factor=0 to leave the layer frozen"
    )


def find_obstacle(model: nn.Module, head: Any) -> str | None:
    """What keeps the output layer from being lazy, or None."""
    if type(head) not in (nn.Linear, LoSiALinear):  # fully_shard changes the class of what it cuts
        return f"its output layer is a {type(head).__name__}"
    if is_gathered_for_use(model, head.weight):
        return "its weights are in shards"
    if F.cross_entropy.__module__ != F.__name__:
        return f"{F.cross_entropy.__module__} has replaced torch's cross_entropy"
    if head._forward_hooks or head._forward_pre_hooks or "forward" in head.__dict__:
        return "something is hooked to its output layer"
    if head._compiled_call_impl is not None:
        return "its output layer is compiled"
    if isinstance(head, LoSiALinear) and head.stands_in(head.subnet):
        return "another subnet stands in for its output layer's"
    if isinstance(head, LoSiALinear) and head.subnet.shape[1] != head.in_features:
        return "its output layer trains some of its inputs only"
    return None
