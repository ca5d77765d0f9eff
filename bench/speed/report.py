"""Tables and plots from the committed rows: ``RESULTS.md``, ``results/plots`` and the READMEs' marked places."""

from pathlib import Path
from typing import Any

from ..harness.markdown import fill_markers
from ..harness.provenance import ROOT, origin
from . import counts
from .plots import draw_plots, picture_paths
from .results import load
from .tables import TABLES

HEAD = "Made by `python -m bench report` from `results/speed.jsonl`. CPU and GPU figures do not compare."
PREDICTED = """\
## Predicted, not measured

By counting bytes and operations (`python -m bench counts`), before any of it was timed on a GPU: no less time than this
on an H200. `python -m bench variants` times the same forms there. The forms are chosen by these counts until it has.

```
{}
```"""
Groups = list[dict[str, Any]]


def by_device(groups: Groups) -> list[Groups]:
    """The rows of each device, newest first; GPUs first."""
    devices: dict[tuple[bool, str], Groups] = {}
    for group in sorted(groups, key=lambda group: group["provenance"]["started"], reverse=True):
        provenance = group["provenance"]
        devices.setdefault((provenance["kind"] != "GPU", provenance["device"]), []).append(group)
    return [devices[key] for key in sorted(devices)]


def newest_table(name: str, groups: Groups) -> str:
    """A table and its origin, from the first of ``groups`` that has rows for it; else empty.

    Raises ValueError for a name that is no table."""
    if name not in TABLES:
        raise ValueError(f"there is no table {name!r}; the tables are {', '.join(TABLES)}")
    for group in groups:
        if text := TABLES[name][1](group["rows"]):
            return f"{text}\n\n{origin(group['provenance'])}"
    return ""


def render(groups: Groups) -> str:
    provenance = groups[0]["provenance"]
    parts = [f"## {provenance['device']} ({provenance['kind']})"]
    tables = ((title, newest_table(name, groups)) for name, (title, _) in TABLES.items())
    return "\n\n".join(parts + [f"### {title}\n\n{text}" for title, text in tables if text])


def fill_page(text: str, groups: Groups) -> str:
    def content(name: str) -> str:
        found = (newest_table(name, device) for device in by_device(groups))
        return next(filter(None, found), "not measured yet")

    return fill_markers(text, content)


def write_reports(results: Path, root: Path = ROOT) -> str:
    """Write ``bench/RESULTS.md``, the plots, and the marked tables of ``README.md`` and ``bench/README.md``; returns
    the first."""
    groups = load(results)
    if not groups:
        raise ValueError(f"{results} holds no results")
    sections = ["# Results", HEAD]
    for device in by_device(groups):
        try:
            pictures = draw_plots(device, results / "plots")
        except ImportError as error:  # those that are there
            print(f"no new plots: {error}")
            pictures = filter(Path.exists, picture_paths(device, results / "plots"))
        links = "\n".join(f"![{path.stem}](results/plots/{path.name})" for path in pictures)
        sections.append(render(device) + (f"\n\n{links}" if links else ""))
    sections.append(PREDICTED.format(counts.report()))
    text = "\n\n".join(sections) + "\n"
    (root / "bench" / "RESULTS.md").write_text(text)
    for readme in (root / "README.md", root / "bench" / "README.md"):
        if readme.exists():
            readme.write_text(fill_page(readme.read_text(), groups))
    return text
