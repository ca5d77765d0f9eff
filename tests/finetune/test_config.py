"""``--config``: a file says what the command line does not, under our names or TRL's; every field of
SFTConfig can be set in it, or is refused with the reason."""

import dataclasses
import json
import os
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig

from losia_kernels.cli import main
from losia_kernels.finetune import run as run_module
from losia_kernels.finetune.declare import read_config
from losia_kernels.finetune.options import FinetuneOptions, InputError, with_config
from losia_kernels.finetune.run import finetune
from losia_kernels.finetune.trainer import DECIDED, sft_config
from tests.conftest import INTERPRETED
from tests.finetune.tiny_run import options
from tests.integrations.tiny_llama import make_model
from tests.liger import in_this_process_no_more, interpreted


def written(folder, text):
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def settle(folder, text, **given):
    return FinetuneOptions(**with_config({**given, "config": read_config(written(folder, text))}))


BASE = "model: m\ndata: d.jsonl\noutput: o\n"


def test_the_file_says_what_the_command_line_does_not(tmp_path):
    text = (
        BASE
        + "lr: 1e-3\nrank-factor: 1/16\nperiod: auto\nin_backward: true\nneftune_noise_alpha: 5\n"
    )
    read = settle(tmp_path, text, lr=2e-3, batch_size=1)
    assert (read.lr, read.rank_factor, read.period, read.batch_size) == (2e-3, 1 / 16, "auto", 1)
    assert read.in_backward and read.config == {"neftune_noise_alpha": 5}
    assert settle(tmp_path, text).lr == 1e-3  # which YAML takes for text


def test_names_of_trls_command_are_the_options(tmp_path):
    text = """
model_name_or_path: m
dataset_name: d.jsonl
output_dir: o
learning_rate: 3.0e-4
per_device_train_batch_size: 2
gradient_accumulation_steps: 3
num_train_epochs: 2
max_steps: -1
max_length: 77
packing: true
"""
    read = settle(tmp_path, text)
    assert (read.model, read.data, read.output) == ("m", "d.jsonl", "o")
    assert (read.lr, read.batch_size, read.gradient_accumulation) == (3e-4, 2, 3)
    assert (read.epochs, read.steps, read.max_length, read.packing) == (2.0, None, 77, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: fast", "config: lr: could not convert string to float: 'fast'"),
        ("lr: [1, 2]", "config: lr must be a single value"),
        ("rank_factor: x", "config: rank_factor: expected a number or a fraction"),
        ("packing: 3", "config: packing must be true or false, got 3"),
        ("dtype: float8", "config: dtype must be one of auto, float32, bfloat16; got 'float8'"),
        ("lr: 1e-3\nlearning_rate: 1e-4", "config: lr stands there twice, also as learning_rate"),
        ("lr: 1e-3\nsteps: 3\nlr: 1e-4", "run.yaml: lr stands there twice"),
        ("rank-factor: 1/8\nrank_factor: 1/4", "run.yaml: rank_factor stands there twice"),
        ("- lr", "run.yaml: expected settings, one 'name: value' a line"),
        ("lr: {", "run.yaml: not valid YAML: "),
        ("env: 3", "run.yaml: 'env' must hold names and values"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path, text, words):
    with pytest.raises(InputError) as error:
        settle(tmp_path, text)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["finetune", "--config", str(tmp_path / "absent.yaml")])
    assert "absent.yaml" in capsys.readouterr().err


def test_the_file_sets_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LOSIA_TEST", "before")
    settle(tmp_path, BASE + "env:\n  LOSIA_TEST: 7\n")
    assert os.environ["LOSIA_TEST"] == "7"


def test_every_field_of_sftconfig_can_be_set_or_says_why_not(tmp_path):
    """None is known to nobody: an option sets it, the run decides it, or the file does."""
    by_option = {each.metadata["trl"] for each in dataclasses.fields(FinetuneOptions)} - {None}
    values = {"dataset_text_field": "note", "adam_beta2": "0.95", "eval_packing": True}
    for field in dataclasses.fields(SFTConfig):
        given = options_of(tmp_path, **{field.name: values.get(field.name, field.default)})
        if field.name in by_option:
            with pytest.raises(InputError, match=f"config: {field.name} is the option "):
                sft_config(given)
        elif field.name in DECIDED:
            with pytest.raises(InputError, match=f"config: {field.name} cannot be set: "):
                sft_config(given)
    read = sft_config(options_of(tmp_path, **values))
    assert (read.dataset_text_field, read.adam_beta2, read.eval_packing) == ("note", 0.95, True)


def options_of(folder, **config):
    return FinetuneOptions(model="m", data="d", output=str(folder / "run"), config=config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"neftune_noise": 5},
            "there is no option neftune_noise, .* did you mean neftune_noise_alpha?",
        ),
        ({"loss_type": "mse"}, "config: loss_type must be one of nll, dft"),
        ({"adam_beta2": "x"}, "config: .*adam_beta2.*: invalid float value: 'x'"),
        ({"optim": "adafactor"}, "config: optim cannot be set: LoSiA brings its own optimizer"),
    ],
)
def test_a_field_that_does_not_exist_or_fit_is_named(tmp_path, config, words):
    with pytest.raises(InputError, match=words) as error:
        sft_config(options_of(tmp_path, **config))
    assert "\n" not in str(error.value)


def test_a_run_by_a_file_alone(tmp_path, model_folder, capsys):
    """As TRL's users write it, with fields that no option has."""
    given = options(tmp_path, model_folder)
    text = f"""
model_name_or_path: {model_folder}
dataset_name: {given.data}
output: {tmp_path / "run"}
steps: 4
lr: 1.0e-2
rank_factor: 1/4
period: 2
save_steps: 0
neftune_noise_alpha: 5
adam_beta2: 0.95
per_device_eval_batch_size: 3
eval_fraction: 0.2
"""
    assert main(["finetune", "--config", written(tmp_path, text), "--print-every", "1"]) == 0
    said = capsys.readouterr().out
    assert "step 4/4" in said and "% of learned tokens right" in said
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["neftune_noise_alpha"] == 5 and record["lr"] == 1e-2


def test_fields_that_exclude_each_other_leave_nothing_behind(tmp_path, model_folder):
    config = {"gradient_checkpointing_kwargs": {"selective": True}}
    with pytest.raises(InputError, match="requires `gradient_checkpointing=True`"):
        finetune(options(tmp_path, model_folder, config=config))
    assert not (tmp_path / "run").exists()


def test_the_help_names_the_config(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    said = capsys.readouterr().out
    assert "--config FILE" in said and "SFTConfig" in said


def test_a_secret_of_the_file_is_in_no_file_of_the_run(tmp_path, model_folder):
    from losia_kernels.finetune.folder import open_run

    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "a"}\n')
    text = f"model: {model_folder}\ndata: {data}\noutput: {tmp_path / 'o'}\nhub_token: hf_secret\n"
    record, _ = open_run(settle(tmp_path, text + "neftune_noise_alpha: 5\n"))
    assert "hf_secret" not in json.dumps(record)
    assert record["config"] == {"neftune_noise_alpha": 5}


def test_adams_fields_of_the_file_reach_the_optimizer(tmp_path, model_folder):
    text = "adam_beta1: 0.5\nadam_beta2: 0.75\nadam_epsilon: 1e-3\nhub_token: hf_secret\n"
    config = read_config(written(tmp_path, text))
    seen = []

    class See(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, **kwargs):
            group = getattr(optimizer, "optimizer", optimizer).param_groups[0]
            seen.append((tuple(group["betas"]), group["eps"]))

    run = options(tmp_path, model_folder, config=config, save_steps=1, steps=2)
    finetune(run, (See(),))
    assert set(seen) == {((0.5, 0.75), 1e-3)}
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 10 and not any(b"hf_secret" in path.read_bytes() for path in files)


def test_one_step_is_taken_at_a_rate(tmp_path, model_folder):
    assert FinetuneOptions(model="m", data="d", output="o").warmup_steps(1) == 0
    assert FinetuneOptions(model="m", data="d", output="o", warmup_ratio=0.9).warmup_steps(3) == 2


@pytest.mark.parametrize("text", ["", "- a list", "a: [", None])
def test_the_command_line_says_what_is_wrong_with_the_file(tmp_path, capsys, text):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as error:
        main(["finetune", "--config", str(path)])
    assert error.value.code == 2 and "invalid" not in capsys.readouterr().err


def test_kernels_that_need_a_gpu_leave_nothing_behind_without_one(tmp_path, model_folder):
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    with pytest.raises(InputError, match="use_liger_kernel needs a GPU"):
        finetune(options(tmp_path, model_folder, config={"use_liger_kernel": True}))
    assert not (tmp_path / "run").exists()


SHORT = {"steps": 1, "batch_size": 1, "gradient_accumulation": 1, "max_length": 8}
SHORT |= {"eval_data": None, "group_by_length": False}


def test_kernels_of_liger_train_what_the_plain_model_would(tmp_path, model_folder, monkeypatch):
    """Under Triton's interpreter, the output layer among what is trained: TRL leaves Liger's loss out."""
    pytest.importorskip("liger_kernel")
    if not INTERPRETED:
        pytest.skip("kernels are compiled in this process")
    weights = []
    for use in (False, True):
        (folder := tmp_path / str(use)).mkdir()
        run = options(folder, model_folder, config={"use_liger_kernel": use}, **SHORT)
        with monkeypatch.context() as patch, interpreted(), in_this_process_no_more(make_model()):
            if use:
                there = SimpleNamespace(is_available=lambda: True)
                patch.setattr(run_module, "torch", SimpleNamespace(accelerator=there))
            finetune(run)
        weights.append(AutoModelForCausalLM.from_pretrained(folder / "run" / "model").state_dict())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)
