"""One job, one row: what it measures, or why there is no figure. A job that fails never ends the
run."""

import gc
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from .harness import RedGate
from .methods import MissingPeer

UNITS = {"B": 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
FIRST_GUESS = {
    "model": 40.0,
    "context": 240.0,
    "ops": 30.0,
}  # seconds of a kind's first job; 15 in other suites


class DeviceLost(RuntimeError):
    """The device answers no call of this process any more, as after an illegal memory access."""


@dataclass(frozen=True)
class Job:
    """``settings`` say what is run and, with suite and name, identify the row. Lower ``priority``
    runs earlier."""

    suite: str
    name: str
    settings: dict[str, Any]
    run: Callable[[], dict[str, Any]]
    priority: float = field(default=0.0, compare=False)

    @property
    def key(self) -> dict[str, Any]:
        return {"suite": self.suite, "name": self.name, **self.settings}

    @property
    def kind(self) -> tuple[str, Any]:
        """Jobs of one kind take about as long as each other; of the kernels, compiling one takes
        far longer."""
        return self.suite, self.name if self.suite == "ops" else self.settings.get("model")


def run_job(job: Job) -> dict[str, Any]:
    """The job's row. ``status`` is "ok", or why there is no figure: "red", "oom", "missing" or
    "failed"."""
    started = time.perf_counter()
    try:
        outcome = {"status": "ok", **job.run()}
    except RedGate as error:
        outcome = {"status": "red", "reason": str(error)}
    except MissingPeer as error:
        outcome = {"status": "missing", "reason": str(error)}
    except Exception as error:  # whatever a peer raises is that peer's row
        asked = bytes_asked_for(error)
        if asked is None:
            outcome = {"status": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}
        else:
            outcome = {"status": "oom", "bytes_asked_for": asked}
    return {"id": job.key, **outcome, "seconds": round(time.perf_counter() - started, 1)}


def bytes_asked_for(error: Exception) -> int | None:
    """What an out-of-memory error of a GPU or of the CPU allocator says was asked for; None for any
    other error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        found = re.search(r"allocate ([\d.]+) (\w+)", text)
    else:
        found = re.search(r"tried to allocate ([\d.]+) (bytes)", text)
    if found is None:
        return 0 if isinstance(error, torch.OutOfMemoryError) else None
    return int(float(found[1]) * UNITS[found[2]])


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


def free_memory() -> None:
    """Give the device back what the last job left. Raises DeviceLost where that cannot be done."""
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(first_line(error)) from None


def run_all(
    jobs: Iterable[Job],
    add: Callable[[dict], None],
    minutes: float | None,
    say: Callable[[str], None] = print,
) -> list[Job]:
    """Run ``jobs`` by priority, hand each row to ``add`` at once; stop in time. Returns the jobs
    not reached.

    A job is begun only while the longest of its kind so far (before there is one, a guess) would
    still fit into ``minutes``. Raises DeviceLost, after the row of the job that lost it.
    """
    started = time.monotonic()
    longest: dict[tuple, float] = {}

    def expected(job: Job) -> float:
        return longest.get(job.kind, FIRST_GUESS.get(job.suite, 15.0))

    def time_left() -> float:
        return float("inf") if minutes is None else 60 * minutes - (time.monotonic() - started)

    left = sorted(jobs, key=lambda job: job.priority)
    skipped: list[Job] = []
    while left:
        job = left.pop(0)
        if longest and expected(job) > time_left():
            skipped.append(job)
            continue
        row = run_job(job)
        longest[job.kind] = max(longest.get(job.kind, 0.0), row["seconds"])
        add(row)
        ahead = min(sum(map(expected, left)), max(time_left(), 0.0))
        say(f"{describe(row)}; {len(left)} to go, about {_clock(ahead)}")
        free_memory()
    if skipped:
        say(
            f"not reached in {minutes:g} minutes: {len(skipped)} jobs; the same command goes on with them"
        )
    return skipped


def _clock(seconds: float) -> str:
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


def describe(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    settings = " ".join(
        f"{key}={value}" for key, value in row["id"].items() if key not in ("suite", "name")
    )
    outcome = row["status"]
    if "total" in row:
        outcome = f"{row['total']['ms']:.4g} ms"
    if "reason" in row:
        outcome += f" ({row['reason']})"
    if "bytes_asked_for" in row:
        outcome += f" (asked for {row['bytes_asked_for']} bytes)"
    return f"[{row['id']['suite']}] {row['id']['name']} {settings}: {outcome} ({row['seconds']} s)"
