"""The rows of the speed suites, by device and state of the code.

A run goes on in the rows that the same code wrote in the same environment, and measures only what it lacks. They are
named after a commit; later ones that change nothing that is measured go on."""

import json
from pathlib import Path
from typing import Any

from ..harness.provenance import ROOT
from ..harness.store import append
from ..harness.store import load as load_rows

RESULTS = ROOT / "bench" / "results"
ENVIRONMENT = "device kind sources torch triton python threads cuda driver".split()
FINAL = ("ok", "oom")  # not measured again: a figure, or the answer that there is none


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """``{"provenance", "rows"}`` of each device and state of the code, in the order of their beginning."""
    found: dict[str, dict[str, Any]] = {}
    for row in load_rows(folder / "speed.jsonl"):
        origin = row.pop("provenance")
        name = json.dumps([origin[key] for key in ("device", "commit", "sources", "started")])
        group = found.setdefault(name, {"rows": {}})
        group["provenance"], row["kind"] = origin, origin["kind"]
        group["rows"].pop(_identity(row["id"]), None)  # measured again: the old one goes
        group["rows"][_identity(row["id"])] = row
    return [{**group, "rows": list(group["rows"].values())} for group in found.values()]


class Results:
    """Rows of one device at one state of the code. A row that is measured again replaces the old one."""

    def __init__(self, folder: Path, provenance: dict[str, Any], rows: list[dict[str, Any]]):
        self.path, self.provenance, self.rows = folder / "speed.jsonl", provenance, rows

    @classmethod
    def for_run(cls, provenance: dict[str, Any], folder: Path = RESULTS) -> "Results":
        """The rows to go on with, or none; rows of other code or another environment are never kept."""
        for group in load(folder):
            before = group["provenance"]
            if _continues(before, provenance):
                peers = {**before["peers"], **provenance["peers"]}
                return cls(folder, {**before, "peers": peers}, group["rows"])
        return cls(folder, provenance, [])

    def status_of(self, key: dict[str, Any]) -> str | None:
        """Of the row with this ``id``; None if there is no such row."""
        found = (row["status"] for row in self.rows if _identity(row["id"]) == _identity(key))
        return next(found, None)

    def add(self, row: dict[str, Any]) -> None:
        same = _identity(row["id"])
        self.rows = [old for old in self.rows if _identity(old["id"]) != same] + [row]
        append(self.path, {**row, "provenance": self.provenance})


def _continues(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether rows of both may stand together. A peer may be installed meanwhile, but not change its version."""
    if any(before.get(key) != now.get(key) for key in ENVIRONMENT):
        return False
    peers = before["peers"].items()
    if any(version not in (None, now["peers"].get(name)) for name, version in peers):
        return False
    changed = [each for each in (before["commit"], now["commit"]) if each.endswith("-changed")]
    return not changed or before["commit"] == now["commit"]


def _identity(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
