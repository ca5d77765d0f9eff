"""One JSON file per (device, commit), rewritten after each row, so that being cut off loses only what was to come."""

import json
import os
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
FORMAT = 1


class Results:
    """Rows of one device at one commit. A row that is measured again replaces the old one."""

    def __init__(self, path: Path, provenance: dict[str, Any]):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            before = json.loads(path.read_text())
            if before["provenance"]["sources"] == provenance["sources"]:
                self.rows = before["rows"]
        self.provenance = provenance

    @classmethod
    def for_run(cls, provenance: dict[str, Any], folder: Path = RESULTS) -> "Results":
        slug = re.sub(r"[^a-z0-9]+", "-", provenance["device"].lower()).strip("-")
        return cls(folder / f"{slug}-{provenance['commit']}.json", provenance)

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


def _identity(row: dict[str, Any]) -> str:
    return json.dumps(row["id"], sort_keys=True)


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The harness's result files, by name; other studies may keep theirs in the same folder."""
    contents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [content for content in contents if isinstance(content, dict) and content.get("format") == FORMAT]
