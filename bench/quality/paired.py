"""Means, spreads and paired tests."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIGNIFICANT = 0.05
FLIPS = 20_000
EXACT_UP_TO = 14  # differences of which all sign patterns are gone through


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def sign_flip_test(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of the mean of paired ``differences`` if each sign were a coin's toss. Raises ValueError for none."""
    values = np.asarray(differences, dtype=np.float64)
    if not len(values):
        raise ValueError("sign_flip_test: there are no differences")
    observed = abs(values.sum()) * (1 - 1e-12)
    if len(values) <= EXACT_UP_TO:
        patterns = (np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1
        return float((np.abs((2 * patterns - 1) @ values) >= observed).mean())
    generator = np.random.default_rng(seed)
    extreme = 0
    for _ in range(20):
        signs = generator.integers(0, 2, size=(FLIPS // 20, len(values)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ values) >= observed).sum())
    return (extreme + 1) / (FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p of several tests together (Holm's step-down), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - place)))
        adjusted[i] = largest
    return adjusted


@dataclass(frozen=True)
class Paired:
    """``differences``: of each held-out item, over the shared seeds; ``seeds``: of each seed, over the items. Means."""

    differences: list[float]
    seeds: list[float]

    @property
    def mean(self) -> float:
        return sum(self.differences) / len(self.differences)

    @property
    def half_width(self) -> float:
        """Of the 95 % interval of the mean over items, by the normal distribution."""
        _, spread = mean_and_spread(self.differences)
        return math.inf if spread is None else 1.96 * spread / math.sqrt(len(self.differences))

    @functools.cached_property
    def p(self) -> float:
        return sign_flip_test(self.differences)

    def verdict(self, p: float) -> str:
        """ "more" or "less" where the test over items, of which ``p`` comes, and every seed say so; else ""."""
        if p >= SIGNIFICANT or not all(seed * self.mean > 0 for seed in self.seeds):
            return ""
        return "more" if self.mean > 0 else "less"

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half_width:.3f}"


def paired(first: list[dict], second: list[dict], value: str, group: str = "") -> Paired | None:
    """``first - second`` on the items of a group; "nll": nats an item, "right": lines. None without a shared seed.

    Raises ValueError if the two were scored on other items."""
    column = {"nll": 0, "right": 3}[value]
    by_seed = {result["run"]["seed"]: result for result in second}
    seeds = ((mine, by_seed.get(mine["run"]["seed"])) for mine in first)
    pairs = [(mine, other) for mine, other in seeds if other]
    if not pairs:
        return None
    if len({result["items"] for pair in pairs for result in pair}) > 1:
        raise ValueError("paired: scored on different items")
    each = []
    for pair in pairs:
        scores = zip(*(of_group(result, group) for result in pair), strict=True)
        each.append([a[column] - b[column] for a, b in scores])
    means = [sum(values) / len(values) for values in each]
    return Paired([sum(values) / len(values) for values in zip(*each, strict=True)], means)


def of_group(result: dict, group: str) -> list[list]:
    """The scores of the items of one group. Results without ``groups`` hold one group after another."""
    scores = result["scores"]["held_out"].items()
    groups = result.get("groups") or [(name, score["items"]) for name, score in scores]
    names = [name for name, count in groups for _ in range(count)]
    return [score for score, name in zip(result["each"], names, strict=True) if name == group]
