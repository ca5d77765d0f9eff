"""Fitted slopes of the scaling suite, and what localization costs as a share of a step."""

from typing import Any

import numpy as np

Rows = list[dict[str, Any]]
PERIODS = (50, 100, 150)


def series(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """The swept values and what is plotted over them, sorted: ms over the floor for "p", else ms of a step."""
    points = []
    for row in rows:
        if row["id"]["name"] == name:
            over_floor = row["total"]["ms"] - row["floor_ms"] if name == "p" else row["total"]["ms"]
            points.append((float(row["id"][name]), over_floor))
    points.sort()
    return [x for x, _ in points], [y for _, y in points]


def fit_line(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope and intercept of least squares."""
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept)


def localization_share(row: dict[str, Any], period: int) -> float:
    """Share of a layer's step in its slot that goes to moving its subnets, spread over the slot's ``period`` steps."""
    moving = row["relocalization_ms"] / period
    return moving / (row["observing"]["total"]["ms"] + moving)


def describe_slopes(rows: Rows) -> str:
    lines = []
    units = {"p": ("p^2", "ms over the floor"), "tokens": ("1000 tokens", "ms a layer"), "layers": ("layer", "ms")}
    for name, (unit, what) in units.items():
        x, y = series(rows, name)
        if len(x) < 2:
            continue
        scaled = [value**2 for value in x] if name == "p" else [v / 1000 for v in x] if name == "tokens" else x
        slope, intercept = fit_line(scaled, y)
        measured = ", ".join(f"{a:g}: {b:.4g}" for a, b in zip(x, y, strict=True))
        lines.append(f"- {name}: {slope:.4g} ms per {unit}, {intercept:.4g} ms at 0 ({what}; {measured})")
    for row in rows:
        if row["id"]["name"] == "relocalization":
            shares = ", ".join(f"T {period}: {100 * localization_share(row, period):.2f} %" for period in PERIODS)
            lines.append(
                f"- T: moving one layer's seven subnets takes {row['relocalization_ms']:.4g} ms, once in its slot; "
                f"spread over the slot, as a share of the layer's steps: {shares}"
            )
    return "\n".join(lines)
