"""One JSON file per device and state of the code, rewritten after each row: being cut off loses
only what was to come.

A run goes on in the file that the same code wrote in the same environment, and measures only what
it lacks. A file is named after the commit; later commits that change nothing that is measured go on
in it.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
FORMAT = 1
ENVIRONMENT = (
    "device",
    "kind",
    "sources",
    "torch",
    "triton",
    "python",
    "threads",
    "cuda",
    "driver",
)
FINAL = (
    "ok",
    "oom",
)  # rows that are not measured again: a figure, or the answer that there is none


class Results:
    """Rows of one device at one commit. A row that is measured again replaces the old one."""

    def __init__(self, path: Path, provenance: dict[str, Any], rows: list[dict[str, Any]]):
        self.path, self.provenance, self.rows = path, provenance, rows

    @classmethod
    def for_run(cls, provenance: dict[str, Any], folder: Path = RESULTS) -> "Results":
        """The file to go on with, or a new one.

        Rows of other code are never kept: at the same commit (a changed tree) their file is
        replaced. The same code in another environment, say another version of torch, has a file of
        its own.
        """
        slug = re.sub(r"[^a-z0-9]+", "-", provenance["device"].lower()).strip("-")
        for path in sorted(folder.glob(f"{slug}-*.json")):
            before = json.loads(path.read_text())
            if _continues(before["provenance"], provenance):
                peers = {**before["provenance"]["peers"], **provenance["peers"]}
                return cls(path, {**before["provenance"], "peers": peers}, before["rows"])
        path, number = folder / f"{slug}-{provenance['commit']}.json", 1
        while path.exists() and _code(json.loads(path.read_text())["provenance"]) == _code(
            provenance
        ):
            number += 1
            path = folder / f"{slug}-{provenance['commit']}-{number}.json"
        return cls(path, provenance, [])

    def status_of(self, key: dict[str, Any]) -> str | None:
        """Of the row with this ``id``; None if there is no such row."""
        return next(
            (row["status"] for row in self.rows if _identity(row) == _identity({"id": key})), None
        )

    def add(self, row: dict[str, Any]) -> None:
        """Keep ``row``, which its ``id`` identifies, and write the file."""
        self.rows = [old for old in self.rows if _identity(old) != _identity(row)] + [row]
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "provenance": self.provenance, "rows": self.rows}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        os.replace(partial, self.path)


def _code(provenance: dict[str, Any]) -> tuple[str, str]:
    return provenance["commit"], provenance["sources"]


def _continues(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether rows of both may share a file. A peer may be installed meanwhile, but not change its
    version."""
    if any(before.get(key) != now.get(key) for key in ENVIRONMENT):
        return False
    if any(
        version not in (None, now["peers"].get(name)) for name, version in before["peers"].items()
    ):
        return False
    named = [commit for commit in (before["commit"], now["commit"]) if commit.endswith("-changed")]
    return not named or before["commit"] == now["commit"]


def _identity(row: dict[str, Any]) -> str:
    return json.dumps(row["id"], sort_keys=True)


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The harness's result files, by name; other studies may keep theirs in the same folder."""
    contents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [
        content
        for content in contents
        if isinstance(content, dict) and content.get("format") == FORMAT
    ]
