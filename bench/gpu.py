"""A first call on a GPU, ordered so that none of its minutes is wasted: ``make gpu``.

    python -m bench.gpu                  tests of the kernels, the most telling figures, traffic: nine minutes
    python -m bench.gpu --part rest      a second call: all other tests that need a GPU
    python -m bench.gpu --part sanitizer a third one: compute-sanitizer on one test of each kernel
    ncu [OPTIONS] python -m bench.gpu --traffic    launches for a profiler that counts bytes, and nothing else

Every step is a process with a limit of its own, and is recorded in ``gpu.jsonl`` as it ends; rows of figures go to
``speed.jsonl`` beside it as they are measured. No step keeps the next from running. Exit status 1 if any failed; where
a tool is not installed the step says so and counts as not run."""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .speed.results import RESULTS

# of each kernel one test at odd strides; without torch's cache a stray access shows
SANITIZED = (
    "test_gather.py::test_any_strides",
    "test_subnet_grad.py::test_any_strides",
    "test_adamw.py::test_any_strides_of_the_weight",
    "test_importance.py::test_any_strides",
    "test_scores.py::test_any_strides",
    "test_cross_entropy.py::test_any_strides",
)
MINUTES = {"layer": 1.7, "variants": 2.0, "ops": 1.3, "model": 0.7}
TELLING = "frozen,losia-pro-off,losia-pro,lora,dora,losia-liger-off,lora-liger,frozen-liger"
OPS = "subnet_grad,gather_features,subnet_adamw_,importance_update_"
TRAFFIC = "dram__bytes_read.sum,dram__bytes_write.sum,lts__t_bytes.sum,gpu__time_duration.sum"
MEMORY_BOUND = ("gather_features", "subnet_grad", "subnet_adamw_", "importance_update_")
TAIL = 2000  # characters of output that are recorded
NO_TESTS = 5  # pytest: none was selected, as without a GPU


@dataclass(frozen=True)
class Step:
    """``words`` are run for ``seconds`` at most; ``tool`` is a program that has to be there."""

    name: str
    words: tuple[str, ...]
    seconds: float
    tool: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


def first(python: Sequence[str], results: Path, commit: Sequence[str]) -> list[Step]:
    def tests(*words: str) -> tuple[str, ...]:
        return (*python, "-m", "pytest", "-q", "-m", "gpu", *words, *_in_parallel())

    def figures(suite: str, methods: str | None = None) -> Step:
        words = [*python, "-m", "bench", suite, "--minutes", str(MINUTES[suite]), *commit]
        words += ["--results", str(results), *(["--methods", methods] if methods else [])]
        return Step(suite, tuple(words), 60 * MINUTES[suite] + 10)

    traffic = ("ncu", "--clock-control", "none", "--metrics", TRAFFIC, "--csv")
    return [
        Step("driver", ("nvidia-smi",), 10, tool="nvidia-smi"),
        Step("versions", (*python, "-m", "bench.gpu", "--versions"), 20),
        Step("kernels", tests("tests/kernels", "--maxfail", "30"), 140),
        figures("layer", TELLING),
        figures("variants"),
        figures("ops", OPS),
        Step("traffic", (*traffic, *python, "-m", "bench.gpu", "--traffic"), 35, tool="ncu"),
        figures("model", "frozen,losia-pro-fused"),
    ]


def rest(python: Sequence[str]) -> list[Step]:
    words = (*python, "-m", "pytest", "-q", "-m", "gpu", "tests", "--ignore", "tests/kernels")
    return [Step("other tests", (*words, *_in_parallel()), 560)]


def sanitizer(python: Sequence[str]) -> list[Step]:
    tool = ("compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", "1")
    tests = (*python, "-m", "pytest", "-q", "-m", "gpu", "-x")
    return [
        Step(
            f"sanitizer: {test.partition('.')[0].removeprefix('test_')}",
            (*tool, *tests, f"tests/kernels/{test}"),
            120,
            tool=tool[0],
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for test in SANITIZED
    ]


def _in_parallel() -> tuple[str, ...]:
    if importlib.util.find_spec("xdist") is None:
        return ()
    return ("-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal")


def run(step: Step) -> dict[str, Any]:
    """What came of it: "ok", "failed", "too long" (what it had written counts), or "not installed"."""
    started = time.perf_counter()
    if step.tool is not None and shutil.which(step.tool) is None:
        return {"step": step.name, "status": "not installed", "seconds": 0.0, "output": ""}
    environment = {**os.environ, **step.environment}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
    process = subprocess.Popen(step.words, env=environment, start_new_session=True, **how)
    try:
        output, _ = process.communicate(timeout=step.seconds)
        status = "ok" if process.returncode in (0, NO_TESTS) else "failed"
    except subprocess.TimeoutExpired:
        _end(process)
        output, status = process.communicate()[0], "too long"
    seconds = round(time.perf_counter() - started, 1)
    found = {"step": step.name, "status": status, "code": process.returncode, "seconds": seconds}
    return {**found, "output": output[-TAIL:]}


def _end(process: subprocess.Popen) -> None:
    """With its workers: they are of its own group, and one that stays would keep its output open."""
    os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)


def run_steps(steps: Sequence[Step], results: Path) -> int:
    results.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for step in steps:
        print(f"--- {step.name} ({step.seconds:.0f} s at most)", flush=True)
        outcome = run(step)
        with (results / "gpu.jsonl").open("a") as file:
            file.write(json.dumps(outcome) + "\n")
        print(f"{outcome['output']}\n{outcome['status']}, {outcome['seconds']} s", flush=True)
        outcomes.append(outcome)
    for each in outcomes:
        print(f"{each['step']:24} {each['status']:14} {each['seconds']:6.1f} s")
    return int(any(each["status"] in ("failed", "too long") for each in outcomes))


def versions() -> str:
    """One line of JSON; raises where there is no device."""
    import torch

    from .harness.provenance import provenance

    return json.dumps(provenance(torch.device("cuda")))


def launch_memory_bound() -> None:
    """Each kernel that memory binds, twice, at LLaMA-2 7B's up_proj. What L2 gives the cores is the guess that most
    predictions rest on (``speed/predicted.py``)."""
    import torch

    from .speed import ops
    from .speed.models import shape_of

    shape, device = shape_of("llama-2-7b").linears["up_proj"], torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    for name in MEMORY_BOUND:
        case = ops.CASES[name](shape, 1 / 8, 8192, torch.bfloat16)
        inputs = case.inputs(generator)
        with torch.no_grad():
            for _ in range(2):  # the first one compiles
                case.forms["ours"](*inputs)
        print(name, flush=True)
    torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None, python: Sequence[str] = (sys.executable,)) -> int:
    """``python`` begins every command that is Python."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m bench.gpu", description=__doc__, formatter_class=raw
    )
    parser.add_argument("--part", choices=("first", "rest", "sanitizer"), default="first")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument(
        "--commit", metavar="HASH", help="of a copy of the tree that has no history"
    )
    parser.add_argument("--versions", action="store_true", help="print them, and stop")
    parser.add_argument("--traffic", action="store_true", help="launch for a profiler, and stop")
    chosen = parser.parse_args(argv)
    if chosen.versions:
        print(versions())
        return 0
    if chosen.traffic:
        launch_memory_bound()
        return 0
    commit = ("--commit", chosen.commit) if chosen.commit else ()
    steps = {
        "first": lambda: first(python, chosen.results, commit),
        "rest": lambda: rest(python),
        "sanitizer": lambda: sanitizer(python),
    }
    return run_steps(steps[chosen.part](), chosen.results)


if __name__ == "__main__":
    raise SystemExit(main())
