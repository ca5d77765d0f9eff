"""The pictures of a run, each a figure made from its numbers; ``plots`` finds the numbers and
saves the figures.

Shares are drawn on one scale from 0 to 1, so that equal ones look equal in every panel and run.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from ..integrations.history import Place, SubnetHistory
from ..training.schedule import Schedule

BINS = 192  # of neighbouring neurons, across a panel
SLICES = 8  # of the run's time, within a layer's band
COLUMNS = 3000  # of the run's time, across the timeline
LABELS = 12  # layers that an axis numbers
SIDES = ("output", "input")
GREY, ORANGE = "0.75", "tab:orange"
# Layers of one kind, each with the number of its block.
Kinds = dict[str, list[tuple[str, Any]]]


def draw_timeline(history: SubnetHistory, last: int) -> Figure:
    """Groups over steps: their slots, the rewarming after, and each move, coloured by what it
    did."""
    config, groups = history.config, history.groups
    schedule = Schedule(
        len(groups),
        config["period"],
        config["update_type"],
        config["warmup_steps"],
        config["rewarm"],
        moves=config.get("moves", "importance"),
    )
    columns = min(last, COLUMNS)
    observing, factor = np.zeros((2, len(groups), columns))
    for column in range(columns):
        step = column * last // columns
        observing[list(schedule.observing(step)), column] = 1
        factor[:, column] = [schedule.lr_factor(group, step) for group in range(len(groups))]
    shown = {"overlap": "How much of its subnet a move kept"}
    if _by_move(history, "captured"):  # sums of rows and columns do not tell
        shown["captured"] = "How much of the importance the new subnet holds"
    figure = Figure(
        figsize=(1.5 + 6 * len(shown), max(3.2, 2 + 0.22 * len(groups))), layout="constrained"
    )
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (what, title) in zip(panels, shown.items(), strict=True):
        extent = (0, last, len(groups) - 0.5, -0.5)
        rewarmed = np.where(factor < 1, 1 - factor, np.nan)
        _cells(axes, rewarmed, extent=extent, cmap="Oranges", vmin=-0.3, vmax=1.5)
        observed = np.where(observing == 1, 0.35, np.nan)
        _cells(axes, observed, extent=extent, cmap="Greys", vmin=0, vmax=1)
        moves = _by_move(history, what)
        steps, moved = zip(*moves, strict=True) if moves else ((), ())
        dots = axes.scatter(
            steps,
            moved,
            c=list(moves.values()),
            cmap="viridis",
            vmin=0,
            vmax=1,
            s=42,
            edgecolors="black",
            linewidths=0.5,
            zorder=3,
            clip_on=False,
        )
        axes.set(
            xlabel="optimizer step", ylabel="group (decoder block)", title=title, xlim=(0, last)
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_yticks(range(len(groups)), [_short_group(name) for name in groups])
    figure.colorbar(
        dots, ax=list(panels), label="dots: mean of the layers", format=PercentFormatter(1)
    )
    ring: dict[str, Any] = {"linestyle": "", "markerfacecolor": "white", "markeredgecolor": "black"}
    marks: list[Any] = [Patch(color=GREY, label="group observes")] if observing.any() else []
    if (factor < 1).any():
        marks.append(Patch(color=ORANGE, label="its rate is rewarmed (dark: low)"))
    marks.append(Line2D([], [], marker="o", label="its subnets move", **ring))
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks))
    return figure


def draw_subnets(history: SubnetHistory, last: int) -> Figure:
    """Which neurons are trained: a panel for each kind of layer and side; in it a band a layer,
    time running down."""

    def rows(places: list[Place], side: int) -> np.ndarray:
        times = (np.arange(SLICES) + 0.5) * last / SLICES
        current = [
            max((place for place in places if place.step <= time), key=lambda place: place.step)
            for time in times
        ]
        return np.stack([_density(idx_of(place, side), place.features[side]) for place in current])

    figure = _panels(
        _by_kind(history.of_layers(), lambda places: places[0].features),
        rows,
        PowerNorm(0.5, 0, 1),  # a share of the rank factor is seen beside one of 1
        "Blues",
        "Which neurons are trained. A layer's band: the run, from its start (top) to its end",
        label="share of the neurons of a bin that are trained",
        ticks=[0, 0.02, 0.1, 0.25, 0.5, 1],
        format=PercentFormatter(1),
    )
    return figure


def draw_frequency(history: SubnetHistory, last: int) -> Figure:
    """How much of the run each neuron is trained, most trained first; the mean over the layers of a
    kind."""
    kinds = _by_kind(history.of_layers(), lambda places: places[0].features)
    colours = matplotlib.colormaps["tab10" if len(kinds) <= 10 else "tab20"]
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for side, axes in enumerate(panels):
        shares = set()
        for number, layers in enumerate(kinds.values()):
            curves = [np.sort(time_trained(places, side, last))[::-1] for _, places in layers]
            if all(curve.min() == 1 for curve in curves):
                continue  # a side that is taken whole: an output layer's inputs
            edges = np.linspace(0, 1, len(curves[0]) + 1)
            colour = colours(number % colours.N)
            shares |= {
                len(idx_of(places[0], side)) / places[0].features[side] for _, places in layers
            }
            axes.stairs(np.mean(curves, axis=0), edges, color=colour, linewidth=1.5, baseline=None)
        for share in shares:
            axes.plot([0, share, share, 1], [1, 1, 0, 0], color="0.5", linestyle="--", linewidth=1)
        axes.set(
            xlabel=f"share of a layer's {SIDES[side]} neurons, most trained first",
            ylabel="share of the steps in which it is trained",
            xlim=(0, 1),
            ylim=(-0.02, 1.02),
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
    names = [
        Line2D([], [], color=colours(number % colours.N), label=kind)
        for number, kind in enumerate(kinds)
    ]
    still = Line2D([], [], color="0.5", linestyle="--", label="if no subnet\never moved")
    figure.legend(handles=[*names, still], loc="outside right center")
    figure.suptitle("How much of the run a neuron is trained (mean of the layers of a kind)")
    return figure


def draw_gradients(sums: dict[str, tuple[Tensor, Tensor]]) -> Figure:
    """Row and column sums of |g|, in units of their mean."""

    def rows(layer: tuple[Tensor, Tensor], side: int) -> np.ndarray:
        values = layer[side].numpy()
        return _binned(values / (values.mean() or 1), np.maximum.reduceat)[None]

    kinds = _by_kind(sums, lambda layer: (len(layer[0]), len(layer[1])))
    every = [
        rows(layer, side) for layers in kinds.values() for _, layer in layers for side in (0, 1)
    ]
    limit = max(2.0, float(np.percentile(np.concatenate(every, axis=None), 99.5)))
    ticks = [2.0**power for power in range(-2, 11) if 2.0**power <= limit]
    figure = _panels(
        kinds,
        rows,
        LogNorm(0.25, limit, clip=True),
        "magma",
        "Where the gradients are large before training: sums of |gradient| over each neuron's weights",
        label="sum over a neuron's weights, in means of its layer (largest of a bin)",
        ticks=ticks,
        format="{x:g}",
        extend="both",
    )
    return figure


def draw_singular_vectors(similarity: dict[str, Tensor]) -> Figure:
    """Similarity of the i-th singular vectors before and after: layers over i, a panel for each
    kind of layer."""
    kinds = _by_kind(similarity, lambda layer: (len(layer),))
    columns = min(4, len(kinds))
    lines = -(-len(kinds) // columns)
    size = max(10, 1.5 + 3.2 * columns), 0.8 + 3.2 * lines  # the title needs its width
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes, (kind, layers) in zip(panels.flat, kinds.items(), strict=False):
        values = np.stack([layer.numpy() for _, layer in layers])
        extent = (0.5, values.shape[1] + 0.5, len(layers) - 0.5, -0.5)
        drawn = _cells(axes, values, vmin=0, vmax=1, cmap="viridis", extent=extent)
        axes.set(title=kind, xlabel="number of the singular vector", ylabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _number_layers(axes, layers)
    for axes in panels.flat[len(kinds) :]:
        axes.remove()
    figure.colorbar(
        drawn,
        ax=list(panels.flat[: len(kinds)]),
        label="|cosine| between the vector before and after",
    )
    figure.suptitle(
        "How far training turned the weights' left singular vectors (1: not at all; largest singular value first)"
    )
    return figure


def time_trained(places: list[Place], side: int, last: int) -> np.ndarray:
    """For each neuron, the share of the run in which it is in the subnet."""
    trained = np.zeros(places[0].features[side])
    ends = [place.step for place in places[1:]] + [last]
    for place, end in zip(places, ends, strict=True):
        trained[idx_of(place, side)] += (end - place.step) / last
    return trained


def idx_of(place: Place, side: int) -> np.ndarray:
    """The chosen neurons of a side: 0, outputs, or 1, inputs."""
    return (place.out_idx, place.in_idx)[side]


def _cells(axes: Axes, values: np.ndarray, **look: Any) -> Any:
    """Each value as a cell of one colour, over the whole panel."""
    return axes.imshow(values, aspect="auto", interpolation="nearest", **look)


def _panels(
    kinds: Kinds, rows: Callable, norm: Normalize, cmap: str, title: str, **bar: Any
) -> Figure:
    """Two panels (outputs, inputs) for each kind of layer; in each, the ``rows(layer, side)`` of
    all its layers. ``bar``: of the colour bar, which all panels share."""
    heights = [1.2 + 0.075 * len(layers) for layers in kinds.values()]
    figure = Figure(figsize=(13, 1.4 + sum(heights)), layout="constrained")
    panels = figure.subplots(len(kinds), 2, squeeze=False, height_ratios=heights)
    for line, (kind, layers) in zip(panels, kinds.items(), strict=True):
        for side, axes in enumerate(line):
            bands = [rows(layer, side) for _, layer in layers]
            extent = (0, _neurons(layers[0][1], side), len(layers) - 0.5, -0.5)
            drawn = _cells(axes, np.concatenate(bands), cmap=cmap, norm=norm, extent=extent)
            if len(bands[0]) > 1:
                axes.hlines(
                    np.arange(1, len(layers)) - 0.5, *extent[:2], color="0.75", linewidth=0.5
                )
            axes.set(xlabel=f"{SIDES[side]} neuron of {kind}", ylabel="layer")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            _number_layers(axes, layers)
    drawn_bar = figure.colorbar(
        drawn, ax=panels, location="top", shrink=0.6, aspect=40, pad=0.01, **bar
    )
    drawn_bar.minorticks_off()
    figure.suptitle(title)
    return figure


def _neurons(layer: Any, side: int) -> int:
    """How many a layer has on a side: of its places, or of its sums."""
    first = layer[0]
    return first.features[side] if isinstance(first, Place) else len(layer[side])


def _number_layers(axes: Axes, layers: Sequence[tuple[str, Any]]) -> None:
    """Ticks with the numbers of the layers' blocks, as many as can be read; the name of a layer of no
    block."""
    every = -(-len(layers) // LABELS)
    axes.set_yticks(range(0, len(layers), every), [number for number, _ in layers[::every]])


def _by_kind(layers: dict[str, Any], shape: Callable[[Any], tuple]) -> Kinds:
    """Layers of one shape that differ in their numbers only, by the last part of their name where
    that tells them apart; in model order."""
    found: dict[tuple, list[tuple[str, Any]]] = {}
    for name, layer in layers.items():
        pattern, numbers = re.sub(r"\.\d+\.", ".*.", name), re.findall(r"\.(\d+)(?=\.)", name)
        label = ".".join(numbers) or name.rpartition(".")[2]
        found.setdefault((pattern, shape(layer)), []).append((label, layer))
    patterns = [pattern for pattern, _ in found]
    short = [pattern.rpartition(".")[2] for pattern in dict.fromkeys(patterns)]
    kinds: Kinds = {}
    for (pattern, sizes), each in found.items():
        last = pattern.rpartition(".")[2]
        kind = last if short.count(last) == 1 else pattern
        if patterns.count(pattern) > 1:
            kind += f" ({' x '.join(map(str, sizes))})"
        kinds[kind] = each
    return kinds


def _by_move(history: SubnetHistory, what: str) -> dict[tuple[int, int], float]:
    """(step, number of the group) -> the mean of an attribute over the layers that moved then."""
    found: dict[tuple[int, int], list[float]] = {}
    for place in history.places:
        if getattr(place, what) is not None:
            found.setdefault((place.step, history.groups.index(place.group)), []).append(
                getattr(place, what)
            )
    return {move: float(np.mean(values)) for move, values in found.items()}


def _density(idx: np.ndarray, features: int) -> np.ndarray:
    chosen = np.zeros(features)
    chosen[idx] = 1
    return _binned(chosen, np.add.reduceat) / _binned(np.ones(features), np.add.reduceat)


def _binned(values: np.ndarray, reduceat: Callable) -> np.ndarray:
    return reduceat(
        values, np.linspace(0, len(values), min(BINS, len(values)), endpoint=False).astype(int)
    )


def _short_group(name: str) -> str:
    return re.sub(r"^.*\.(\d+)$", r"\1", name)
