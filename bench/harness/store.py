"""One file of results a study: a JSON line each, appended as it comes, so that being cut off loses only what was to
come."""

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def load(path: Path) -> list[Row]:
    """All lines of ``path``, the oldest first; none if there is no file. A line that was cut off has no end and is left
    out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]


def append(path: Path, row: Row) -> None:
    """Add a line, in the place of one that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.exists() else b""
    whole = before.rfind(b"\n") + 1
    if whole < len(before):
        os.truncate(path, whole)
    with path.open("a") as file:
        file.write(json.dumps(row, separators=(",", ":"), sort_keys=True) + "\n")
