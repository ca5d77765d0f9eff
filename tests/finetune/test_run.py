"""The whole job on a tiny model: what a run leaves, that it is plain, that a killed run resumes to
the same bits."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainerCallback
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from losia_kernels import cli
from losia_kernels.finetune.data import Collator, load_samples
from losia_kernels.finetune.folder import last_checkpoint, save_model
from losia_kernels.finetune.options import FinetuneOptions, InputError
from losia_kernels.finetune.progress import read_log, rewind_log
from losia_kernels.finetune.run import convert_model, finetune, training_arguments
from tests.integrations.tiny_llama import make_model, make_tokenizer

STEPS, KILLED_AT = (
    14,
    10,
)  # one epoch is 5 steps; the last checkpoint before the kill, 8, is in the middle of a slot


def write_data(path: Path, count: int, first: int = 0) -> Path:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [letters[i % 26] * (i % 5 + 1) for i in range(first, first + count)]
    path.write_text(
        "".join(json.dumps({"prompt": f"{w}:", "completion": w.upper()}) + "\n" for w in words)
    )
    return path


def options(folder: Path, model: Path, **changes) -> FinetuneOptions:
    """A run that uses every moving part: accumulation, length groups, output layer, warm-up,
    evaluation."""
    values = dict(
        model=str(model),
        data=str(write_data(folder / "train.jsonl", 38)),
        output=str(folder / "run"),
        eval_data=str(write_data(folder / "eval.jsonl", 6, first=40)),
        rank_factor=1 / 4,
        output_dim_factor=1 / 8,
        period=3,
        lr=1e-2,
        steps=STEPS,
        batch_size=4,
        gradient_accumulation=2,
        group_by_length=True,
        save_steps=4,
        eval_steps=5,
        print_every=4,
        max_length=64,
    )
    return FinetuneOptions(**{**values, **changes})


@torch.no_grad()
def loss_on(data: Path, model_folder: Path) -> float:
    """The mean loss of a saved model over a file."""
    samples, _ = load_samples(data, make_tokenizer(), 64)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    return float(model(**Collator(256)(samples)).loss)


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
    assert changed == {
        key for key in trained if "_proj" in key or "embed" in key
    }  # the output layer is tied
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


def test_resume_with_other_options_or_data_is_refused(whole_run, tmp_path, model_folder):
    shutil.copytree(whole_run, tmp_path / "run")
    for path in ("train.jsonl", "eval.jsonl"):
        shutil.copy(whole_run.parent / path, tmp_path)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    first = {
        **record,
        "data": str(tmp_path / "train.jsonl"),
        "eval_data": str(tmp_path / "eval.jsonl"),
    }
    (tmp_path / "run" / "run.json").write_text(json.dumps(first))
    with pytest.raises(
        InputError, match=r"with other options: lr was 0.01, now 0.02, period was 3, now 4"
    ):
        finetune(options(tmp_path, model_folder, resume=True, lr=2e-2, period=4))
    changed = options(tmp_path, model_folder, resume=True)
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(InputError, match="with other options: data_sha256"):
        finetune(changed)


def test_resuming_a_finished_run_changes_nothing(whole_run, model_folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in (whole_run / "model").iterdir()}
    assert finetune(options(whole_run.parent, model_folder, resume=True)) == whole_run / "model"
    assert "is finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (whole_run / "model").iterdir()}


def test_a_model_is_written_whole_or_not_at_all(tmp_path):
    class Full:
        def save_pretrained(self, folder):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        save_model(make_model(), Full(), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    save_model(make_model(), make_tokenizer(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_export_is_the_model_at_that_step(whole_run, tmp_path):
    last = whole_run / "checkpoints" / f"checkpoint-{STEPS}"
    assert cli.main(["export", str(last), str(tmp_path / "exported")]) == 0
    exported, final = (
        load_file(f / "model.safetensors") for f in (tmp_path / "exported", whole_run / "model")
    )
    assert exported.keys() == final.keys() and all(
        torch.equal(exported[key], final[key]) for key in final
    )
    assert (tmp_path / "exported" / "tokenizer.json").exists()


def test_inspect_says_what_a_checkpoint_holds(whole_run, capsys):
    assert cli.main(["inspect", str(whole_run / "checkpoints" / "checkpoint-12")]) == 0
    said = capsys.readouterr().out
    for line in (
        "step            12",
        "observing       model.layers.0",
        "groups          3, period 3, update async",
        "layers          15",
        "   1 x lm_head  weight 261 x 32  subnet 32 x 32",
        "   2 x model.layers.*.mlp.down_proj  weight 32 x 48  subnet 8 x 12",
    ):
        assert line in said.splitlines(), said


def test_the_terminal_says_what_runs_and_how_far_it_is(tmp_path, model_folder, capsys):
    chosen = {
        "steps": 8,
        "period": "auto",
        "output_dim_factor": 0.0,
        "save_steps": 0,
        "eval_data": None,
    }
    finetune(options(tmp_path, model_folder, **chosen))
    said = capsys.readouterr().out
    assert "14 layers in 2 groups" in said and "period 2 steps (auto), 2.0 cycles" in said
    assert (
        "38 samples" in said
        and "8 steps of 4 x 2 samples, lr 0.01 cosine, 1 steps of warm-up" in said
    )
    lines = [line for line in said.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["4/8", "8/8"]
    for part in ("loss ", "lr ", " tokens/s ", " GiB ", "left 0:00:0", "observing model.layers.1"):
        assert part in lines[0], lines
    assert not (tmp_path / "run" / "checkpoints").exists() or not list(
        (tmp_path / "run" / "checkpoints").iterdir()
    )


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
            "master": "remainder",
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
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_options_run_and_learn(tmp_path, model_folder, extra):
    finetune(options(tmp_path, model_folder, steps=8, save_steps=0, eval_data=None, **extra))
    data = tmp_path / "train.jsonl"
    assert loss_on(data, tmp_path / "run" / "model") < loss_on(data, model_folder)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto")
    assert model.dtype == (torch.bfloat16 if extra.get("dtype") else torch.float32)


def test_a_constant_rate_has_no_warm_up_and_rewarms_from_the_first_move(tmp_path, model_folder):
    for scheduler, expected in (("constant", 0), ("constant_with_warmup", 2), ("cosine", 2)):
        chosen = options(tmp_path, model_folder, lr_scheduler=scheduler, warmup_ratio=0.1)
        assert convert_model(make_model(), chosen, steps=20).warmup_steps == expected
        assert training_arguments(chosen, steps=20).warmup_steps == expected


def test_the_first_subnets_are_calibrated_unless_told_not_to(tmp_path, model_folder):
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


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    model = make_model()
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        finetune(options(tmp_path, tmp_path / "model", init_subnet="random"))
    assert not (tmp_path / "run" / "model").exists()


def test_rewinding_a_log_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    rewind_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_sample_longer_than_learned_positions_is_told_before_the_run(tmp_path):
    """GPT-2 fails in the middle, at the step that draws the sample."""
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=261, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    given = options(tmp_path, tmp_path / "gpt2", steps=2)
    Path(given.data).write_text('{"text": "short"}\n{"text": "seventeen tokens"}\n')
    with pytest.raises(
        InputError, match="a sample has 17 tokens, but GPT2LMHeadModel has learned 16 positions"
    ):
        finetune(given)
    assert not (tmp_path / "run").exists()
    finetune(dataclasses.replace(given, max_length=16))
    assert (tmp_path / "run" / "model").exists()


def test_packing_says_nothing_at_every_step(tmp_path, model_folder):
    with CaptureLogger(logging.get_logger("transformers.trainer")) as said:
        finetune(options(tmp_path, model_folder, packing=True, group_by_length=False, steps=2))
    assert "Could not determine" not in said.out
