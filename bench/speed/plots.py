"""Pictures of one device's results."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..harness.pictures import draw
from .slopes import PERIODS, UNITS, fit_line, localization_share, scaled, series
from .tables import is_default, select


def draw_plots(groups: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw each picture from the newest of a device's ``groups`` (newest first) that has the figures; the paths."""
    provenance = groups[0]["provenance"]

    def first(figure, picture: Callable) -> bool:
        ok = ([row for row in group["rows"] if row["status"] == "ok"] for group in groups)
        figure.suptitle(f"{provenance['device']} ({provenance['kind']})", fontsize=9)
        return any(picture(figure, rows) for rows in ok)

    paths = zip(PICTURES.values(), picture_paths(groups, folder), strict=True)
    return draw({path.stem: functools.partial(first, picture=p) for p, path in paths}, folder)


def picture_paths(groups: list[dict[str, Any]], folder: Path) -> list[Path]:
    slug = re.sub(r"[^a-z0-9]+", "-", groups[0]["provenance"]["device"].lower()).strip("-")
    return [folder / f"{slug}-{name}.svg" for name in PICTURES]


def _model_rows(rows: list[dict], checkpointing: bool) -> list[dict]:
    """Of the first model and batch that there are."""
    chosen = list(filter(is_default, select(rows, "model", checkpointing=checkpointing)))
    sizes = [(row["id"]["model"], row["id"]["batch"]) for row in chosen]
    return [row for row, size in zip(chosen, sizes, strict=True) if size == sizes[0]]


def _bars(figure, rows: list[dict], fill: Callable) -> bool:
    found = [chosen for each in (True, False) if (chosen := _model_rows(rows, each))]
    for place, chosen in enumerate(found):
        axes, first = figure.add_subplot(1, len(found), place + 1), chosen[0]["id"]
        fill(axes, [row["id"]["name"] for row in chosen], chosen)
        axes.invert_yaxis()
        how = "with" if first["checkpointing"] else "without"
        axes.set_title(f"{first['model']}, {how} checkpointing", fontsize=9)
    return bool(found)


def _latency(axes, names: list[str], chosen: list[dict]) -> None:
    """The paper's Figure 11: forward, backward and other, stacked."""
    start = [0.0] * len(chosen)
    for phase in ("forward", "backward", "other"):
        width = [row["us_per_token"][phase] for row in chosen]
        axes.barh(names, width, left=start, label=phase)
        start = [a + b for a, b in zip(start, width, strict=True)]
    axes.set_xlabel("us a token")
    axes.legend(fontsize=7)


def _memory(axes, names: list[str], chosen: list[dict]) -> None:
    """The paper's Figure 12: the peak of each method."""
    axes.barh(names, [row["peak_bytes"] / 1e9 for row in chosen])
    whole = "predicted_bytes" in chosen[0]
    axes.set_xlabel("peak GB" if whole else "peak GB above a step's start")


def _scaling(figure, rows: list[dict]) -> bool:
    chosen = select(rows, "scaling")
    sweeps = [name for name in ("p", "tokens", "layers") if len(series(chosen, name)[0]) > 1]
    located = [row for row in chosen if row["id"]["name"] == "relocalization"]
    places = len(sweeps) + bool(located)
    for row in located:
        axes = figure.add_subplot(1, places, places)
        axes.plot(PERIODS, [100 * localization_share(row, period) for period in PERIODS], "o-")
        axes.set_xlabel("T")
        axes.set_ylabel("localization, % of a step")
    for place, name in enumerate(sweeps):
        x, y = series(chosen, name)
        axes = figure.add_subplot(1, places, place + 1)
        axes.plot(x, y, "o")
        slope, intercept = fit_line(name, x, y)
        fitted = [slope * scaled(name, value) + intercept for value in x]
        axes.plot(x, fitted, "--", label=f"{slope:.3g} ms / {UNITS[name]}")
        axes.legend(fontsize=7)
        axes.set_xlabel(name)
        axes.set_ylabel("ms over the floor" if name == "p" else "ms a step")
    return bool(places)


PICTURES: dict[str, Callable] = {
    "latency": functools.partial(_bars, fill=_latency),
    "memory": functools.partial(_bars, fill=_memory),
    "scaling": _scaling,
}
