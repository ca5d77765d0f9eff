"""Tables and plots from the committed JSON: ``RESULTS.md``, ``results/plots`` and the README's
marked places."""

import re
from pathlib import Path
from typing import Any

from . import counts
from .plots import PICTURES, draw_plots, picture_path
from .provenance import ROOT
from .store import load
from .tables import TABLES

PREDICTED = """\
## Predicted, not measured

By counting bytes and operations (`python -m bench.counts`), before any of it was timed on a GPU: no less time than this
on an H200. `python -m bench variants` times the same forms there. The forms are chosen by these counts until it has.

```
{}
```"""
MARKER = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)


def by_device(files: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The files of each device, newest first; GPUs first."""
    devices: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for file in sorted(files, key=lambda file: file["provenance"]["started"], reverse=True):
        provenance = file["provenance"]
        devices.setdefault((provenance["kind"] != "GPU", provenance["device"]), []).append(file)
    return [devices[key] for key in sorted(devices)]


def newest_table(name: str, files: list[dict[str, Any]]) -> str:
    """A table and its origin, from the first of ``files`` that has rows for it; else empty."""
    for file in files:
        table = TABLES[name][1](file["rows"])
        if table:
            return f"{table}\n\n{origin(file['provenance'])}"
    return ""


def origin(provenance: dict[str, Any]) -> str:
    """One line under a table: where its figures come from."""
    versions = [f"torch {provenance['torch']}"]
    versions += [f"triton {provenance['triton']}"] if provenance["triton"] else []
    versions += [f"{name} {version}" for name, version in provenance["peers"].items() if version]
    versions += [f"driver {provenance['driver']}"] if provenance.get("driver") else []
    versions += (
        [f"clocks {provenance['clocks']}"]
        if provenance.get("clocks")
        else [f"{provenance['threads']} threads"]
    )
    return (
        f"{provenance['kind']}: {provenance['device']}; {', '.join(versions)}; commit {provenance['commit']}; "
        f"{provenance['started'][:10]}"
    )


def render(files: list[dict[str, Any]]) -> str:
    """All tables of one device."""
    provenance = files[0]["provenance"]
    parts = [f"## {provenance['device']} ({provenance['kind']})"]
    for name, (title, _) in TABLES.items():
        text = newest_table(name, files)
        if text:
            parts.append(f"### {title}\n\n{text}")
    return "\n\n".join(parts)


def fill_markers(text: str, files: list[dict[str, Any]]) -> str:
    """``text`` with what stands between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->`` made
    anew.

    The first device that has the table is shown. Raises ValueError for a name that is no table.
    """

    def fill(found: re.Match) -> str:
        name = found[2]
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}; the tables are {', '.join(TABLES)}")
        shown = (newest_table(name, device) for device in by_device(files))
        return f"{found[1]}{next(filter(None, shown), 'not measured yet')}\n{found[3]}"

    return MARKER.sub(fill, text)


def _pictures(device: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Drawn anew; where matplotlib is not installed, those that are there."""
    try:
        return draw_plots(device, folder)
    except ImportError as error:
        print(f"no new plots: {error}")
        drawn = (picture_path(folder, device[0]["provenance"], name) for name in PICTURES)
        return [path for path in drawn if path.exists()]


def write_reports(results: Path, root: Path = ROOT) -> None:
    """Write ``bench/RESULTS.md``, the plots, and the marked tables of ``README.md`` and
    ``bench/README.md``."""
    files = load(results)
    if not files:
        raise ValueError(f"{results} holds no results")
    head = "Made by `python -m bench report` from the JSON in `results/`. CPU and GPU figures do not compare."
    sections = ["# Results", head]
    for device in by_device(files):
        pictures = _pictures(device, results / "plots")
        links = "\n".join(f"![{path.stem}](results/plots/{path.name})" for path in pictures)
        sections.append(render(device) + (f"\n\n{links}" if links else ""))
    sections.append(PREDICTED.format(counts.report()))
    (root / "bench" / "RESULTS.md").write_text("\n\n".join(sections) + "\n")
    for readme in (root / "README.md", root / "bench" / "README.md"):
        if readme.exists():
            readme.write_text(fill_markers(readme.read_text(), files))
