"""Jobs: what each measures, or why there is no figure; which begin, when, and how long the rest will take."""

import gc
import re
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field
from typing import Any

import torch

from .gates import RedGate

UNITS = {"B": 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class MissingPeer(Exception):
    """A library is not installed, or says itself that it cannot run here."""


class NotReady(Exception):
    """What a job depends on has no results yet."""


class DeviceLost(RuntimeError):
    """The device answers no call of this process any more, as after an illegal memory access."""


@dataclass(frozen=True)
class Job:
    """``settings`` say what is run and, with suite and name, identify the row. Lower ``priority`` runs earlier;
    ``seconds`` is the cost that it declares."""

    suite: str
    name: str
    settings: dict[str, Any]
    run: Callable[[], dict[str, Any]]
    priority: float = field(default=0.0, compare=False)
    seconds: float = field(default=15.0, compare=False)

    @property
    def key(self) -> dict[str, Any]:
        return {"suite": self.suite, "name": self.name, **self.settings}


def kind(key: dict[str, Any]) -> tuple:
    """Rows of one kind take about as long as each other; of the kernels, compiling one takes far longer."""
    return key["suite"], key["name"] if key["suite"] in ("ops", "quality") else key.get("model")


class Clock:
    """How long jobs will take: the longest of their kind so far, else what they declare, at the pace of others of their
    suite."""

    def __init__(self, minutes: float | None = None, earlier: Iterable[dict[str, Any]] = ()):
        self.started, self.limit, self.done = time.monotonic(), minutes, 0
        self.longest: dict[tuple, float] = {}
        self.pace: dict[str, float] = {}  # seconds for one that was declared
        for row in earlier:
            self._note(row["id"], row.get("seconds", 0.0))

    def _note(self, key: dict[str, Any], seconds: float) -> None:
        self.longest[kind(key)] = max(self.longest.get(kind(key), 0.0), seconds)

    def took(self, job: Job, row: dict[str, Any]) -> None:
        self.done += 1
        self._note(job.key, row["seconds"])
        if row["status"] == "ok":
            pace = row["seconds"] / job.seconds
            self.pace[job.suite] = 0.7 * self.pace.get(job.suite, pace) + 0.3 * pace

    def expected(self, job: Job) -> float:
        return self.longest.get(kind(job.key), job.seconds * self.pace.get(job.suite, 1.0))

    def left(self) -> float:
        spent = time.monotonic() - self.started
        return float("inf") if self.limit is None else 60 * self.limit - spent

    def fits(self, job: Job) -> bool:
        """Whether it would end in time; the first of a run is always begun."""
        return self.done == 0 or self.expected(job) <= self.left()


def run_job(job: Job) -> dict[str, Any]:
    """The job's row. ``status`` is "ok", or why there is no figure: "red", "oom", "missing" or "failed"."""
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
            traceback.print_exc()
            outcome = {"status": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}
        else:
            outcome = {"status": "oom", "bytes_asked_for": asked}
    return {"id": job.key, **outcome, "seconds": round(time.perf_counter() - started, 1)}


def bytes_asked_for(error: Exception) -> int | None:
    """What an out-of-memory error of a GPU or of the CPU allocator says was asked for; None for any other error."""
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


class InThisProcess(Executor):
    """A pool of one, which works while it is given work."""

    def submit(self, function, /, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def run_all(
    jobs: Iterable[Job],
    add: Callable[[Job, dict], str],
    clock: Clock,
    say: Callable[[str], None],
    resolve: Callable[[Job], Job] = lambda job: job,
    pool: Executor | None = None,
    at_once: int = 1,
    list_anew: Callable[[], Iterable[Job]] | None = None,
) -> list[Job]:
    """Run ``jobs`` by priority, ``at_once`` in ``pool`` at a time; those that ``resolve`` finds not ready wait for
    others.

    ``list_anew``: the jobs as results change them, asked after each row; of a name that was begun none is run again.

    Each row goes to ``add`` at once, which says in a line what it was. A job is begun only while it would still end in
    time. Returns the jobs not begun."""
    pool = pool or InThisProcess()
    waiting, skipped = sorted(jobs, key=lambda job: job.priority), []
    flying: dict[Future, Job] = {}
    begun: set[str] = set()
    while waiting or flying:
        for job in list(waiting):
            if len(flying) == at_once:
                break
            try:
                ready = resolve(job)
            except NotReady:  # it may wait for one that is under way
                continue
            waiting.remove(job)
            begun.add(job.name)
            if clock.fits(ready):
                flying[pool.submit(run_job, ready)] = ready
            else:
                skipped.append(job)
        if not flying:
            break
        for future in wait(flying, return_when=FIRST_COMPLETED).done:
            job, row = flying.pop(future), future.result()
            clock.took(job, row)
            line = add(job, row)
            if list_anew is not None:
                listed = sorted(list_anew(), key=lambda job: job.priority)
                waiting = [job for job in listed if job.name not in begun]
            left = [*waiting, *flying.values()]
            ahead = sum(map(clock.expected, left)) / at_once
            say(f"{line}; {len(left)} to go, about {minutes_and_seconds(ahead)}")
    if skipped:
        rest = minutes_and_seconds(sum(map(clock.expected, skipped)) / at_once)
        say(f"not begun in {clock.limit:g} minutes: {len(skipped)} jobs, about {rest}")
    for job in waiting:
        try:
            resolve(job)
        except NotReady as error:
            say(f"{job.name}: not run: {error}")
    return skipped + waiting


def minutes_and_seconds(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def describe(row: dict[str, Any]) -> str:
    found = row["id"]
    settings = " ".join(f"{key}={found[key]}" for key in found if key not in ("suite", "name"))
    outcome = f"{row['total']['ms']:.4g} ms" if "total" in row else row["status"]
    if "reason" in row:
        outcome += f" ({row['reason']})"
    if "bytes_asked_for" in row:
        outcome += f" (asked for {row['bytes_asked_for']} bytes)"
    return f"[{found['suite']}] {found['name']} {settings}: {outcome} ({row['seconds']} s)"
