"""What only a GPU's run executes, executed here: every tensor that asks for a GPU is made on the
CPU instead.

It holds that these lines run, hand over what they should and end in whole rows. It says nothing
about kernels, devices, times or bytes: only a GPU does.
"""

import importlib.util
import json
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command
from bench.harness import provenance, timing
from bench.harness.jobs import run_job
from bench.methods import Options
from bench.speed import layer, model, ops, output_layer, quick, scaling
from bench.speed.memory import SETTINGS
from tests.bench.pretended import SMI, make_fast, pretended

CUDA, BF16 = torch.device("cuda"), torch.bfloat16


@pytest.fixture(name="pretended")
def a_gpu_on_paper(monkeypatch):
    pytest.importorskip("transformers")
    with pretended(monkeypatch) as found:
        yield found


@pytest.fixture
def fast(monkeypatch):
    make_fast(monkeypatch)


def rows_of(module, chosen=lambda job: True) -> list[dict]:
    """The first job of each name that is ``chosen``."""
    jobs = {job.name: job for job in reversed(list(module.jobs(CUDA, BF16))) if chosen(job)}
    rows = [run_job(job) for job in jobs.values()]
    json.dumps(rows)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("module", [layer, model, scaling, ops])
def test_every_gpu_job_makes_a_row(pretended, fast, module):
    pytest.importorskip("peft")
    rows = rows_of(module, lambda job: job.settings.get("stack", "block") == "block")
    absent = [
        peer
        for peer, module in (("galore", "galore_torch"), ("liger", "liger_kernel"))
        if importlib.util.find_spec(module) is None
    ]
    for row in rows:
        missing = any(peer in row["id"]["name"] for peer in absent)
        assert row["status"] == ("missing" if missing else "ok"), row
    assert len(rows) == {layer: 19, model: 18, scaling: 4, ops: len(ops.CASES)}[module]
    if module is model:
        assert {row.get("peak_bytes", pretended.allocator.peak) for row in rows} == {5 * 10**9}
        predicted = {row["id"]["name"] for row in rows if row.get("predicted_bytes")}
        assert predicted | {"galore"} == set(SETTINGS)
    if module is layer:
        peaks = {row["peak_bytes"] for row in rows if "peak_bytes" in row}
        assert peaks == {2 * 10**9} and pretended.allocator.resets >= 11
    if module is ops:
        assert all("compiled eager" in row["forms"] for row in rows) and len(pretended.spins) > 20
        assert all(entry["status"] == "ok" for row in rows for entry in row["forms"].values())


@pytest.mark.parametrize("name", ["gemma-2b", "qwen2.5-7b", "llama-2-13b"])
def test_the_other_models_too(pretended, fast, name):
    run = model.Run("losia-pro", name, 1, 32, True, Options(1 / 8, 1 / 8))
    row = model.run_model(run, CUDA, BF16)
    assert row["predicted_bytes"] > 0 and row["gate"]["subnet gradient"]["error"] >= 0
    assert (
        layer.run_layer("losia-pro-off", name, "block", 1, 32, CUDA, BF16, Options())["total"]["ms"]
        > 0
    )


def test_kernels_are_timed_behind_a_spin_longer_than_their_launch(pretended):
    timing.measure({"slow": lambda i: time.sleep(0.01)}, CUDA, repeats=2, hide_launch=True)
    # as many untimed before
    assert len(pretended.spins) == 4 and pretended.spins[0] > 0.02 * timing.MOST_CYCLES
    found = timing.measure({"a": lambda i: time.sleep(0.002), "b": lambda i: None}, CUDA, repeats=3)
    assert found["a"].ms >= 2 > found["b"].ms and len(pretended.spins) == 4


def test_inputs_are_rotated_past_the_l2(pretended):
    assert timing.rotation(2**12, CUDA) == 9 and timing.rotation(2**20, CUDA) == 2


@pytest.mark.slow
def test_the_quick_table_on_a_gpu(pretended, fast, monkeypatch, capsys):
    """Kernels too, and a verdict; nothing is written."""
    monkeypatch.setattr(provenance, "_clocks_at_work", lambda device: "some")
    pytest.importorskip("peft")
    assert quick.main(CUDA) == 0
    said = capsys.readouterr().out
    assert "share of the roof" in said and "compiled eager" in said and "PEFT LoRA r 64" in said


def test_the_output_layer(pretended, fast):
    inputs = output_layer.Inputs.make(300, 96, 16, 1 / 8, CUDA, BF16)
    row = output_layer.run(output_layer.losia, inputs, CUDA)
    assert row["extra_bytes"] == 2 * 10**9 and len(row["gate"]) == 3


def test_provenance_of_a_gpu(pretended, monkeypatch):
    asked = []
    run = subprocess.run

    def answer(words, **more):
        if words[0] != "nvidia-smi":
            return run(words, **more)
        asked.append(words)
        return SimpleNamespace(stdout=SMI if "clocks" in words[1] else "580.1\n")

    monkeypatch.setattr(subprocess, "run", answer)
    monkeypatch.setattr(torch, "mm", lambda a, b: a)
    found = provenance.provenance(CUDA, "0123456789ab")
    assert (
        found["kind"] == "GPU"
        and found["device"] == "NVIDIA Pretended"
        and found["driver"] == "580.1"
    )
    assert found["clocks"] == "SM 1980 of 1980 MHz, memory 2619 MHz, 700.00 W, 45 C"
    assert found["commit"] == "0123456789ab" and all("--id=GPU-1-2" in words for words in asked)


def test_the_command_runs_on_a_gpu_and_writes_clocks(pretended, monkeypatch, tmp_path, fast):
    monkeypatch.setattr(provenance, "_clocks_at_work", lambda device: "some")
    monkeypatch.setattr(provenance, "_nvidia_smi", lambda query, device: SMI.strip())
    words = "model --device cuda --methods frozen --minutes 0.001 --results".split()
    assert command.main([*words, str(tmp_path)]) == 0
    [row] = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert (
        row["id"]["dtype"] == "bfloat16"
        and row["clocks"].startswith("SM 1980")
        and row["status"] == "ok"
    )
    assert row["provenance"]["device"] == "NVIDIA Pretended"
