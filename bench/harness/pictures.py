"""Pictures as SVG that come out the same each time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

STYLE = {"svg.hashsalt": "losia", "svg.fonttype": "none", "figure.figsize": (7, 4)}


def draw(pictures: dict[str, Callable[[Any], bool]], folder: Path, **style: Any) -> list[Path]:
    """Call each picture with a figure and write ``folder/NAME.svg`` if it says that it drew something; the paths."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    drawn = []
    with plt.rc_context({**STYLE, **style}):
        for name, picture in pictures.items():
            figure = plt.figure(layout="constrained")
            if picture(figure):
                folder.mkdir(parents=True, exist_ok=True)
                drawn.append(folder / f"{name}.svg")
                figure.savefig(drawn[-1], metadata={"Date": None})
            plt.close(figure)
    return drawn
