"""``finetune`` under torchrun: the same model as in one process, resumed on another number of processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for library in ("transformers", "accelerate", "matplotlib", "psutil"):
    pytest.importorskip(library)

HERE = Path(__file__).parent
OPTIONS = ["--lr", "1e-3", "--init-subnet", "random", "--period", "2", "--rank-factor", "1/4", "--max-length", "32",
           "--dtype", "float32"]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    sys.path.insert(0, str(HERE.parent / "integrations"))
    from tiny_llama import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("inputs")
    make_model(layers=3).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    lines = [{"prompt": f"{n} plus {n} is ", "completion": str(2 * n) * (1 + n % 3)} for n in range(64)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def finetune(inputs: Path, output: Path, processes: int, *options: str) -> str:
    launch = [] if processes == 1 else ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, "losia_kernels", "finetune", "--model", str(inputs / "model"),
         "--data", str(inputs / "data.jsonl"), "--output", str(output), *OPTIONS, *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""},
        cwd=HERE.parent.parent, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def weights(run: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(run / "model").state_dict()


def keys(run: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(run / "model" / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def losses(run: Path) -> list[float]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.slow
def test_two_processes_and_a_resume_on_one(inputs, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finetune(inputs, whole, 1, "--batch-size", "8", "--gradient-accumulation", "2", "--steps", "8")
    said = finetune(
        inputs, parts, 2, "--batch-size", "4", "--gradient-accumulation", "2", "--steps", "8", "--save-steps", "5"
    )
    assert "on each of 2 processes" in said and said.count("model  ") == 1
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    expected, start = weights(whole), weights(inputs)
    torch.testing.assert_close(weights(parts), expected, rtol=0, atol=1e-5)
    assert len([name for name, value in expected.items() if not torch.equal(value, start[name])]) == 3 * 7
    assert keys(parts) == keys(whole)

    (parts / "model").rename(tmp_path / "first")
    shutil.rmtree(parts / "checkpoints" / "checkpoint-8")
    said = finetune(inputs, parts, 1, "--batch-size", "8", "--gradient-accumulation", "2", "--steps", "8",
                    "--save-steps", "5", "--resume")
    assert "resuming from" in said and "checkpoint-5" in said
    torch.testing.assert_close(weights(parts), expected, rtol=0, atol=1e-5)
