"""``losia-kernels plot RUN``: pictures of a run, as PNG files in ``RUN/plots/``.

loss.png              loss by step, with the moves of subnets
timeline.png          who observes and is rewarmed when; how much of its subnet each move kept, and what it captured
subnets.png           which neurons are trained, over layers and time (the paper's Figure 3)
frequency.png         how often each neuron is selected (Figure 7)
gradients.png         row and column sums of |g| of the model before training (Figures 2 and 9)
singular_vectors.png  how far training has turned the weights' singular vectors (Figure 8)
"""

import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .. import LoSiAConfig
from ..integrations.history import Place, SubnetHistory, read_log
from ..training.schedule import Schedule
from .data import load_data
from .folder import read_options
from .model import load_model, load_tokenizer
from .options import PICTURES, InputError
from .progress import draw_loss_curve
from .spectra import gradient_sums, singular_vector_similarity
from .trainer import sft_config

BINS = 192  # of neighbouring neurons, across a panel
# What must be there for a picture; for the others subnets.jsonl.
SOURCES = {"loss": "log.jsonl", "gradients": "run.json", "singular_vectors": "run.json"}
SLICES = 8  # of the run's time, within a layer's band
GRADIENT_BATCHES = 4


def plot_run(
    run: Path, only: Sequence[str] | None = None, vectors: int = 500, base: str | None = None
) -> list[Path]:
    """Draw the pictures named in ``only``, by default all that ``run`` has what it takes for, and
    return their files.

    ``gradients`` and ``singular_vectors`` load the base model that ``run.json`` names, or ``base``.
    Raises InputError if ``run`` lacks what a picture is made from.
    """
    if not (run / "log.jsonl").exists() and not (run / "subnets.jsonl").exists():
        raise InputError(f"{run} holds no run: it has neither log.jsonl nor subnets.jsonl")
    (run / "plots").mkdir(exist_ok=True)
    drawn = []
    for name in only or [
        name for name in PICTURES if (run / SOURCES.get(name, "subnets.jsonl")).exists()
    ]:
        picture = run / "plots" / f"{name}.png"
        if name == "loss":
            draw_loss_curve(run / "log.jsonl", picture)
        elif name in ("timeline", "subnets", "frequency"):
            history = _history(run)
            {"timeline": draw_timeline, "subnets": draw_subnets, "frequency": draw_frequency}[name](
                history, _last_step(run, history), picture
            )
        elif name == "gradients":
            draw_gradients(_gradients(run, base), picture)
        else:
            draw_singular_vectors(_similarity(run, base, vectors), picture)
        if picture.exists():
            print(picture, flush=True)
            drawn.append(picture)
    return drawn


def _history(run: Path) -> SubnetHistory:
    try:
        return SubnetHistory.read(run / "subnets.jsonl")
    except FileNotFoundError as error:
        raise InputError(str(error)) from None


def _last_step(run: Path, history: SubnetHistory) -> int:
    steps = [entry["step"] for entry in read_log(run / "log.jsonl")] + [
        place.step for place in history.places
    ]
    return max(1, *steps)


def _gradients(run: Path, base: str | None) -> dict[str, tuple]:
    options = read_options(run, base)
    given = sft_config(options)
    tokenizer, model = load_tokenizer(options, given), load_model(options, given)
    samples = load_data(options, given, tokenizer).train
    filler = tokenizer.eos_token_id  # masks go by position
    collator = DataCollatorForLanguageModeling(filler, padding_free=options.packing)
    loader: DataLoader = DataLoader(samples, options.batch_size, collate_fn=collator)
    config = LoSiAConfig(
        rank_factor=options.rank_factor, output_dim_factor=options.output_dim_factor
    )
    return gradient_sums(model, list(islice(loader, GRADIENT_BATCHES)), config)


def _similarity(run: Path, base: str | None, vectors: int) -> dict:
    options = read_options(run, base)
    if not (run / "model").exists():
        raise InputError(f"{run} is not finished: it has no model/ to compare with its base")
    folders = options.model, run / "model"
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in folders
    )
    layers = _history(run).of_layers()
    names = [name for name in layers if re.search(r"\.\d+\.", name)]  # not the vocabulary's
    return singular_vector_similarity(before, after, names, vectors)


def draw_timeline(history: SubnetHistory, last: int, picture: Path) -> None:
    """Groups over steps: their slots, the rewarming after, and each move, coloured by what it
    did."""
    config, groups = history.config, history.groups
    schedule = Schedule(
        len(groups),
        config["period"],
        config["update_type"],
        config["warmup_steps"],
        config["rewarm"],
    )
    observing, factor = np.zeros((2, len(groups), last))
    for step in range(last):
        observing[list(schedule.observing(step)), step] = 1
        factor[:, step] = [schedule.lr_factor(group, step) for group in range(len(groups))]
    shown = {"overlap": "share of the subnet kept"}
    if _by_move(history, "captured"):  # sums of rows and columns do not tell
        shown["captured"] = "share of the score captured"
    figure, panels = pyplot.subplots(
        1,
        len(shown),
        figsize=(6.5 * len(shown), 1.6 + 0.22 * len(groups)),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, (what, title) in zip(panels[0], shown.items(), strict=True):
        extent = (0, last, len(groups) - 0.5, -0.5)
        rewarmed = np.where(factor < 1, 1 - factor, np.nan)
        _cells(axes, rewarmed, extent=extent, cmap="Oranges", vmin=-0.3, vmax=1.5)
        observed = np.where(observing == 1, 0.35, np.nan)
        _cells(axes, observed, extent=extent, cmap="Greys", vmin=0, vmax=1)
        moves = _by_move(history, what)
        if moves:
            dots = axes.scatter(
                *zip(*moves, strict=True),
                c=list(moves.values()),
                cmap="viridis",
                vmin=0,
                s=42,
                edgecolors="black",
                linewidths=0.5,
                zorder=3,
                clip_on=False,
            )
            figure.colorbar(dots, ax=axes, label=f"{title}, mean over the group's layers")
        axes.set(xlabel="optimizer step", title=f"moves: {title}", xlim=(0, last))
        axes.set_yticks(range(len(groups)), [_short_group(name) for name in groups])
    figure.suptitle(
        "grey: the group observes    orange: its rate is rewarmed    dot: its subnets move",
        fontsize=10,
    )
    _save(figure, picture)


def draw_subnets(history: SubnetHistory, last: int, picture: Path) -> None:
    """Which neurons are trained: a panel for each kind of layer and side; in it a band a layer,
    time running down."""

    def rows(places: list[Place], side: int) -> np.ndarray:
        times = (np.arange(SLICES) + 0.5) * last / SLICES
        current = [
            max((place for place in places if place.step <= time), key=lambda place: place.step)
            for time in times
        ]
        return np.stack([_density(_idx(place, side), place.features[side]) for place in current])

    figure = _panels(
        history.of_layers(),
        rows,
        cmap="Blues",
        percentile=97,
        label="share of the bin's neurons that are trained",
        title=f"Trained neurons. Each layer's band is the run from its start (top) to step {last}",
    )
    _save(figure, picture)


def draw_frequency(history: SubnetHistory, last: int, picture: Path) -> None:
    """How much of the run each neuron is trained, most trained first; the mean over the layers of a
    kind."""
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
    for side, (axes, title) in enumerate(
        zip(panels, ("output neurons", "input neurons"), strict=True)
    ):
        for kind, layers in _by_kind(history.of_layers()).items():
            curves = [np.sort(_time_trained(places, side, last))[::-1] for places in layers]
            if all(curve.min() == 1 for curve in curves):
                continue  # a side that is taken whole: an output layer's inputs
            shares = np.linspace(0, 1, len(curves[0]))
            axes.plot(shares, np.mean(curves, axis=0), label=kind)
        share = history.config["rank_factor"]
        axes.axvline(share, color="0.6", linestyle="--", linewidth=1)
        axes.text(
            share,
            1.02,
            " rank factor",
            color="0.4",
            fontsize=9,
            transform=axes.get_xaxis_transform(),
        )
        axes.set(xlabel=f"{title}, most trained first (share of them)", xlim=(0, 1), ylim=(0, 1.02))
    panels[0].set_ylabel("share of the run in which it is trained")
    panels[1].legend()
    figure.suptitle(
        "How often a neuron is trained: a step at the rank factor if no subnet moved, flat if by chance"
    )
    _save(figure, picture)


def draw_gradients(sums: dict[str, tuple], picture: Path) -> None:
    """Row and column sums of |g|, in units of their mean."""

    def rows(layer: tuple, side: int) -> np.ndarray:
        values = layer[side].numpy()
        return _binned(values / values.mean(), np.maximum.reduceat)[None]

    figure = _panels(
        sums,
        rows,
        cmap="magma",
        percentile=99,
        label="sum of |g|, over its mean; the largest of each bin",
        title="Sums of |g| over each neuron, before training",
    )
    _save(figure, picture)


def draw_singular_vectors(similarity: dict, picture: Path) -> None:
    """Similarity of the i-th singular vectors before and after: layers over i, a panel for each
    kind of layer."""
    kinds = _by_kind(similarity)
    columns = min(4, len(kinds))
    figure, panels = pyplot.subplots(
        -(-len(kinds) // columns),
        columns,
        figsize=(3.6 * columns, 3.2 * -(-len(kinds) // columns)),
        squeeze=False,
        layout="constrained",
    )
    for axes, (kind, layers) in zip(panels.flat, kinds.items(), strict=False):
        values = np.stack([layer.numpy() for layer in layers])
        drawn = _cells(axes, values, vmin=0, vmax=1, cmap="viridis")
        axes.set(title=kind, xlabel="singular vector", ylabel="layer")
    for axes in list(panels.flat)[len(kinds) :]:
        axes.set_axis_off()
    figure.colorbar(
        drawn, ax=panels, label="|cosine| of the i-th left singular vectors, before and after"
    )
    _save(figure, picture)


def _cells(axes: pyplot.Axes, values: np.ndarray, **look: Any) -> Any:
    """Each value as a cell of one colour, over the whole panel."""
    return axes.imshow(values, aspect="auto", interpolation="nearest", **look)


def _panels(
    layers: dict, rows: Callable, cmap: str, percentile: float, label: str, title: str
) -> pyplot.Figure:
    """Two panels (outputs, inputs) for each kind of layer; in each, the ``rows(layer, side)`` of
    all its layers."""
    kinds = _by_kind(layers)
    heights = [1 + 0.075 * len(each) for each in kinds.values()]
    figure, panels = pyplot.subplots(
        len(kinds),
        2,
        figsize=(13, 1.4 + sum(heights)),
        squeeze=False,
        layout="constrained",
        height_ratios=heights,
    )
    bands = {
        kind: [[rows(layer, side) for layer in each] for side in (0, 1)]
        for kind, each in kinds.items()
    }
    images = {kind: [np.concatenate(side) for side in sides] for kind, sides in bands.items()}
    limit = np.median(
        [np.percentile(image, percentile) for sides in images.values() for image in sides]
    )
    for line, (kind, each) in zip(panels, kinds.items(), strict=True):
        for side, axes in enumerate(line):
            extent = (0, 1, len(each) - 0.5, -0.5)
            drawn = _cells(axes, images[kind][side], cmap=cmap, vmin=0, vmax=limit, extent=extent)
            if len(bands[kind][side][0]) > 1:
                axes.hlines(np.arange(1, len(each)) - 0.5, 0, 1, color="0.75", linewidth=0.5)
            axes.set_title(f"{kind}: {('outputs', 'inputs')[side]}", fontsize=10)
            axes.set_xticks([])
            axes.yaxis.get_major_locator().set_params(integer=True)
        line[0].set_ylabel("layer")
    for axes in panels[-1]:
        axes.set_xlabel("neurons, in the order of the weight")
    figure.colorbar(
        drawn, ax=panels, location="top", shrink=0.5, aspect=40, pad=0.01, label=label, extend="max"
    )
    figure.suptitle(title, fontsize=11)
    return figure


def _by_kind(layers: dict) -> dict[str, list]:
    """The values of layers that differ in their block's number only, in model order, by the last
    part of their name."""
    kinds: dict[str, list] = {}
    for name, value in layers.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(value)
    short = [name.rpartition(".")[2] for name in kinds]
    return {
        last if short.count(last) == 1 else name: each
        for (name, each), last in zip(kinds.items(), short, strict=True)
    }


def _by_move(history: SubnetHistory, what: str) -> dict[tuple[int, int], float]:
    """(step, number of the group) -> the mean of an attribute over the layers that moved then."""
    found: dict[tuple[int, int], list[float]] = {}
    for place in history.places:
        if getattr(place, what) is not None:
            found.setdefault((place.step, history.groups.index(place.group)), []).append(
                getattr(place, what)
            )
    return {move: float(np.mean(values)) for move, values in found.items()}


def _time_trained(places: list[Place], side: int, last: int) -> np.ndarray:
    """For each neuron, the share of the run in which it is in the subnet."""
    trained = np.zeros(places[0].features[side])
    ends = [place.step for place in places[1:]] + [last]
    for place, end in zip(places, ends, strict=True):
        trained[_idx(place, side)] += (end - place.step) / last
    return trained


def _idx(place: Place, side: int) -> np.ndarray:
    return (place.out_idx, place.in_idx)[side]


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


def _save(figure: pyplot.Figure, picture: Path) -> None:
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
