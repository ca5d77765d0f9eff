"""Fitted slopes of the scaling suite, and what localization costs as a share of a step."""

from typing import Any

import numpy as np

Rows = list[dict[str, Any]]
UNITS = {"p": "p^2", "tokens": "1000 tokens", "layers": "layer"}
PERIODS = (25, 50, 100, 150, 400)


def series(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """The swept values and what is plotted over them, sorted: ms over the floor for "p", else ms of a step."""
    points = []
    for row in rows:
        if row["id"]["name"] == name:
            floor = row["floor_ms"] if name == "p" else 0
            points.append((float(row["id"][name]), row["total"]["ms"] - floor))
    return [x for x, _ in sorted(points)], [y for _, y in sorted(points)]


def scaled(name: str, value: float) -> float:
    """What the cost should be linear in, in ``UNITS[name]``."""
    return value**2 if name == "p" else value / 1000 if name == "tokens" else value


def fit_line(name: str, x: list[float], y: list[float]) -> tuple[float, float]:
    slope, intercept = np.polyfit([scaled(name, value) for value in x], y, 1)
    return float(slope), float(intercept)


def localization_share(row: dict[str, Any], period: int) -> float:
    """Share of a step that goes to localization: one layer of many observes, and moves once in ``period`` steps."""
    resting = row["resting"]["total"]["ms"]
    localizing = row["observing"]["total"]["ms"] - resting + row["relocalization_ms"] / period
    return localizing / (row["layers"] * resting + localizing)


def describe_slopes(rows: Rows) -> str:
    lines = []
    for name, what in (("p", "ms over the floor"), ("tokens", "ms a layer"), ("layers", "ms")):
        x, y = series(rows, name)
        if len(x) < 2:
            continue
        slope, intercept = fit_line(name, x, y)
        measured = ", ".join(f"{a:g}: {b:.4g}" for a, b in zip(x, y, strict=True))
        lines.append(
            f"- {name}: {slope:.4g} ms per {UNITS[name]}, {intercept:.4g} ms at 0 ({what}; {measured})"
        )
    for row in rows:
        if row["id"]["name"] == "relocalization":
            resting, observing = (row[kind]["total"]["ms"] for kind in ("resting", "observing"))
            shares = (f"T {T}: {100 * localization_share(row, T):.2f} %" for T in PERIODS)
            lines.append(
                f"- T: observing adds {observing - resting:.4g} ms to a layer's step of {resting:.4g} ms, "
                f"moving its seven subnets {row['relocalization_ms']:.4g} ms once in T steps; both as a share "
                f"of a step of {row['layers']} layers, {', '.join(shares)}"
            )
    return "\n".join(lines)
