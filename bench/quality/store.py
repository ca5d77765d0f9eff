"""The results of the study by run, and what a run needs of others' results."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..harness.jobs import NotReady
from ..harness.provenance import ROOT
from ..harness.store import append, load
from ..methods import STUDY
from .study import SCALES, Run, searches, timings

RESULTS = ROOT / "bench" / "quality" / "results"


class Store:
    """Results by run. ``fallback``: of another folder, in which searches may be looked up."""

    def __init__(self, folder: Path = RESULTS, fallback: "Store | None" = None):
        self.folder, self.fallback, self.path = folder, fallback, folder / "runs.jsonl"
        self._rows = {row["id"]: row for row in load(self.path)}  # the last of a run counts

    def read(self, run: Run) -> dict[str, Any] | None:
        return self._rows.get(run.id)

    def write(self, run: Run, result: dict[str, Any]) -> None:
        self._rows[run.id] = {"id": run.id, **result}
        append(self.path, self._rows[run.id])

    def all(self) -> list[dict[str, Any]]:
        return [row for _, row in sorted(self._rows.items())]

    def is_done(self, run: Run) -> bool:
        """Whether there is a result, and what it depends on has not changed since."""
        result = self.read(run)
        try:
            return result is not None and result["run"] == asdict(self.resolve(run))
        except NotReady:
            return False

    def resolve(self, run: Run) -> Run:
        """``run`` with the learning rate of its search and its number of steps. Raises NotReady, as for a sequence of
        which a task has not been searched."""
        if run.steps is None:
            run = replace(run, steps=self.equal_steps(run.scale, run.method))
        if run.kind == "sequence":
            for task in run.task.split("+"):
                self.best_lr(run.scale, task, run.method)
        elif run.lr is None and run.kind != "untrained":
            run = replace(run, lr=self.best_lr(run.scale, run.task, run.method))
        return run

    def best_lr(self, scale: str, task: str, method: str) -> float:
        """The rate of least cost on the search split; of trials that diverged none. Raises NotReady."""
        trials = {}
        for trial in searches(SCALES[scale], task, method):
            result = self.read(trial) or (self.fallback and self.fallback.read(trial))
            if result is None:
                raise NotReady(f"{trial.id} has not run")
            if result["status"] == "ok":
                trials[trial.lr] = result["scores"]["search"][""]["nll"]
        if not trials:
            raise NotReady(f"no trial of {STUDY[method].title} on {task} came to an end")
        return min(trials, key=trials.__getitem__)

    def equal_steps(self, scale: str, method: str) -> int:
        """How many steps of ``method`` take the time of full fine-tuning's, with what comes before the first and what
        the first takes longer (calibration, a projection), as timed on a quiet machine. Raises NotReady."""
        step, before = {}, {}
        for timing in timings(SCALES[scale]):
            result = self.read(timing) if timing.kind == "timing" else None
            if result is not None and result["provenance"]["quiet"]:
                found = result["seconds"]
                step[timing.method] = found["step"]
                whole = found["prepare"] + found["train"]
                before[timing.method] = whole - timing.steps * found["step"]
        for needed in ("fft", method):
            if needed not in step:
                raise NotReady(f"no timing of {needed} on a quiet machine")
        whole = before["fft"] + SCALES[scale].steps * step["fft"]
        return max(1, round((whole - before[method]) / step[method]))
