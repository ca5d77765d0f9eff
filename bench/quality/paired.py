"""Means, spreads and paired tests."""

import math
from collections.abc import Sequence

import numpy as np

FLIPS = 20_000
EXACT_UP_TO = 14  # differences of which all sign patterns are gone through


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; of one value no spread."""
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


def item_differences(first: list[dict], second: list[dict], value: str) -> list[float]:
    """For each held-out item the mean over the shared seeds of ``first - second``; "nll": nats an item, "right": lines.

    Raises ValueError if the two have no seed in common, or were scored on other items.
    """
    column = {"nll": 0, "right": 3}[value]
    by_seed = {result["run"]["seed"]: result for result in second}
    pairs = [(mine, by_seed[mine["run"]["seed"]]) for mine in first if mine["run"]["seed"] in by_seed]
    if not pairs:
        raise ValueError("item_differences: no seed in common")
    if len({result["items"] for pair in pairs for result in pair}) > 1:
        raise ValueError("item_differences: scored on different items")
    each = [[a[column] - b[column] for a, b in zip(mine["each"], other["each"], strict=True)] for mine, other in pairs]
    return [sum(values) / len(values) for values in zip(*each, strict=True)]
