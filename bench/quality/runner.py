"""``python -m bench quality``: runs what has not been run, most telling first, one or several at a time, and can be
stopped at any time."""

import argparse
import functools
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from ..harness.jobs import Clock, InThisProcess, Job, run_all
from ..harness.provenance import ROOT, provenance
from .analyses import carry_out_analysis
from .masked import carry_out_masked
from .oracle import carry_out_oracle
from .sequence import carry_out_sequence
from .store import RESULTS, Store
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
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a warning of every worker else
    scale = arguments.scale or ("large" if device.type == "cuda" else "small")
    elsewhere = arguments.results != RESULTS
    store = Store(arguments.results, Store() if elsewhere else None)
    wanted = functools.partial(select, arguments.set, scale, arguments.only, store)
    runs = wanted()
    missing = [run for run in runs if not store.is_done(run)]
    done = len(runs) - len(missing)
    print(f"{len(runs)} runs, {done} done; into {store.path}", flush=True)
    if arguments.list:
        for run in runs:
            print(f"{'done' if run not in missing else f'{run.minutes:4.1f}'}  {run.id}")
        return 0
    if not missing:
        return 0
    if not (arguments.model / "config.json").exists():
        made = "python examples/past_tense/smollm.py .cache makes it"
        parser.error(f"argument --model: {arguments.model} holds no model; {made}")
    at_once, say = min(arguments.jobs, len(missing)), functools.partial(print, flush=True)
    origin = provenance(device, arguments.commit)
    origin |= {"quiet": arguments.quiet_machine, "jobs": at_once}
    try:
        with make_pool(arguments.model, device, at_once) as pool:
            failed = run_study(wanted, store, origin, arguments.minutes, pool, at_once, say)
            return 1 if failed else 0
    except BrokenProcessPool:
        died = f"a worker died (of {at_once} that share the memory)"
        print(f"{died}; what was done is kept: go on with fewer --jobs?", file=sys.stderr)
        return 1


def select(name: str, scale: str, only: str | None, store: Store) -> list[Run]:
    """The runs of a set, with the trials that its searches have come to need, ``only`` those whose id matches a
    regex."""
    whole = {"study": study, "timings": timings}
    runs = ten_minutes() if name == "ten-minutes" else whole[name](SCALES[scale])
    runs = [run for each in runs for run in (*store.more_trials(each), each)]
    return [run for run in dict.fromkeys(runs) if only is None or re.search(only, run.id)]


def run_study(wanted, store, origin, minutes=None, pool=None, at_once=1, say=print) -> int:
    """Run those of ``wanted()`` that are ready, others as soon as they are; returns how many failed."""
    failed = 0

    def missing() -> list[Job]:
        return [job_of(run) for run in wanted() if not store.is_done(run)]

    def job_of(run: Run) -> Job:
        work = functools.partial(_carry_out, run, store)
        return Job("quality", run.id, {"run": run}, work, seconds=60 * run.minutes)

    def add(job: Job, row: dict[str, Any]) -> str:
        nonlocal failed
        run = job.settings["run"]
        if row["status"] != "ok":
            failed += row["status"] != "missing"
            word = "not run" if row["status"] == "missing" else "FAILED"
            return f"{run.id}: {word}: {row.get('reason', row['status'])}"
        store.write(run, row["result"] | {"provenance": origin})
        known = store.fallback and store.fallback.read(run)
        theirs = f" (the study's: {_short(known)})" if known else ""
        return f"{run.id}: {_short(row['result'])}{theirs}  {row['seconds'] / 60:.1f} min"

    def resolve(job: Job) -> Job:
        return job_of(store.resolve(job.settings["run"]))

    run_all(missing(), add, Clock(minutes), say, resolve, pool, at_once, missing)
    return failed


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


def _carry_out(run: Run, store: Store) -> dict[str, Any]:
    """Of a resolved run; "result" is what is kept."""
    if run.kind == "sequence":
        return {"result": carry_out_sequence(run, _base, store)}
    special = {"oracle": carry_out_oracle, "analysis": carry_out_analysis}
    special |= {"masked": carry_out_masked}
    return {"result": special.get(run.kind, carry_out)(run, _base)}


def _short(result: dict[str, Any]) -> str:
    if result["status"] != "ok":
        return f"{result['status']}: {result.get('reason', '')}"
    for split in ("search", "held_out"):
        found = result.get("scores", {}).get(split, {}).get("")
        if found:
            return f"{found['right']:.1f} % right, {found['nll']:.3f} nats"
    return "ok"


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench quality", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, help="begin nothing that would not end in time")
    add("--jobs", type=int, default=1, metavar="N", help="processes that share the device")
    add("--set", choices=SETS, default="study")
    add("--scale", choices=tuple(SCALES), help="default: small on a CPU, large on a GPU")
    add("--only", type=_regex, metavar="REGEX", help="only runs whose id matches")
    add("--list", action="store_true", help="say what there is and what is done")
    model, made = ROOT / ".cache" / "SmolLM2-135M-Instruct", "made by examples/past_tense/smollm.py"
    add("--model", type=Path, default=model, metavar="FOLDER", help=f"{made} .cache")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--results", type=Path, default=RESULTS, metavar="FOLDER")
    add("--quiet-machine", action="store_true", help="nothing else runs here: seconds count")
    add("--commit", help="of a copy of the tree that has no history")
    return parser
