"""``python -m bench all|layer|model|context|ops|output_layer|scaling|memory [--minutes 9]`` measures.

``python -m bench report`` writes tables.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from . import layer, memory, model, ops, output_layer, scaling
from .jobs import Job, run_all
from .methods import UnknownMethod, get_method
from .provenance import provenance
from .store import RESULTS, Results

SUITES = ("layer", "model", "context", "ops", "output_layer", "scaling", "memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one suite or all; exit code 1 if a gate was red, 2 for a mistake in the arguments."""
    arguments = _parser().parse_args(argv)
    if arguments.suite == "report":
        from .report import write_reports

        write_reports(arguments.results)
        return 0
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        jobs = list(select(arguments.suite, arguments.methods, device, dtype))
    except UnknownMethod as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", category=FutureWarning)
    results = Results.for_run(provenance(device, arguments.commit), arguments.results)
    print(f"{results.provenance['device']} ({results.provenance['kind']}), {len(jobs)} jobs, into {results.path}")
    missing = [name for name, version in results.provenance["peers"].items() if version is None]
    if missing:
        print(f"not installed: {', '.join(missing)}")
    run_all(jobs, results.add, arguments.minutes, lambda line: print(line, flush=True))
    return 1 if any(row["status"] == "red" for row in results.rows) else 0


def select(suite: str, methods: str | None, device: torch.device, dtype: torch.dtype) -> Iterator[Job]:
    """The jobs of ``suite`` ("all": of every suite), only those of ``methods`` (commas) where given."""
    wanted = None if methods is None else {get_method(name.strip()).name for name in methods.split(",")}
    for module in (layer, model, ops, output_layer, scaling, memory):
        for job in module.jobs(device, dtype):
            if suite in ("all", job.suite) and (wanted is None or job.name in wanted):
                yield job


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("suite", choices=(*SUITES, "all", "report"))
    parser.add_argument("--minutes", type=float, help="stop in time; the most telling jobs come first")
    parser.add_argument("--methods", metavar="NAMES", help="only these, separated by commas")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="of a copy of the tree that has no history")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
