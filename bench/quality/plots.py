"""Pictures of the study, as SVG that comes out the same each time."""

from collections.abc import Callable
from pathlib import Path

from .analyses import SHARES
from .methods import METHODS
from .tables import OURS, Results, held_out, of, title


def draw_plots(results: Results, tasks: list[str], scale: str, folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    drawn = []
    settings = {
        "svg.hashsalt": "losia",
        "svg.fonttype": "none",
        "figure.figsize": (7, 4),
        "font.size": 8,
        "axes.prop_cycle": plt.cycler(color=plt.get_cmap("tab20").colors[::2] + ("black",)),
    }
    pictures: list[tuple[str, Callable, str]] = [
        ("all-lengths", _lengths, ""),
        ("all-selection", _selection, ""),
        ("all-gradients", _gradients, ""),
    ]
    for task in tasks:
        pictures += [
            (f"{task}-learned-and-lost", _learned_and_lost, task),
            (f"{task}-search", _search, task),
            (f"{task}-loss", _loss, task),
        ]
    with plt.rc_context(settings):
        for name, draw, task in pictures:
            figure = plt.figure(layout="constrained")
            if draw(figure.add_subplot(), results, task):
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"{scale}-{name}.svg"
                figure.savefig(path, metadata={"Date": None})
                drawn.append(path)
            plt.close(figure)
    return drawn


def _learned_and_lost(axes, results: Results, task: str) -> bool:
    """Cost of right answers against cost of English, a mark a seed: down and to the left is
    better."""
    for method in METHODS:
        found = of(results, task=task, kind="main", method=method)
        if found:
            axes.plot(
                [held_out(r, "nll") for r in found],
                [r["scores"]["english"][""]["nll"] for r in found],
                "s" if method.startswith("losia") else "o",
                label=title(method),
            )
    for result in of(results, task=task, kind="untrained"):
        axes.axhline(
            result["scores"]["english"][""]["nll"],
            color="gray",
            linewidth=0.8,
            label="English, untrained",
        )
    axes.set(
        xlabel="nats a token of right answers, held out",
        ylabel="nats a token of English after",
        title=task,
    )
    return _legend(axes)


def _lengths(axes, results: Results, task: str) -> bool:
    """Cost by number of steps: does what LoSiA lacks or has over the others grow with longer
    runs?"""
    found = [
        r
        for r in of(results, task="pronunciation", variant="")
        if r["run"]["kind"] == "main" or r["run"]["kind"].startswith("scale-")
    ]
    for method in METHODS:
        steps = sorted({r["run"]["steps"] for r in of(found, method=method)})
        costs = [
            [held_out(r, "nll") for r in of(found, method=method, steps=length)] for length in steps
        ]
        if len(steps) > 1:
            axes.plot(
                steps, [sum(values) / len(values) for values in costs], "o-", label=title(method)
            )
    ticks = sorted({r["run"]["steps"] for r in found})
    axes.set(xlabel="steps", ylabel="nats a token, held out", title="pronunciation", xscale="log")
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.minorticks_off()
    return _legend(axes)


def _search(axes, results: Results, task: str) -> bool:
    """Cost on the search split by learning rate: how sensitive each method is."""
    for method in METHODS:
        found = sorted(
            of(results, task=task, kind="search", method=method), key=lambda r: r["run"]["lr"]
        )
        if found:
            axes.plot(
                [r["run"]["lr"] for r in found],
                [r["scores"]["search"][""]["nll"] for r in found],
                "o-",
                label=title(method),
            )
    axes.set(xscale="log", xlabel="learning rate", ylabel="nats a token, search split", title=task)
    return _legend(axes)


def _loss(axes, results: Results, task: str, window: int = 8) -> bool:
    """Training loss, running mean over a few points of the mean over seeds."""
    for method in METHODS:
        found = of(results, task=task, kind="main", method=method)
        if found:
            points = list(zip(*(r["curve"] for r in found), strict=True))
            mean = [sum(value for _, value in point) / len(point) for point in points]
            smooth = [
                sum(mean[max(0, i + 1 - window) : i + 1]) / min(window, i + 1)
                for i in range(len(mean))
            ]
            axes.plot([point[0][0] for point in points], smooth, label=title(method))
    axes.set(xlabel="step", ylabel="training loss, running mean", title=task)
    return _legend(axes)


def _selection(axes, results: Results, task: str) -> bool:
    """How often an input neuron was selected (the paper's Figure 7)."""
    for result in of(results, kind="analysis", method=OURS):
        for name, counts in result["selected"].items():
            axes.plot(
                range(len(counts)),
                [count / sum(counts) for count in counts],
                "o-",
                label=name.removeprefix("model.layers."),
            )
    axes.set(xlabel="times selected", ylabel="share of the input neurons")
    return _legend(axes)


def _gradients(axes, results: Results, task: str) -> bool:
    """How much of the gradient few neurons hold, all lines being straight if it were spread evenly
    (Figures 2, 9)."""
    from matplotlib import colormaps

    for result in of(results, kind="analysis", method=OURS):
        for place, (name, held) in enumerate(result["gradients"].items()):
            for side, style in (("out", "o-"), ("in", "s--")):
                axes.plot(
                    [0, *SHARES, 1],
                    [0, *held[side], 1],
                    style,
                    color=colormaps["tab20"](place),
                    markersize=3,
                    label=f"{name.removeprefix('model.layers.')} {side}",
                )
    axes.set(xlabel="share of the neurons, largest first", ylabel="share of the sum of |g|")
    return _legend(axes)


def _legend(axes) -> bool:
    if not axes.get_lines():
        return False
    axes.figure.legend(loc="outside right upper", fontsize=7)
    return True
