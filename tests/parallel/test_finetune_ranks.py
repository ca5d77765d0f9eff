"""``finetune`` under torchrun and accelerate: the model of one process, resumed on another number
of processes."""

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
ROOT = HERE.parent.parent
OPTIONS = [
    "--lr",
    "1e-3",
    "--shape",
    "square",
    "--moves",
    "importance",
    "--period",
    "2",
    "--rank-factor",
    "1/4",
    "--max-length",
    "32",
    "--dtype",
    "float32",
]
RUN = ["--gradient-accumulation", "2", "--steps", "8"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    from tests.integrations.tiny_llama import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("inputs")
    make_model(layers=3).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    lines = [
        {"prompt": f"{n} plus {n} is ", "completion": str(2 * n) * (1 + n % 3)} for n in range(64)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def launched(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        timeout=170,
        cwd=ROOT,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "CUDA_VISIBLE_DEVICES": "",
            "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": str(ROOT),
        },
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def arguments(inputs: Path, output: Path, *options: str) -> list[str]:
    return [
        "finetune",
        "--model",
        str(inputs / "model"),
        "--data",
        str(inputs / "data.jsonl"),
        "--output",
        str(output),
        *OPTIONS,
        *options,
    ]


def finetune(inputs: Path, output: Path, processes: int, *options: str) -> str:
    launch = (
        []
        if processes == 1
        else ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    )
    return launched(*launch, "losia_kernels", *arguments(inputs, output, *options))


def accelerate(config: str, inputs: Path, output: Path, processes: int, *options: str) -> str:
    program = (
        [str(HERE / "finetune_as_on_gpus.py")] if config == "fsdp2" else ["-m", "losia_kernels"]
    )
    return launched(
        "accelerate.commands.launch",
        "--config_file",
        f"examples/distributed/{config}.yaml",
        "--num_processes",
        str(processes),
        *program,
        *arguments(inputs, output, *options),
    )


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """The run of one process, which all others must equal."""
    run = tmp_path_factory.mktemp("whole") / "run"
    finetune(inputs, run, 1, "--batch-size", "8", *RUN)
    return run


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
def test_two_processes_and_a_resume_on_one(inputs, whole, tmp_path):
    parts = tmp_path / "parts"
    said = finetune(inputs, parts, 2, "--batch-size", "4", *RUN, "--save-steps", "5")
    assert "on each of 2 processes" in said and said.count("model  ") == 1
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    expected, start = weights(whole), weights(inputs)
    torch.testing.assert_close(weights(parts), expected, rtol=0, atol=1e-5)
    assert (
        len([name for name, value in expected.items() if not torch.equal(value, start[name])])
        == 3 * 7
    )
    assert keys(parts) == keys(whole)

    (parts / "model").rename(tmp_path / "first")
    shutil.rmtree(parts / "checkpoints" / "checkpoint-8")
    said = finetune(inputs, parts, 1, "--batch-size", "8", *RUN, "--save-steps", "5", "--resume")
    assert "resuming from" in said and "checkpoint-5" in said
    torch.testing.assert_close(weights(parts), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_an_evaluation_of_two_processes_is_that_of_one(inputs, tmp_path):
    """Of 13 samples, of which one process evaluates a last batch that the other fills up."""
    options = ["--steps", "2", "--eval-fraction", "1/5", "--save-steps", "0"]
    seen = []
    for processes, size in ((1, "8"), (2, "4")):
        run = tmp_path / str(processes)
        finetune(inputs, run, processes, "--batch-size", size, *options)
        entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        seen.append([(e["eval_loss"], e["eval_accuracy"]) for e in entries if "eval_loss" in e])
    assert len(seen[0]) == 1 and seen[1][0] == pytest.approx(seen[0][0], rel=1e-5)


@pytest.mark.slow
def test_the_accelerate_config_of_ddp(inputs, whole, tmp_path):
    said = accelerate("ddp", inputs, tmp_path / "run", 2, "--batch-size", "4", *RUN)
    assert "on each of 2 processes" in said
    torch.testing.assert_close(weights(tmp_path / "run"), weights(whole), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_accelerate_config_of_fsdp2_and_a_resume_on_four(inputs, whole, tmp_path):
    run = tmp_path / "run"
    accelerate("fsdp2", inputs, run, 2, "--batch-size", "4", *RUN, "--save-steps", "5")
    assert (run / "checkpoints" / "checkpoint-5" / "pytorch_model_fsdp_0").exists()
    torch.testing.assert_close(weights(run), weights(whole), rtol=0, atol=1e-5)
    assert keys(run) == keys(whole)

    (run / "model").rename(tmp_path / "first")
    shutil.rmtree(run / "checkpoints" / "checkpoint-8")
    said = accelerate(
        "fsdp2", inputs, run, 4, "--batch-size", "2", *RUN, "--save-steps", "5", "--resume"
    )
    assert "checkpoint-5" in said
    torch.testing.assert_close(weights(run), weights(whole), rtol=0, atol=1e-5)

    # as if the run had been killed when only the model was not written
    shutil.rmtree(run / "model")
    said = accelerate(
        "fsdp2", inputs, run, 2, "--batch-size", "4", *RUN, "--save-steps", "5", "--resume"
    )
    assert "checkpoint-8" in said and "step 9" not in said
    torch.testing.assert_close(weights(run), weights(whole), rtol=0, atol=1e-5)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "checkpoint-5",
        "checkpoint-8",
    }
    from losia_kernels.checkpoint.export import export_checkpoint

    with pytest.raises(
        ValueError, match="several processes' shards: finetune --resume makes a model of the run"
    ):
        export_checkpoint(run / "checkpoints" / "checkpoint-8", tmp_path / "exported")
