"""Gradients and importance of an untrained model's weights; a rank factor for each layer from what its subnet would
capture."""

import heapq
import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from losia_kernels.layers.subnet import subnet_size
from losia_kernels.training.selection import select_subnet

from .base import decoder_linears

LEVELS = tuple(2 ** (step / 2) / 32 for step in range(9))  # 1/32 to 1/2; each doubles the values


def observe(
    model: nn.Module, names: Iterable[str], batches: Collection[Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """|g| and the importance |gW - (gW)²/2| (Eq. 3) of the layers ``names``, each ``[out, in]``: means over the
    batches, straight from autograd. Leaves gradients None."""
    batches = list(batches)
    weights = {name: model.get_submodule(name).weight.requires_grad_(True) for name in names}
    gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    importance = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in batches:
        grads = torch.autograd.grad(model(**batch).loss, list(weights.values()))
        for (name, weight), grad in zip(weights.items(), grads, strict=True):
            product = grad * weight.detach()
            gradients[name] += grad.abs() / len(batches)
            importance[name] += (product - product**2 / 2).abs() / len(batches)
    return gradients, importance


def captured_by_level(scores: Tensor) -> list[float]:
    """The importance in the greedy subnet (Algorithm 1) at each of LEVELS."""
    total = float(scores.sum())
    sizes = [[subnet_size(level, size, "a layer") for size in scores.shape] for level in LEVELS]
    return [float(select_subnet(scores, *size).captured) * total for size in sizes]


def rank_pattern(
    captured: dict[str, list[float]], shapes: dict[str, tuple[int, int]], rank_factor: float
) -> dict[str, float]:
    """``{name: factor}``: from the lowest level up, always the step that captures most for a value trained more, while
    it fits what ``rank_factor`` for all layers would train."""

    def values(name: str, level: float) -> int:
        k_out, k_in = (subnet_size(level, size, name) for size in shapes[name])
        return k_out * k_in

    def more(name: str, place: int) -> int:
        return values(name, LEVELS[place]) - values(name, LEVELS[place - 1])

    def step(name: str, place: int) -> tuple[float, str, int]:
        gain = captured[name][place] - captured[name][place - 1]
        return -gain / max(1, more(name, place)), name, place

    left = sum(values(name, rank_factor) - values(name, LEVELS[0]) for name in shapes)
    places = dict.fromkeys(shapes, 0)
    steps = [step(name, 1) for name in shapes]
    heapq.heapify(steps)
    while steps:
        _, name, place = heapq.heappop(steps)
        if more(name, place) > left:
            continue
        left -= more(name, place)
        places[name] = place
        if place + 1 < len(LEVELS):
            heapq.heappush(steps, step(name, place + 1))
    return {name: LEVELS[place] for name, place in places.items()}


def rank_pattern_of(
    model: nn.Module, batches: Iterable[Any], rank_factor: float
) -> dict[str, float]:
    """LoSiAConfig's ``rank_pattern`` for ``model``, as many values in all as one factor gives. Leaves gradients
    None."""
    _, importance = observe(model, decoder_linears(model), batches)
    captured = {name: captured_by_level(scores) for name, scores in importance.items()}
    shapes = {name: tuple(scores.shape) for name, scores in importance.items()}
    return {re.escape(name): p for name, p in rank_pattern(captured, shapes, rank_factor).items()}
