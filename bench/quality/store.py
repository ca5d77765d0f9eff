"""One small JSON file per run, written whole or not at all."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .methods import METHODS
from .study import SCALES, Run, searches, timings

RESULTS = Path(__file__).resolve().parent / "results"
FORMAT = 1


class NotReady(Exception):
    """What the run depends on has no results yet."""


class Store:
    """Results by run. ``fallback``: another folder in which searches may be looked up."""

    def __init__(self, folder: Path = RESULTS, fallback: Path | None = None):
        self.folder, self.fallback = folder, fallback

    def read(self, run: Run, folder: Path | None = None) -> dict[str, Any] | None:
        path = (folder or self.folder) / f"{run.id}.json"
        if not path.exists():
            return None
        result = json.loads(path.read_text())
        return result if result.get("format") == FORMAT else None

    def write(self, run: Run, result: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{run.id}.json"
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(
            json.dumps({"format": FORMAT, **result}, separators=(",", ":"), sort_keys=True) + "\n"
        )
        os.replace(partial, path)

    def all(self) -> list[dict[str, Any]]:
        found = [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]
        return [result for result in found if result.get("format") == FORMAT]

    def is_done(self, run: Run) -> bool:
        """Whether the file is there and what it depends on has not changed since."""
        result = self.read(run)
        try:
            return result is not None and result["run"] == asdict(self.resolve(run))
        except NotReady:
            return False

    def resolve(self, run: Run) -> Run:
        """``run`` with the learning rate of its search and its number of steps. Raises NotReady, as
        for a sequence of which a task has not been searched."""
        if run.steps is None:
            run = replace(run, steps=self.equal_steps(run.scale, run.method))
        if run.kind == "sequence":
            for task in run.task.split("+"):
                self.best_lr(run.scale, task, run.method)
        elif run.lr is None and run.kind != "untrained":
            run = replace(run, lr=self.best_lr(run.scale, run.task, run.method))
        return run

    def best_lr(self, scale: str, task: str, method: str) -> float:
        """The rate of least cost on the search split; of trials that diverged none. Raises
        NotReady."""
        trials = {}
        for trial in searches(SCALES[scale], task, method):
            result = self.read(trial) or (
                self.read(trial, self.fallback) if self.fallback else None
            )
            if result is None:
                raise NotReady(f"{trial.id} has not run")
            if result["status"] == "ok":
                trials[trial.lr] = result["scores"]["search"][""]["nll"]
        if not trials:
            raise NotReady(f"no trial of {METHODS[method].title} on {task} came to an end")
        return min(trials, key=trials.__getitem__)

    def equal_steps(self, scale: str, method: str) -> int:
        """How many steps of ``method`` take the time of full fine-tuning's, with what comes before
        the first and what the first takes longer (calibration, a projection), as timed on a quiet
        machine. Raises NotReady."""
        step, before = {}, {}
        for timing in timings(SCALES[scale]):
            result = self.read(timing) if timing.kind == "timing" else None
            if result is not None and result["provenance"]["quiet"]:
                seconds = result["seconds"]
                step[timing.method] = seconds["step"]
                before[timing.method] = (
                    seconds["prepare"] + seconds["train"] - timing.steps * seconds["step"]
                )
        for needed in ("fft", method):
            if needed not in step:
                raise NotReady(f"no timing of {needed} on a quiet machine")
        whole = before["fft"] + SCALES[scale].steps * step["fft"]
        return max(1, round((whole - before[method]) / step[method]))
