"""``python -m bench quality``: runs what has not been run, most telling first, and can be stopped at any time."""

import argparse
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
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
    arguments = _parser().parse_args(argv)
    device = torch.device(arguments.device)
    runs = select(arguments.set, arguments.scale or ("large" if device.type == "cuda" else "small"), arguments.only)
    store = Store(arguments.results, fallback=RESULTS)
    missing = [run for run in runs if not store.is_done(run)]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} done; into {arguments.results}", flush=True)
    if arguments.list:
        for run in runs:
            print(f"{'done' if run not in missing else f'{run.minutes:4.1f}'}  {run.id}")
        return 0
    if not missing:
        return 0
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging

    logging.disable_progress_bar()
    base = Base.load(arguments.model, device)
    origin = provenance(device, arguments.commit) | {"quiet": arguments.quiet_machine}
    failed = run_all(missing, store, base, origin, arguments.minutes, lambda line: print(line, flush=True))
    return 1 if failed else 0


def select(name: str, scale: str, only: str | None = None) -> list[Run]:
    """The runs of a set, ``only`` those whose id matches a regex."""
    runs = {"study": lambda: study(SCALES[scale]), "ten-minutes": ten_minutes,
            "timings": lambda: timings(SCALES[scale])}[name]()  # fmt: skip
    return [run for run in runs if only is None or re.search(only, run.id)]


def run_all(runs: list[Run], store: Store, base: Any, origin: dict, minutes: float | None, say) -> int:
    """Run those that are ready; returns how many failed. None begins that would not end within ``minutes``."""
    started, pace, failed, done = time.perf_counter(), None, 0, 0
    for place, run in enumerate(runs):
        spent = (time.perf_counter() - started) / 60
        expected = run.minutes * (pace or 1.0)
        if minutes is not None and done and spent + expected > minutes:
            say(f"{run.id}: left for the next time, {expected:.1f} minutes and {minutes - spent:.1f} left")
            continue
        try:
            run = store.resolve(run)
            began = time.perf_counter()
            result = _carry_out(run, base, store)
        except (NotReady, MissingPeer) as error:
            say(f"{run.id}: not run: {error}")
            continue
        except Exception:  # the others shall not wait for this one
            say(f"{run.id}: FAILED\n{traceback.format_exc()}")
            failed += 1
            continue
        store.write(run, result | {"provenance": origin})
        took, done = (time.perf_counter() - began) / 60, done + 1
        pace = took / run.minutes if pace is None else 0.7 * pace + 0.3 * took / run.minutes
        left = sum(later.minutes for later in runs[place + 1 :]) * pace
        say(f"{run.id}: {_short(result)}  {took:.1f} min, {len(runs) - place - 1} runs left, about {left:.0f} min")
    return failed


def _carry_out(run: Run, base: Any, store: Store) -> dict[str, Any]:
    if run.kind == "oracle":
        return carry_out_oracle(run, base)
    if run.kind == "sequence":
        return carry_out_sequence(run, base, store)
    if run.kind == "analysis":
        return carry_out_analysis(run, base)
    return carry_out(run, base)


def _short(result: dict[str, Any]) -> str:
    if result["status"] != "ok":
        return f"{result['status']}: {result.get('reason', '')}"
    for split in ("search", "held_out"):
        found = result.get("scores", {}).get(split, {}).get("")
        if found:
            return f"{found['right']:.1f} % right, {found['nll']:.3f} nats"
    return "ok"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench quality", description=__doc__)
    parser.add_argument("--minutes", type=float, help="begin nothing that would not end in time")
    parser.add_argument("--set", choices=SETS, default="study")
    parser.add_argument("--scale", choices=tuple(SCALES), help="default: small on a CPU, large on a GPU")
    parser.add_argument("--only", metavar="REGEX", help="only runs whose id matches")
    parser.add_argument("--list", action="store_true", help="say what there is and what is done")
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "SmolLM2-135M-Instruct", metavar="FOLDER",
                        help="what examples/past_tense/smollm.py .cache makes")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--quiet-machine", action="store_true", help="nothing else runs here: seconds count")
    parser.add_argument("--commit", help="of a copy of the tree that has no history")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
