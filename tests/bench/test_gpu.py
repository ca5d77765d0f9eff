"""``make gpu`` rehearsed: every step of it is run on a pretended GPU, and what may go wrong there goes
wrong here."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.__main__ import select
from bench.gpu import Step, run
from tests.bench.pretended import pretended

ROOT = Path(__file__).parents[2]
PRETENDED = (sys.executable, "-m", "tests.bench.pretended")


def tool(folder: Path, name: str, body: str) -> None:
    """A program that stands in for NVIDIA's."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def a_gpu_on_paper(monkeypatch):
    with pretended(monkeypatch):
        yield


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(ROOT)
    tool(folder, "nvidia-smi", "echo 580.1")
    # as they do: their own options, then the command
    skip = 'while [ "${1#-}" != "$1" ]; do case $1 in --csv) shift;; *) shift 2;; esac; done; exec "$@"'
    tool(folder, "ncu", skip)
    tool(folder, "compute-sanitizer", skip)
    return folder


def outcomes(folder: Path) -> dict[str, dict]:
    lines = (folder / "gpu.jsonl").read_text().splitlines()
    return {outcome["step"]: outcome for outcome in map(json.loads, lines)}


@pytest.mark.slow
def test_the_first_call_from_end_to_end(tools, tmp_path, monkeypatch):
    """Tests that need a GPU are collected and not run; of the figures those of tiny models, and the
    first of each suite."""
    pytest.importorskip("peft")
    steps = gpu.first(PRETENDED, tmp_path, ())
    assert sum(step.seconds for step in steps) <= 600, "more than one call may take"
    monkeypatch.setattr(gpu, "_in_parallel", lambda: ("--collect-only",))
    monkeypatch.setattr(gpu, "MINUTES", dict.fromkeys(gpu.MINUTES, 0.001))
    results = tmp_path / "results"
    steps = gpu.first(PRETENDED, results, ("--commit", "0123456789ab"))
    assert gpu.run_steps([replace(step, seconds=600) for step in steps], results) == 0
    found = outcomes(results)
    assert list(found) == "driver versions kernels layer variants ops traffic model".split()
    assert {outcome["status"] for outcome in found.values()} == {"ok"}, found
    assert "NVIDIA Pretended" in found["versions"]["output"]
    assert "tests collected" in found["kernels"]["output"]
    assert "importance_update_" in found["traffic"]["output"]
    rows = [json.loads(line) for line in (results / "speed.jsonl").read_text().splitlines()]
    names = [(row["id"]["suite"], row["id"]["name"]) for row in rows]
    firsts = [("layer", "frozen"), ("variants", "subnet_grad"), ("ops", "subnet_grad")]
    assert names == [*firsts, ("model", "frozen")]
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["provenance"]["commit"] for row in rows} == {"0123456789ab"}


@pytest.mark.parametrize("suite, names", [("layer", gpu.TELLING), ("ops", gpu.OPS)])
def test_the_most_telling_rows_come_first(a_gpu_on_paper, suite, names):
    jobs = sorted(
        select(suite, names, torch.device("cuda"), torch.bfloat16), key=lambda job: job.priority
    )
    wanted = names.split(",")
    assert {job.name for job in jobs[: len(wanted)]} == set(wanted)
    assert suite != "layer" or [job.name for job in jobs[: len(wanted)]] == wanted


@pytest.mark.slow
def test_the_other_calls_ask_for_tests_that_there_are(monkeypatch, tools):
    """A name that matches nothing would be an error, and a test without the mark is not run."""
    plain = (sys.executable,)
    (step,) = gpu.rest(plain)
    words = [word if word != "tests" else "tests/kernels/test_gather.py" for word in step.words]
    assert run(replace(step, words=tuple(words)))["status"] == "ok"  # in parallel, all left out
    ids = [f"tests/kernels/{test}" for test in gpu.SANITIZED]
    command = [*plain, "-m", "pytest", "-q", "-m", "gpu", "--collect-only", *ids]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for test in ids:
        assert any(
            line.startswith(f"{test}[") and "cuda" in line for line in done.stdout.splitlines()
        ), test


def test_of_every_kernel_one_test_is_sanitized():
    files = {test.partition("::")[0] for test in gpu.SANITIZED}
    words = {"gather", "subnet_grad", "adamw", "importance", "scores", "cross_entropy"}
    assert files == {f"test_{word}.py" for word in words}
    steps = gpu.sanitizer(("python",))
    assert all(step.words[1:3] == ("--report-api-errors", "no") for step in steps)


def test_nothing_stops_what_comes_after(tools, tmp_path, monkeypatch, capsys):
    """A red step, one that hangs with a child that does not end when it is asked to, one whose tool is missing."""
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    sleep = [sys.executable, "-c", deaf]
    child = f"import subprocess; subprocess.run({sleep!r})"
    steps = [
        Step("red", (sys.executable, "-c", "print('why'); raise SystemExit(1)"), 20),
        Step("hangs", (sys.executable, "-c", child), 2),
        Step("missing", ("no-such-tool",), 5, tool="no-such-tool"),
        Step("nothing to do", (sys.executable, "-c", "raise SystemExit(5)"), 20),
        Step(
            "last",
            (sys.executable, "-c", "import os; print(os.environ['SAID'])"),
            20,
            None,
            {"SAID": "yes"},
        ),
    ]
    assert gpu.run_steps(steps, tmp_path / "results") == 1
    found = outcomes(tmp_path / "results")
    status = {name: outcome["status"] for name, outcome in found.items()}
    assert status == {
        "red": "failed",
        "hangs": "too long",
        "missing": "not installed",
        "nothing to do": "ok",
        "last": "ok",
    }
    assert found["red"]["output"] == "why\n" and found["last"]["output"] == "yes\n"
    assert found["hangs"]["seconds"] < 15
    assert gpu.run_steps(steps[2:], tmp_path / "again") == 0


def test_a_tool_that_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.main(["--part", "sanitizer", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("not installed") == 2 * len(gpu.SANITIZED)
