"""Models that follow the trained one: TRL's reference models (``sync_ref_model``) and teachers."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..layers.module import losia_layers


class Weights:
    """A model's parameters without its subnets, whose values are in its weights."""

    def __init__(self, model: nn.Module):
        self._model = model

    def parameters(self) -> Iterator[Tensor]:
        subnets = {id(layer.subnet) for _, layer in losia_layers(self._model)}
        return (p for p in self._model.parameters() if id(p) not in subnets)


def sync_by_weights(callbacks: Iterable[Any]) -> None:
    """Let TRL's callbacks that mix the trained model into another pair their weights.

    They pair all parameters in order, and a plain model has no subnets.
    """
    for callback in callbacks:
        sync = getattr(callback, "sync_target_model", None)
        if sync is not None and "sync_target_model" not in vars(callback):
            callback.sync_target_model = partial(_sync, sync)


def _sync(sync: Any, model: nn.Module, target: nn.Module, alpha: float) -> None:
    sync(Weights(model), Weights(target), alpha)
