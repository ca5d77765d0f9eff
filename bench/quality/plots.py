"""Pictures of the study."""

import functools
from pathlib import Path
from typing import Any

from ..harness.pictures import draw
from ..methods import STUDY
from ..methods.study import TRAINED_SHARE
from .analyses import SHARES
from .study import OURS
from .tables import Results, of, title, trials_of

OTHERS = tuple(name for name in STUDY if not name.startswith("losia"))
OUR_STYLE = {"color": "black", "linewidth": 2, "zorder": 3}


def draw_plots(results: Results, tasks: list[str], scale: str, folder: Path) -> list[Path]:
    from matplotlib import colormaps, cycler

    of_all = {"selection": _selection, "gradients": _gradients, "masked": _masked}
    pictures = {f"all-{name}": functools.partial(each, results) for name, each in of_all.items()}
    of_task = {"learned-and-lost": _learned_and_lost, "search": _search, "loss": _loss}
    of_task["one-rate"] = _one_rate
    for task in tasks:
        for name, picture in of_task.items():
            pictures[f"{task}-{name}"] = functools.partial(picture, results, task)

    def with_legend(figure, fill) -> bool:
        axes = figure.add_subplot()
        fill(axes)
        if axes.get_lines():
            figure.legend(loc="outside right upper", fontsize=7)
        return bool(axes.get_lines())

    whole = {f"{scale}-{n}": functools.partial(with_legend, fill=p) for n, p in pictures.items()}
    bright = colormaps["tab20"].colors
    colors = cycler(color=bright[::2] + bright[1::2])
    return draw(whole, folder, **{"font.size": 8, "axes.prop_cycle": colors})


def _nll(result: dict[str, Any], split: str = "held_out") -> float:
    return result["scores"][split][""]["nll"]


def _learned_and_lost(results: Results, task: str, axes) -> None:
    """Cost of right answers against cost of English, a mark a seed: down and to the left is better."""

    def mark(methods: list[str], label: str, **style: Any) -> None:
        found = [r for m in methods for r in of(results, task=task, kind="main", method=m)]
        if found:
            english = [_nll(r, "english") for r in found]
            axes.plot([_nll(r) for r in found], english, linestyle="", label=label, **style)

    settings = [name for name in STUDY if name not in (OURS, *OTHERS)]
    mark(settings, "LoSiA, other settings", marker="s", color="lightgray", markersize=4)
    for method in OTHERS:
        mark([method], title(method), marker="o")
    mark([OURS], title(OURS), marker="*", markersize=11, **OUR_STYLE)
    for result in of(results, task=task, kind="untrained"):
        label = "English, untrained"
        axes.axhline(_nll(result, "english"), color="gray", linewidth=0.8, label=label)
    x, y = "nats a token of right answers, held out", "nats a token of English after"
    axes.set(xlabel=x, ylabel=y, title=task)


def _search(results: Results, task: str, axes) -> None:
    """Cost on the search split by learning rate: how sensitive each method is."""
    for method in (OURS, *OTHERS):
        costs = sorted(trials_of(results, task, method).items())
        if costs:
            x, y = zip(*costs, strict=True)
            axes.plot(x, y, "o-", label=title(method), **(OUR_STYLE if method == OURS else {}))
    y = "nats a token, search split"
    axes.set(xscale="log", xlabel="learning rate", ylabel=y, title=task)


def _one_rate(results: Results, task: str, axes) -> None:
    """All sizes' searches over the rate times the share of the values trained: one curve if one rate is right."""
    for method, share in TRAINED_SHARE.items():
        trials = sorted(trials_of(results, task, method).items())
        if len(trials) > 1:
            rates, costs = zip(*((lr * share, cost) for lr, cost in trials), strict=True)
            axes.semilogx(
                rates, costs, "o-", label=f"{title(method)}, 1/{1 / share:.3g} of the values"
            )
    x = "learning rate times the share of the values trained"
    axes.set(xlabel=x, ylabel="nats a token, search split", title=task)


def _loss(results: Results, task: str, axes, window: int = 8) -> None:
    """Training loss, running mean over a few points of the mean over seeds."""
    for method in (OURS, *OTHERS):
        found = of(results, task=task, kind="main", method=method)
        if found:
            points = list(zip(*(r["curve"] for r in found), strict=True))
            mean = [sum(value for _, value in point) / len(point) for point in points]
            parts = [mean[max(0, i + 1 - window) : i + 1] for i in range(len(mean))]
            smooth = [sum(part) / len(part) for part in parts]
            style = OUR_STYLE if method == OURS else {}
            axes.plot([point[0][0] for point in points], smooth, label=title(method), **style)
    axes.set(xlabel="step", ylabel="training loss, running mean", title=task)


def _selection(results: Results, axes) -> None:
    """How often an input neuron was selected (the paper's Figure 7)."""
    for result in of(results, kind="analysis", method=OURS):
        for name, counts in result["selected"].items():
            shares = [count / sum(counts) for count in counts]
            axes.plot(range(len(counts)), shares, "o-", label=name.removeprefix("model.layers."))
    axes.set(xlabel="times selected", ylabel="share of the input neurons")


def _gradients(results: Results, axes) -> None:
    """How much of the gradient few neurons hold, all lines being straight if it were spread evenly (Figures 2, 9)."""
    from matplotlib import colormaps

    for result in of(results, kind="analysis", method=OURS):
        for place, (name, held) in enumerate(result["gradients"].items()):
            color, short = colormaps["tab20"](place), name.removeprefix("model.layers.")
            for side, style in (("out", "o-"), ("in", "s--")):
                x, y, label = [0, *SHARES, 1], [0, *held[side], 1], f"{short} {side}"
                axes.plot(x, y, style, color=color, markersize=3, label=label)
    axes.set(xlabel="share of the neurons, largest first", ylabel="share of the sum of |g|")


def _masked(results: Results, axes) -> None:
    """How much a trained model still does with only a subnet of its weights (after the paper's Figure 10)."""
    styles = {"zero": ("s--", "others zero"), "untrained": ("o-", "others untrained")}
    for result in of(results, kind="masked"):
        for outside, of_kind in result["masked"].items():
            style, words = styles[outside]
            end = [[1.0, *result["linears_untrained"]]] if outside == "untrained" else []
            for kind, rows in of_kind.items():
                shares, right, _ = zip(*[[0.0, *result["whole"]], *rows, *end], strict=True)
                axes.plot(shares, right, style, markersize=3, label=f"{kind}, {words}")
    axes.set(xlabel="share of the weights that is masked", ylabel="right, %")
