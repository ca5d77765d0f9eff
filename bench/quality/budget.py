"""A rank factor for each layer, by what its subnet would capture: as many trained values in all as
one factor gives."""

import heapq
import re
from typing import Any

from torch import Tensor, nn

from losia_kernels.layers.subnet import subnet_size
from losia_kernels.training.selection import select_subnet

from ..methods.base import decoder_linears
from .importance import observe

LEVELS = tuple(
    2 ** (step / 2) / 32 for step in range(9)
)  # 1/32 to 1/2; each step doubles the trained values


def captured_by_level(scores: Tensor) -> list[float]:
    """The importance in the greedy subnet (Algorithm 1) at each of LEVELS."""
    found = []
    for level in LEVELS:
        subnet = select_subnet(
            scores, *(subnet_size(level, size, "a layer") for size in scores.shape)
        )
        found.append(float(subnet.captured) * float(scores.sum()))
    return found


def rank_pattern(
    captured: dict[str, list[float]], shapes: dict[str, tuple[int, int]], rank_factor: float
) -> dict:
    """``{name: factor}``: from the lowest level up, always the step that captures most for a value
    trained more, while it fits what ``rank_factor`` for all layers would train."""

    def values(name: str, level: float) -> int:
        k_out, k_in = (subnet_size(level, size, name) for size in shapes[name])
        return k_out * k_in

    def step(name: str, place: int) -> tuple[float, str, int]:
        more = values(name, LEVELS[place]) - values(name, LEVELS[place - 1])
        return -(captured[name][place] - captured[name][place - 1]) / max(1, more), name, place

    left = sum(values(name, rank_factor) - values(name, LEVELS[0]) for name in shapes)
    places = dict.fromkeys(shapes, 0)
    steps = [step(name, 1) for name in shapes]
    heapq.heapify(steps)
    while steps:
        _, name, place = heapq.heappop(steps)
        more = values(name, LEVELS[place]) - values(name, LEVELS[place - 1])
        if more > left:
            continue
        left -= more
        places[name] = place
        if place + 1 < len(LEVELS):
            heapq.heappush(steps, step(name, place + 1))
    return {name: LEVELS[place] for name, place in places.items()}


def by_importance(
    model: nn.Module, batches: Any, count: int, rank_factor: float
) -> dict[str, float]:
    """LoSiAConfig's ``rank_pattern`` for ``model``. Leaves gradients None."""
    _, importance = observe(model, decoder_linears(model), batches, count)
    captured = {name: captured_by_level(scores) for name, scores in importance.items()}
    shapes = {name: tuple(scores.shape) for name, scores in importance.items()}
    return {re.escape(name): p for name, p in rank_pattern(captured, shapes, rank_factor).items()}
