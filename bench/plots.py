"""Pictures of one device's results, as SVG that comes out the same each time."""

import re
from pathlib import Path
from typing import Any

from .methods import METHODS
from .slopes import PERIODS, UNITS, fit_line, localization_share, scaled, series


def draw_plots(files: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw each picture from the newest of a device's ``files`` (newest first) that has the
    figures; returns the paths."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "losia", "svg.fonttype": "none", "figure.figsize": (7, 4)})
    provenance = files[0]["provenance"]
    drawn = []
    for name, draw in PICTURES.items():
        figure = plt.figure(layout="constrained")
        if any(
            draw(figure, [row for row in file["rows"] if row["status"] == "ok"]) for file in files
        ):
            folder.mkdir(parents=True, exist_ok=True)
            figure.suptitle(f"{provenance['device']} ({provenance['kind']})", fontsize=9)
            path = picture_path(folder, provenance, name)
            figure.savefig(path, metadata={"Date": None})
            drawn.append(path)
        plt.close(figure)
    return drawn


def picture_path(folder: Path, provenance: dict[str, Any], name: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", provenance["device"].lower()).strip("-")
    return folder / f"{slug}-{name}.svg"


def _model_rows(rows: list[dict], checkpointing: bool) -> list[dict]:
    """The default runs of the first model, in the methods' order."""
    chosen = [
        row
        for row in rows
        if row["id"]["suite"] == "model" and row["id"]["checkpointing"] == checkpointing
    ]
    chosen = [
        row
        for row in chosen
        if row["id"]["model"] == chosen[0]["id"]["model"]
        and row["id"]["batch"] == chosen[0]["id"]["batch"]
        and row["id"].get("rank", 64) == 64
        and row["id"].get("output_dim_factor", 0.0) == 0.0
    ]
    order = list(METHODS)
    return sorted(chosen, key=lambda row: order.index(row["id"]["name"]))


def _caption(chosen: list[dict]) -> str:
    first = chosen[0]["id"]
    return f"{first['model']}, {'with' if first['checkpointing'] else 'without'} checkpointing"


def _latency(figure, rows: list[dict]) -> bool:
    """The paper's Figure 11: forward, backward and other, stacked, with and without
    checkpointing."""
    kinds = [checkpointing for checkpointing in (True, False) if _model_rows(rows, checkpointing)]
    for place, checkpointing in enumerate(kinds):
        chosen = _model_rows(rows, checkpointing)
        axes = figure.add_subplot(1, len(kinds), place + 1)
        start = [0.0] * len(chosen)
        for phase in ("forward", "backward", "other"):
            width = [row["us_per_token"][phase] for row in chosen]
            axes.barh([row["id"]["name"] for row in chosen], width, left=start, label=phase)
            start = [a + b for a, b in zip(start, width, strict=True)]
        axes.invert_yaxis()
        axes.set_title(_caption(chosen), fontsize=9)
        axes.set_xlabel("us a token")
        axes.legend(fontsize=7)
    return bool(kinds)


def _memory(figure, rows: list[dict]) -> bool:
    """The paper's Figure 12: the peak of each method."""
    kinds = [checkpointing for checkpointing in (True, False) if _model_rows(rows, checkpointing)]
    for place, checkpointing in enumerate(kinds):
        chosen = _model_rows(rows, checkpointing)
        axes = figure.add_subplot(1, len(kinds), place + 1)
        axes.barh(
            [row["id"]["name"] for row in chosen], [row["peak_bytes"] / 1e9 for row in chosen]
        )
        axes.invert_yaxis()
        axes.set_title(_caption(chosen), fontsize=9)
        axes.set_xlabel(
            "peak GB" if "predicted_bytes" in chosen[0] else "peak GB above a step's start"
        )
    return bool(kinds)


def _scaling(figure, rows: list[dict]) -> bool:
    chosen = [row for row in rows if row["id"]["suite"] == "scaling"]
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
        slope, intercept = fit_line([scaled(name, value) for value in x], y)
        fitted = [slope * scaled(name, value) + intercept for value in x]
        axes.plot(x, fitted, "--", label=f"{slope:.3g} ms / {UNITS[name]}")
        axes.legend(fontsize=7)
        axes.set_xlabel(name)
        axes.set_ylabel("ms over the floor" if name == "p" else "ms a step")
    return bool(places)


PICTURES = {"latency": _latency, "memory": _memory, "scaling": _scaling}
