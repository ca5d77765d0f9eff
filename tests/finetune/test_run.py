"""The whole job on a tiny model: what a run leaves, that it is plain, that a killed run resumes to
the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from losia_kernels.finetune.checkpoints import last_checkpoint
from losia_kernels.finetune.run import finetune
from losia_kernels.integrations.history import read_log
from tests.finetune.tiny_run import STEPS, loss_on, options

KILLED_AT = 10  # the last checkpoint before it, 8, is in the middle of a slot


class FirstStep(TrainerCallback):
    """Where training began."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), 9)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("whole")
    assert finetune(options(folder, model_folder)) == folder / "run" / "model"
    return folder / "run"


def test_the_model_is_plain(whole_run, model_folder):
    trained, original = (
        load_file(folder / "model.safetensors") for folder in (whole_run / "model", model_folder)
    )
    assert {k: (v.shape, v.dtype) for k, v in trained.items()} == {
        k: (v.shape, v.dtype) for k, v in original.items()
    }
    changed = {key for key in trained if not torch.equal(trained[key], original[key])}
    # the output layer is tied to the embedding
    assert changed == {key for key in trained if "_proj" in key or "embed" in key}
    assert not list(whole_run.glob("*.tmp"))
    ours, theirs = (
        json.loads((folder / "config.json").read_text())
        for folder in (whole_run / "model", model_folder)
    )
    assert ours == theirs


def test_the_model_loads_and_generates_where_this_package_is_not(whole_run):
    code = f"""
import sys
sys.modules["losia_kernels"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(whole_run / "model")!r})
model, report = AutoModelForCausalLM.from_pretrained({str(whole_run / "model")!r}, output_loading_info=True)
assert not any(report.values()), report
tokens = model.generate(**tokenizer("abc:", return_tensors="pt"), max_new_tokens=4, min_new_tokens=4, do_sample=False)
print("TOKENS", tokens.shape[1])
try:
    import losia_kernels
except ImportError:
    print("ABSENT")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "TOKENS 8" in result.stdout and "ABSENT" in result.stdout, result.stderr


def test_it_has_learned(whole_run, model_folder):
    data = whole_run.parent / "train.jsonl"
    before, after = loss_on(data, model_folder), loss_on(data, whole_run / "model")
    assert after < before - 0.3, (before, after)


def test_log_and_picture(whole_run):
    entries = read_log(whole_run / "log.jsonl")
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, STEPS + 1))
    assert all(entry["tokens_per_second"] > 0 and entry["memory_gib"] > 0 for entry in steps)
    turns = ["lm_head", "model.layers.0", "model.layers.1"]
    assert [entry["observing"] for entry in steps] == [
        [turns[step // 3 % 3]] for step in range(STEPS)
    ]
    moves = [(entry["step"], entry["relocalized"]) for entry in entries if "relocalized" in entry]
    assert moves == [(step + 1, [turns[step // 3 % 3]]) for step in range(2, STEPS, 3)]
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [5, 10, 14]
    assert (whole_run / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_resumes_to_the_same_bits(whole_run, tmp_path, model_folder):
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]; import tests.finetune.test_run as t; from pathlib import Path\n"
        "t.finetune(t.options(Path(sys.argv[2]), Path(sys.argv[3])), callbacks=(t.Kill(),))"
    )
    arguments = [str(Path(__file__).parents[2]), str(tmp_path), str(model_folder)]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True
    )
    assert result.returncode == -9, result.stderr
    run = tmp_path / "run"
    assert not (run / "model").exists()
    assert [entry["step"] for entry in read_log(run / "log.jsonl")][-1] == KILLED_AT - 1
    assert last_checkpoint(run / "checkpoints").name == "checkpoint-8"
    assert (run / "loss_curve.png").exists()
    first = FirstStep()
    finetune(options(tmp_path, model_folder, resume=True), callbacks=(first,))
    assert first.step == 8
    whole, resumed = (
        load_file(folder / "model" / "model.safetensors") for folder in (whole_run, run)
    )
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name
    losses = [
        [e.get("loss", e.get("eval_loss")) for e in read_log(f / "log.jsonl")]
        for f in (whole_run, run)
    ]
    assert losses[0] == losses[1]


def test_resuming_a_finished_run_changes_nothing(whole_run, model_folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in (whole_run / "model").iterdir()}
    assert finetune(options(whole_run.parent, model_folder, resume=True)) == whole_run / "model"
    assert "is finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (whole_run / "model").iterdir()}


def test_a_run_shorter_than_a_cycle_is_warned_about(tmp_path, model_folder):
    with pytest.warns(UserWarning, match="the largest period that gives every group a turn is 2"):
        finetune(
            options(tmp_path, model_folder, steps=4, period=5, output_dim_factor=0.0, save_steps=0)
        )


@pytest.mark.parametrize(
    "extra",
    [
        {"alignment": 4, "moments": "int8"},
        {"dtype": "bfloat16", "moments": "bfloat16", "master": "none"},
        {
            "dtype": "bfloat16",
            "moments": "int8",
            "master": "split",
            "in_backward": True,
            "max_grad_norm": 0.0,
            "gradient_accumulation": 1,
        },
        {"packing": True, "group_by_length": False},
        {"gradient_checkpointing": True},
        {"dtype": "bfloat16"},
        {"importance": "marginal"},
        {"importance": "gradient", "init_subnet": "random"},
        {"output_dim_factor": 1.0},
        {"shape": "wide", "moves": "random", "init_subnet": "random", "lr": 1e-3},
        {"moves": "none"},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_options_run_and_learn(tmp_path, model_folder, extra):
    finetune(options(tmp_path, model_folder, steps=8, save_steps=0, eval_data=None, **extra))
    data = tmp_path / "train.jsonl"
    assert loss_on(data, tmp_path / "run" / "model") < loss_on(data, model_folder)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto")
    assert model.dtype == (torch.bfloat16 if extra.get("dtype") else torch.float32)


def test_calibration_begins_with_other_subnets_than_a_draw(tmp_path, model_folder):
    weights = []
    for name in ("calibrated", "random"):
        folder = tmp_path / name
        folder.mkdir()
        finetune(
            options(
                folder,
                model_folder,
                steps=3,
                save_steps=0,
                eval_data=None,
                init_subnet=name,
                period=1,
            )
        )
        weights.append(load_file(folder / "run" / "model" / "model.safetensors"))
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, model_folder):
    weights = []
    for name in (False, True):
        folder = tmp_path / str(name)
        folder.mkdir()
        finetune(
            options(
                folder,
                model_folder,
                steps=6,
                save_steps=0,
                eval_data=None,
                gradient_checkpointing=name,
            )
        )
        weights.append(load_file(folder / "run" / "model" / "model.safetensors"))
    for key, weight in weights[0].items():
        torch.testing.assert_close(weights[1][key], weight)
