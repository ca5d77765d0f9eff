"""``python -m bench quality``: runs what has not been run, most telling first, one or several at a
time, and can be stopped at any time."""

import argparse
import multiprocessing
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..methods import MissingPeer
from ..provenance import ROOT, provenance
from .analyses import carry_out_analysis
from .oracle import carry_out_oracle
from .sequence import carry_out_sequence
from .store import RESULTS, NotReady, Store
from .study import SCALES, Run, study, ten_minutes, timings
from .training import Base, carry_out

SETS = ("study", "ten-minutes", "timings")


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error(f"argument --jobs: at least 1, got {arguments.jobs}")
    if arguments.quiet_machine and arguments.jobs > 1:
        parser.error("argument --jobs: on a quiet machine nothing else runs, so one at a time")
    device = torch.device(arguments.device)
    runs = select(
        arguments.set,
        arguments.scale or ("large" if device.type == "cuda" else "small"),
        arguments.only,
    )
    store = Store(arguments.results, fallback=RESULTS)
    missing = [run for run in runs if not store.is_done(run)]
    print(
        f"{len(runs)} runs, {len(runs) - len(missing)} done; into {arguments.results}", flush=True
    )
    if arguments.list:
        for run in runs:
            print(f"{'done' if run not in missing else f'{run.minutes:4.1f}'}  {run.id}")
        return 0
    if not missing:
        return 0
    if not (arguments.model / "config.json").exists():
        parser.error(
            f"argument --model: {arguments.model} holds no model; python examples/past_tense/smollm.py .cache "
            "makes it"
        )
    jobs = min(arguments.jobs, len(missing))
    origin = provenance(device, arguments.commit) | {"quiet": arguments.quiet_machine, "jobs": jobs}
    try:
        with make_pool(arguments.model, device, jobs) as pool:
            failed = run_all(
                missing, store, pool, jobs, origin, arguments.minutes, partial(print, flush=True)
            )
    except BrokenProcessPool:
        print(
            f"a worker died (of {jobs} that share the memory); what was done is kept: go on with fewer --jobs?",
            file=sys.stderr,
        )
        return 1
    return 1 if failed else 0


def select(name: str, scale: str, only: str | None = None) -> list[Run]:
    """The runs of a set, ``only`` those whose id matches a regex."""
    runs = {
        "study": lambda: study(SCALES[scale]),
        "ten-minutes": ten_minutes,
        "timings": lambda: timings(SCALES[scale]),
    }[name]()
    return [run for run in runs if only is None or re.search(only, run.id)]


def run_all(
    runs: list[Run],
    store: Store,
    pool: Executor,
    jobs: int,
    origin: dict,
    minutes: float | None,
    say,
) -> int:
    """Run those that are ready, ``jobs`` at a time, others as soon as they are; returns how many
    failed. None begins that would not end within ``minutes``."""
    started, pace, failed, done = time.perf_counter(), None, 0, 0
    waiting, flying = list(runs), {}
    while waiting or flying:
        for run in list(waiting):
            if len(flying) == jobs:
                break
            try:
                resolved = store.resolve(run)
            except NotReady:  # it may wait for one that is under way
                continue
            waiting.remove(run)
            spent, expected = (time.perf_counter() - started) / 60, run.minutes * (pace or 1.0)
            if minutes is not None and done and spent + expected > minutes:
                say(
                    f"{run.id}: left for the next time, {expected:.1f} minutes and {minutes - spent:.1f} left"
                )
                continue
            flying[pool.submit(_carry_out, resolved, store)] = resolved
        if not flying:
            break
        for future in wait(flying, return_when=FIRST_COMPLETED).done:
            run = flying.pop(future)
            try:
                result, took = future.result()
            except MissingPeer as error:
                say(f"{run.id}: not run: {error}")
                continue
            except Exception as error:  # the others shall not wait for this one
                say(f"{run.id}: FAILED\n{''.join(traceback.format_exception(error))}")
                failed += 1
                continue
            store.write(run, result | {"provenance": origin})
            done += 1
            pace = took / run.minutes if pace is None else 0.7 * pace + 0.3 * took / run.minutes
            left = sum(later.minutes for later in (*waiting, *flying.values())) * pace / jobs
            say(
                f"{run.id}: {_short(result)}{_known(run, store)}  {took:.1f} min, "
                f"{len(waiting) + len(flying)} runs left, about {left:.0f} min"
            )
    for run in waiting:
        try:
            store.resolve(run)
        except NotReady as error:
            say(f"{run.id}: not run: {error}")
    return failed


class InThisProcess(Executor):
    """A pool of one, which works while it is given work."""

    def submit(self, function, /, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


_base: Base | None = None  # of this process


def _load(model: Path, device: torch.device, threads: int) -> None:
    global _base
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging

    logging.disable_progress_bar()
    _base = Base.load(model, device)


def make_pool(model: Path, device: torch.device, jobs: int) -> Executor:
    """Workers that have loaded the model, each with its share of the processor's cores."""
    if jobs == 1:
        _load(model, device, torch.get_num_threads())
        return InThisProcess()
    load = model, device, max(1, (os.cpu_count() or 1) // jobs)
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _load, load)


def _carry_out(run: Run, store: Store) -> tuple[dict[str, Any], float]:
    """The result and the minutes that it took."""
    began = time.perf_counter()
    if run.kind == "sequence":
        result = carry_out_sequence(run, _base, store)
    else:
        result = {"oracle": carry_out_oracle, "analysis": carry_out_analysis}.get(
            run.kind, carry_out
        )(run, _base)
    return result, (time.perf_counter() - began) / 60


def _short(result: dict[str, Any]) -> str:
    if result["status"] != "ok":
        return f"{result['status']}: {result.get('reason', '')}"
    for split in ("search", "held_out"):
        found = result.get("scores", {}).get(split, {}).get("")
        if found:
            return f"{found['right']:.1f} % right, {found['nll']:.3f} nats"
    return "ok"


def _known(run: Run, store: Store) -> str:
    """What the same run gave elsewhere, where results are kept apart from those of the study."""
    known = store.read(run, store.fallback) if store.fallback not in (None, store.folder) else None
    return f" (the study's: {_short(known)})" if known else ""


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench quality", description=__doc__)
    parser.add_argument("--minutes", type=float, help="begin nothing that would not end in time")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes that share the device"
    )
    parser.add_argument("--set", choices=SETS, default="study")
    parser.add_argument(
        "--scale", choices=tuple(SCALES), help="default: small on a CPU, large on a GPU"
    )
    parser.add_argument("--only", type=_regex, metavar="REGEX", help="only runs whose id matches")
    parser.add_argument("--list", action="store_true", help="say what there is and what is done")
    parser.add_argument(
        "--model",
        type=Path,
        default=ROOT / ".cache" / "SmolLM2-135M-Instruct",
        metavar="FOLDER",
        help="what examples/past_tense/smollm.py .cache makes",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument(
        "--quiet-machine", action="store_true", help="nothing else runs here: seconds count"
    )
    parser.add_argument("--commit", help="of a copy of the tree that has no history")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
