"""Pictures of the study, as SVG that comes out the same each time."""

from collections.abc import Callable
from pathlib import Path

from .methods import METHODS
from .tables import OURS, Results, of, title


def draw_plots(results: Results, tasks: list[str], scale: str, folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    drawn = []
    settings = {"svg.hashsalt": "losia", "svg.fonttype": "none", "figure.figsize": (7, 4), "font.size": 8}
    pictures: list[tuple[str, Callable, str]] = [("selection", _selection, "")]
    for task in tasks:
        pictures += [(f"{task}-search", _search, task), (f"{task}-loss", _loss, task)]
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


def _search(axes, results: Results, task: str) -> bool:
    """Cost on the search split by learning rate: how sensitive each method is."""
    for method in METHODS:
        found = sorted(of(results, task=task, kind="search", method=method), key=lambda r: r["run"]["lr"])
        if found:
            axes.plot([r["run"]["lr"] for r in found], [r["scores"]["search"][""]["nll"] for r in found], "o-",
                      label=title(method))  # fmt: skip
    axes.set(xscale="log", xlabel="learning rate", ylabel="nats a token, search split", title=task)
    return _legend(axes)


def _loss(axes, results: Results, task: str, window: int = 8) -> bool:
    """Training loss, running mean over a few points of the mean over seeds."""
    for method in METHODS:
        found = of(results, task=task, kind="main", method=method)
        if found:
            points = list(zip(*(r["curve"] for r in found), strict=True))
            mean = [sum(value for _, value in point) / len(point) for point in points]
            smooth = [sum(mean[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(mean))]
            axes.plot([point[0][0] for point in points], smooth, label=title(method))
    axes.set(xlabel="step", ylabel="training loss, running mean", title=task)
    return _legend(axes)


def _selection(axes, results: Results, task: str) -> bool:
    """How often an input neuron was selected (the paper's Figure 7)."""
    for result in of(results, kind="analysis", method=OURS):
        for name, counts in result["selected"].items():
            axes.plot(range(len(counts)), [count / sum(counts) for count in counts], "o-",
                      label=name.removeprefix("model.layers."))  # fmt: skip
    axes.set(xlabel="times selected", ylabel="share of the input neurons")
    return _legend(axes)


def _legend(axes) -> bool:
    if not axes.get_lines():
        return False
    axes.legend(fontsize=7)
    return True
