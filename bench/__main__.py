"""Measure losia_kernels beside the methods people use today, behind a correctness gate, and write
the tables.

    python -m bench quick               a small table on the terminal, in two minutes at most
    python -m bench all --minutes 9     the most telling rows of every suite, most important first
    python -m bench layer               one suite
    python -m bench report              RESULTS.md, the READMEs' tables and the plots, from the rows
    python -m bench host                what Python and dispatch take a layer, on the CPU
    python -m bench counts              what each form of a kernel must move, by arithmetic
    python -m bench predicted           what a layer should take on a GPU, from machine code and counts
    python -m bench quality             what the methods learn (options: python -m bench quality --help)
    python -m bench quality-report      bench/quality/README.md, from its rows

suites:
    ops           each kernel against eager, compiled and library forms; share of the roof
    layer         a decoder layer, and its linears alone, over the frozen floor
    model         a whole model, microseconds a token and peak memory (the paper's Tables 14 and 15)
    variants      forms of one kernel side by side; without a GPU by machine code and counts
    output_layer  the loss of the vocabulary projection against torch, Liger and cut-cross-entropy
    scaling       cost over p, tokens, layers and T
    memory        without a GPU: the memory model against a simulated run of full size

Rows are written as they come. The same command goes on where it stopped: rows with a figure are
kept while the code and the environment are the same, what failed is tried again at the end.
"""

import argparse
import dataclasses
import itertools
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from .harness.jobs import (
    Clock,
    DeviceLost,
    Job,
    describe,
    free_memory,
    minutes_and_seconds,
    run_all,
)
from .harness.provenance import clocks, provenance
from .methods import METHODS, get_method
from .speed import (
    compiled,
    counts,
    host,
    layer,
    model,
    ops,
    output_layer,
    predicted,
    quick,
    scaling,
    simulated,
    variants,
)
from .speed.report import write_reports
from .speed.results import FINAL, RESULTS, Results, load

SUITES = ("layer", "model", "ops", "variants", "output_layer", "scaling", "memory")
UNTIMED = {"host": host, "counts": counts, "predicted": predicted}
LAST = 1000.0  # priority of what has failed before


class BadArgument(ValueError):
    """What the command line asks for cannot be done."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1: a gate was red; 2: a mistake in the arguments; 3: the device was lost."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] == "quality":
        from .quality.runner import main as run_study

        return run_study(words[1:])
    if words and words[0] == "quality-report":
        from .quality.report import main as write_report

        return write_report(words[1:])
    arguments = _parser().parse_args(words)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        if arguments.suite in UNTIMED:
            print(UNTIMED[arguments.suite].report())
            return 0
        if arguments.suite == "report":
            print(write_reports(arguments.results))
            return 0
        device = _device(arguments.device)
        if arguments.suite == "quick":
            return quick.main(device, arguments.output)
        if arguments.suite == "variants" and device.type != "cuda":
            print(compiled.report())
            return 0
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        jobs = list(select(arguments.suite, arguments.methods, device, dtype))
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if arguments.list:
        for job in sorted(jobs, key=lambda job: job.priority):
            settings = " ".join(f"{key}={value}" for key, value in job.settings.items())
            print(job.suite, job.name, settings)
        return 0
    results = Results.for_run(provenance(device, arguments.commit), arguments.results)
    groups, here = load(arguments.results), results.provenance["device"]
    known = (group["rows"] for group in groups if group["provenance"]["device"] == here)
    clock = Clock(arguments.minutes, itertools.chain(*known))
    to_do = jobs if arguments.again else list(not_measured(jobs, results))
    return _run(to_do, len(jobs) - len(to_do), results, device, clock)


def _run(jobs: list[Job], kept: int, results: Results, device: torch.device, clock: Clock) -> int:
    found = results.provenance
    print(f"{found['device']} ({found['kind']}), into {results.path}")
    ahead = minutes_and_seconds(sum(map(clock.expected, jobs)))
    print(f"{len(jobs)} jobs, about {ahead} in all; {kept} measured before")
    missing = [name for name, version in found["peers"].items() if version is None]
    if missing:
        print(f"not installed: {', '.join(missing)}")

    def add(job: Job, row: dict) -> str:
        if device.type == "cuda" and row["status"] == "ok":
            row["clocks"] = clocks(device)
        results.add(row)
        free_memory()
        return describe(row)

    try:
        if run_all(jobs, add, clock, lambda line: print(line, flush=True)):
            print("the same command goes on with them")
    except DeviceLost as error:
        lost = f"bench: the device is lost: {error}; start the same command again for the rest"
        print(lost, file=sys.stderr)
        return 3
    return 1 if any(row["status"] == "red" for row in results.rows) else 0


def not_measured(jobs: list[Job], results: Results) -> Iterator[Job]:
    """Jobs without a final row in ``results``; those that have failed come last."""
    for job in jobs:
        status = results.status_of(job.key)
        if status is None:
            yield job
        elif status not in FINAL:
            yield dataclasses.replace(job, priority=job.priority + LAST)


def select(
    suite: str, names: str | None, device: torch.device, dtype: torch.dtype
) -> Iterator[Job]:
    """The jobs of ``suite`` ("all": of every suite), only those of ``names`` (commas) where given.

    Raises UnknownMethod for a name that no job and no method has, BadArgument if nothing is left."""
    modules = layer, model, ops, variants, output_layer, scaling, simulated
    jobs = [job for module in modules for job in module.jobs(device, dtype)]
    wanted = None if names is None else {name.strip() for name in names.split(",")}
    for name in (wanted or set()) - {job.name for job in jobs}:
        get_method(name)
    of_suite = [job for job in jobs if suite in ("all", job.suite)]
    chosen = [job for job in of_suite if wanted is None or job.name in wanted]
    if not chosen:
        what = ", ".join(dict.fromkeys(job.name for job in of_suite)) or f"nothing on {device.type}"
        raise BadArgument(f"suite {suite!r} has no such rows on this device; it has {what}")
    yield from chosen


def _device(name: str) -> torch.device:
    expected = f"--device {name!r}: expected cuda, cuda:1 or cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadArgument(expected) from None
    if device.type not in ("cuda", "cpu"):
        raise BadArgument(expected)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise BadArgument(f"--device {name!r}: torch sees {count} GPUs here")
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


def _minutes(text: str) -> float:
    if re.fullmatch(r"\d*\.?\d+", text) and float(text) > 0:
        return float(text)
    raise argparse.ArgumentTypeError(f"expected a positive number of minutes, got {text}")


def _commit(text: str) -> str:
    if re.fullmatch(r"[0-9a-f]{7,40}", text):
        return text[:12]
    expected = "expected a commit's hash, 7 to 40 hexadecimal digits"
    raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench", description=__doc__, formatter_class=raw)
    add, names = parser.add_argument, ", ".join(METHODS)
    suites = (*SUITES, "all", "quick", "report", *UNTIMED)
    add("suite", choices=suites, metavar="SUITE", help="as above")
    add("--minutes", type=_minutes, help="begin nothing that would not end in time")
    add(
        "--methods", metavar="NAMES", help=f"only these rows, separated by commas; methods: {names}"
    )
    add("--again", action="store_true", help="measure rows again that have a figure")
    add("--list", action="store_true", help="show what would be run, in order, and stop")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, help="default: %(default)s")
    add("--commit", type=_commit, metavar="HASH", help="of a copy of the tree that has no history")
    folder = "where rows are kept, and read; default: bench/results"
    add("--results", type=Path, default=RESULTS, metavar="FOLDER", help=folder)
    add("--output", type=Path, metavar="FILE", help="of quick: write its rows there, as JSON lines")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
