"""The results of the study by run, and what a run needs of others' results."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..harness.jobs import NotReady
from ..harness.provenance import ROOT
from ..harness.store import append, load
from ..methods import STUDY
from .study import NEAR, RATES, SCALES, Run, best_rate, searches, timings, trial_of

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
        if result is None:
            return False
        try:
            same = result["run"] == asdict(self.resolve(run))
            return same and result.get("lrs") == self.sequence_lrs(run)
        except NotReady:
            return False

    def resolve(self, run: Run) -> Run:
        """``run`` with the learning rate of its search and its number of steps. Raises NotReady, as for a sequence of
        which a task has not been searched."""
        if run.steps is None:
            run = replace(run, steps=self.equal_steps(run.scale, run.method))
        if run.kind == "sequence":
            self.sequence_lrs(run)
        elif run.lr is None and run.kind != "untrained":
            run = replace(run, lr=self.best_lr(run.scale, run.task, run.method))
        return run

    def sequence_lrs(self, run: Run) -> list[float] | None:
        """The best rate on each task of a sequence; None for other runs. Raises NotReady."""
        if run.kind != "sequence":
            return None
        return [self.best_lr(run.scale, task, run.method) for task in run.task.split("+")]

    def best_lr(self, scale: str, task: str, method: str) -> float:
        """The best on the search split, once rates on both sides of it cost notably more; of trials that diverged none.
        Raises NotReady."""
        costs = self.trials(scale, task, method)
        missing = [rate for rate, cost in costs.items() if cost is None]
        if missing:
            named = ", ".join(f"{rate:.0e}" for rate in missing)
            raise NotReady(f"{STUDY[method].title} on {task} has not been tried at {named}")
        best = best_rate(costs)
        if costs[best] == math.inf:
            raise NotReady(f"no trial of {STUDY[method].title} on {task} came to an end")
        return best

    def more_trials(self, run: Run) -> list[Run]:
        """The trials beyond its method's own rates that the search which a run waits for needs by now, or which it is
        of where nothing waits."""
        given = run.lr is not None and not STUDY[run.method].explored
        if given or run.kind in ("untrained", "sequence"):
            return []
        scale = SCALES[run.scale]
        rates = set(self.trials(run.scale, run.task, run.method))
        rates -= {trial.lr for trial in searches(scale, run.task, run.method)}
        return [trial_of(scale, run.task, run.method, lr) for lr in sorted(rates)]

    def first_rates(self, scale: str, task: str, method: str) -> tuple[float, ...]:
        """The method's own, or those around the best of the scale that this one is near."""
        near = SCALES[scale].near
        costs = self.trials(near, task, method) if near else {}
        if not costs or None in costs.values():
            return STUDY[method].lrs
        place = RATES.index(best_rate(costs))
        return RATES[max(0, place - 1) : place + 2]

    def trials(self, scale: str, task: str, method: str) -> dict[float, float | None]:
        """Every learning rate that the search needs, with its cost on the search split: infinite where the run
        diverged, None where it has not run.

        ``first_rates`` come first, then the next beyond the least or the greatest as long as that one is the best, or
        as good (NEAR)."""
        costs = {
            lr: self._cost(trial_of(SCALES[scale], task, method, lr))
            for lr in self.first_rates(scale, task, method)
        }
        while None not in costs.values():
            least, greatest, good = min(costs), max(costs), min(costs.values()) + NEAR
            if costs[least] <= good and least > RATES[0]:
                lr = RATES[RATES.index(least) - 1]
            elif costs[greatest] <= good and greatest < RATES[-1]:
                lr = RATES[RATES.index(greatest) + 1]
            else:
                break
            costs[lr] = self._cost(trial_of(SCALES[scale], task, method, lr))
        return dict(sorted(costs.items()))

    def _cost(self, trial: Run) -> float | None:
        result = self.read(trial) or (self.fallback and self.fallback.read(trial))
        if result is None:
            return None
        return result["scores"]["search"][""]["nll"] if result["status"] == "ok" else math.inf

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
