"""Measure losia_kernels beside the methods people use today, behind a correctness gate, and write
the tables.

    python -m bench all --minutes 9     the most telling rows of every suite, most important first
    python -m bench layer               one suite
    python -m bench report              RESULTS.md, the READMEs' tables and the plots, from the JSON
    python -m bench host                what Python and dispatch take a layer, on the CPU; a table, no JSON
    python -m bench quality             what the methods learn (options: python -m bench quality --help)
    python -m bench quality-report      bench/quality/README.md, from its JSON

suites:
    ops           each kernel against eager, compiled and library forms; share of the roof
    layer         a decoder layer, and its linears alone, over the frozen floor
    model         a whole model, microseconds a token and peak memory (the paper's Tables 14 and 15)
    context       the longest context whose step fits 80 GB
    variants      forms of one kernel side by side; without a GPU by machine code and counts
    output_layer  the loss of the vocabulary projection against torch, Liger and cut-cross-entropy
    scaling       cost over p, tokens, layers and T
    memory        without a GPU: the memory model against a simulated run of full size

Rows are written as they come. The same command goes on where it stopped: rows with a figure are
kept while the code and the environment are the same, what failed is tried again at the end.
"""

import argparse
import dataclasses
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from . import host, layer, memory, model, ops, output_layer, scaling, variants
from .jobs import DeviceLost, Job, run_all
from .methods import METHODS, UnknownMethod, get_method
from .provenance import clocks, provenance
from .store import FINAL, RESULTS, Results

SUITES = ("layer", "model", "context", "ops", "variants", "output_layer", "scaling", "memory")
LAST = 1000.0  # priority of what has failed before


class BadArgument(ValueError):
    """What the command line asks for cannot be done."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one suite or all. Exit code 1: a gate was red; 2: a mistake in the arguments; 3: the
    device was lost."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in ("quality", "quality-report"):
        return _quality(words)
    arguments = _parser().parse_args(argv)
    if arguments.suite == "host":
        print(host.report())
        return 0
    if arguments.suite == "report":
        from .report import write_reports

        try:
            write_reports(arguments.results)
        except ValueError as error:
            print(f"bench: {error}", file=sys.stderr)
            return 2
        return 0
    try:
        device = _device(arguments.device)
        if arguments.suite == "variants" and device.type != "cuda":
            print(variants.report())
            return 0
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        jobs = list(select(arguments.suite, arguments.methods, device, dtype))
    except (UnknownMethod, BadArgument) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if arguments.list:
        for job in sorted(jobs, key=lambda job: job.priority):
            print(
                job.suite,
                job.name,
                " ".join(f"{key}={value}" for key, value in job.settings.items()),
            )
        return 0
    warnings.filterwarnings("ignore", category=FutureWarning)
    results = Results.for_run(provenance(device, arguments.commit), arguments.results)
    to_do = jobs if arguments.again else list(not_measured(jobs, results))
    return _run(to_do, len(jobs) - len(to_do), results, device, arguments.minutes)


def _quality(words: list[str]) -> int:
    """The study of what is learned has a command line of its own."""
    if words[0] == "quality-report":
        from .quality.report import main as write_report

        return write_report(words[1:])
    from .quality.runner import main as run_study

    return run_study(words[1:])


def _run(
    jobs: list[Job], kept: int, results: Results, device: torch.device, minutes: float | None
) -> int:
    found = results.provenance
    print(
        f"{found['device']} ({found['kind']}), {len(jobs)} jobs, {kept} measured before, into {results.path}"
    )
    missing = [name for name, version in found["peers"].items() if version is None]
    if missing:
        print(f"not installed: {', '.join(missing)}")

    def add(row: dict) -> None:
        if device.type == "cuda" and row["status"] == "ok":
            row["clocks"] = clocks(device)
        results.add(row)

    try:
        run_all(jobs, add, minutes, lambda line: print(line, flush=True))
    except DeviceLost as error:
        print(
            f"bench: the device is lost: {error}; start the same command again for the rest",
            file=sys.stderr,
        )
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

    Raises UnknownMethod for a name that no job and no method has, BadArgument if nothing is left.
    """
    modules = layer, model, ops, variants, output_layer, scaling, memory
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
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadArgument(f"--device {name!r}: expected cuda, cuda:1 or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise BadArgument(f"--device {name!r}: expected cuda, cuda:1 or cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise BadArgument(
                f"--device {name!r}: torch sees {torch.cuda.device_count()} GPUs here"
            )
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number of minutes, got {text}")
    return value


def _commit(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{7,40}", text):
        raise argparse.ArgumentTypeError(
            f"expected a commit's hash, 7 to 40 hexadecimal digits, got {text!r}"
        )
    return text[:12]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    suites = (*SUITES, "all", "host", "report")
    parser.add_argument(
        "suite", choices=suites, metavar="SUITE", help="a suite, all, host, or report"
    )
    parser.add_argument(
        "--minutes",
        type=_minutes,
        help="begin nothing that would not end in time; default: no limit",
    )
    parser.add_argument(
        "--methods",
        metavar="NAMES",
        help=f"only these rows, separated by commas; methods: {', '.join(METHODS)}",
    )
    parser.add_argument(
        "--again", action="store_true", help="measure rows again that have a figure"
    )
    parser.add_argument(
        "--list", action="store_true", help="show what would be run, in order, and stop"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--commit", type=_commit, metavar="HASH", help="of a copy of the tree that has no history"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: bench/results"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
