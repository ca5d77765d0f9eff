"""A setting that cannot act is said, or refused where the run would be another than was asked for."""

import warnings

import pytest

from losia_kernels.cli import main
from losia_kernels.finetune.checks import check_options
from losia_kernels.finetune.data import load_data
from losia_kernels.finetune.idle import warn_idle, warn_idle_in_run
from losia_kernels.finetune.options import FinetuneOptions, InputError, with_config
from losia_kernels.finetune.trainer import sft_config
from tests.finetune.test_data import write

EVAL = {"eval_fraction": 0.5}


def options(**changes) -> FinetuneOptions:
    return FinetuneOptions(**{"model": "m", "data": "d.jsonl", "output": "o", **changes})


def said_by(warn, *arguments) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn(*arguments)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank_factor": 1, "shape": "square"}, "shape cannot act: with rank_factor 1"),
        ({"rank_factor": 1, "moves": "importance"}, "moves cannot act"),
        ({"rank_factor": 1, "period": 7, "alignment": 2}, "alignment, period cannot act"),
        ({"rank_factor": 1, "init_subnet": "calibrated"}, "init_subnet cannot act"),
        ({"moves": "none", "period": 7}, "period cannot act: with moves none subnets stay"),
        ({"importance": "gradient"}, "importance cannot act: subnets move by it with"),
        ({"lr_scheduler": "constant", "warmup_ratio": 0.2}, "warmup_ratio cannot act"),
        ({"master": "none", "dtype": "float32"}, "master cannot act"),
        ({"eval_steps": 7}, "eval_steps cannot act: there is no eval_data and no eval_fraction"),
        ({"eval_split": "validation"}, "eval_split cannot act: there is no eval_data"),
        ({"eval_split": "validation", **EVAL}, "eval_split cannot act: there is no eval_data"),
        ({"group_by_length": True, "batch_size": 1}, "group_by_length cannot act"),
        ({"data": "a/b", "eval_data": "a/b", "eval_split": "train"}, "eval_data is the data"),
        ({"data": "./d.jsonl", "eval_data": "./d.jsonl", "eval_split": "train"}, "eval_data is"),
    ],
)
def test_an_option_that_cannot_act_is_said(changes, words):
    said = said_by(warn_idle, options(**changes))
    assert len(said) == 1 and words in said[0]


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        ({"eval_delay": 3, "per_device_eval_batch_size": 2}, {}, "eval_delay, per_device_eval"),
        ({"eval_packing": True}, {}, "eval_packing cannot act"),
        ({"metric_for_best_model": "eval_loss"}, {}, "metric_for_best_model cannot act"),
        ({"greater_is_better": True}, EVAL, "greater_is_better cannot act"),
        ({"eval_strategy": "epoch"}, {**EVAL, "eval_steps": 7}, "eval_steps cannot act"),
        ({"save_strategy": "epoch"}, {"save_steps": 7}, "save_steps cannot act"),
        ({"save_strategy": "steps"}, {"save_steps": 0}, "save_steps cannot act"),
        ({"save_total_limit": 3}, {"save_steps": 0}, "save_total_limit cannot act"),
        ({"packing_strategy": "wrapped"}, {}, "packing_strategy cannot act: packing is off"),
        ({"padding_free": True}, {"packing": True}, "padding_free cannot act"),
        ({"padding_free": True}, {"group_by_length": True}, "group_by_length cannot act"),
        ({"data_seed": 3}, {"group_by_length": True}, "data_seed cannot act"),
        ({"gradient_checkpointing_kwargs": {}}, {}, "gradient_checkpointing is off"),
        ({"activation_checkpointing_kwargs": {}}, {}, "gradient_checkpointing is off"),
        ({"liger_kernel_config": {}}, {}, "use_liger_kernel is off"),
        ({"hub_model_id": "a/b"}, {}, "hub_model_id cannot act: push_to_hub is off"),
        ({"run_name": "a"}, {}, "run_name cannot act: report_to is none"),
        ({"lr_scheduler_kwargs": {"a": 1}}, {"lr_scheduler": "constant"}, "lr_scheduler_kwargs"),
    ],
)
def test_a_field_of_the_file_that_cannot_act_is_said(config, changes, words):
    said = said_by(warn_idle, options(config=config, **changes))
    assert len(said) == 1 and words in said[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"steps": 7},
        {"epochs": 5.0, "period": 7, "moves": "importance", "importance": "gradient"},
        {"rank_factor": 1, "output_dim_factor": 0.5, "period": 7},
        {**EVAL, "eval_steps": 7, "config": {"eval_delay": 1, "eval_on_start": True}},
        {"packing": True, "config": {"packing_strategy": "wrapped", "padding_free": True}},
        {"config": {"save_strategy": "epoch", "save_total_limit": 3, "data_seed": 1}},
        {"config": {"hub_model_id": "a", "push_to_hub": True}},
        {"data": "a/b", "eval_data": "a/b"},
        {"report_to": "all", "config": {"run_name": "a", "packing_strategy": None}},
    ],
)
def test_of_what_acts_nothing_is_said(changes):
    assert said_by(warn_idle, options(**changes)) == []
    check_options(options(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 7, "epochs": 2.0}, "epochs and steps exclude each other: each says how long"),
        ({"eval_data": "e", **EVAL}, "eval_data and eval_fraction exclude each other"),
        ({"packing": True, "group_by_length": True}, "packing and group_by_length exclude"),
        ({"data_split": "test"}, "data_split test is for folders and the hub: .* is one file"),
        ({"data_config": "main"}, "data_config main is for folders and the hub"),
        ({"eval_data": "data", "eval_split": "dev"}, "eval_split dev is for folders and the hub"),
        ({"master": "split", "dtype": "float32"}, "master split completes bfloat16 weights"),
        (
            {"group_by_length": True, "config": {"train_sampling_strategy": "sequential"}},
            "group_by_length and config: train_sampling_strategy sequential exclude each other",
        ),
        ({"config": {"train_sampling_strategy": "group_by_length"}}, "give the option group_by"),
        ({"config": {"eval_strategy": "epoch"}}, "eval_strategy needs eval_data or eval_fraction"),
        ({"config": {"eval_on_start": True}}, "eval_on_start needs eval_data or eval_fraction"),
        ({"config": {"load_best_model_at_end": True}}, "load_best_model_at_end needs eval_data"),
        ({**EVAL, "config": {"eval_strategy": False}}, "leaves eval_data or eval_fraction without"),
        (
            {**EVAL, "config": {"metric_for_best_model": "accuracy"}},
            "must be one of eval_loss, eval_mean_token_accuracy, got 'accuracy'",
        ),
    ],
)
def test_what_would_make_another_run_is_refused(tmp_path, changes, words):
    data = write(tmp_path / "d.jsonl", {"text": "a"})
    changes = {name: str(data) if value == "data" else value for name, value in changes.items()}
    with pytest.raises(InputError, match=words):
        check_options(options(data=str(data), **changes))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"lr_scheduler_kwargs": {"foo": 2}}, "config: .*unexpected keyword argument 'foo'"),
        ({"dataloader_persistent_workers": True}, "needs dataloader_num_workers"),
        ({"logging_first_step": True}, "cannot be set: log.jsonl has every step"),
        ({"dataset_num_proc": 2}, "cannot be set: the data is prepared by one process"),
        ({"hub_strategy": "end"}, "cannot be set: the finished model is pushed, once"),
        ({"resume": True}, "cannot be set: give --resume"),
        ({"adam_beta2": "1.5"}, "config: adam_beta2 must be at least 0 and below 1, got 1.5"),
        ({"adam_epsilon": -1}, "config: adam_epsilon must be at least 0, got -1"),
        ({"neftune_noise_alpha": "nan"}, "config: neftune_noise_alpha must be at least 0, got nan"),
        ({"pad_to_multiple_of": 0}, "config: pad_to_multiple_of must be at least 1, got 0"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be at least 1"),
        ({"save_total_limit": 0}, "config: save_total_limit must be at least 1, got 0"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch"},
            "the save and eval strategy to match.*found.*Evaluation strategy",
        ),
    ],
)
def test_a_field_that_never_acts_or_fits_nothing_is_refused_in_one_line(config, words):
    with pytest.raises(InputError, match=words) as error:
        sft_config(options(**EVAL, config=config))
    assert "\n" not in str(error.value)


def test_yamls_no_is_a_word():
    read = sft_config(options(config={"save_strategy": False, "eval_strategy": False}))
    assert (read.save_strategy, read.eval_strategy) == ("no", "no")


def test_what_the_command_line_says_takes_the_place_of_what_it_excludes():
    config = {"max_steps": 50, "eval_fraction": "1/4", "lr": 1e-3}
    given = with_config({"epochs": 2.0, "eval_data": "e.jsonl", "config": config})
    assert given == {"epochs": 2.0, "eval_data": "e.jsonl", "lr": 1e-3, "config": None}


def test_two_lengths_of_a_run_are_one_too_many(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["finetune", "--steps", "3", "--epochs", "3"])
    assert "--epochs: not allowed with argument --steps" in capsys.readouterr().err


PAIRS = [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(8)]
CHATS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
] * 8


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (PAIRS, {**EVAL, "eval_steps": 50}, "eval_steps 50 cannot act: the run has 6 steps"),
        (PAIRS, {"save_steps": 50}, "save_steps 50 cannot act: the run has 6 steps"),
        (PAIRS, {"print_every": 50}, "print_every 50 cannot act: the run has 6 steps"),
        (PAIRS, {"gradient_accumulation": 9}, "gradient_accumulation 9 cannot act whole: an epoch"),
        (PAIRS, {"batch_size": 9}, "batch_size 9 cannot act whole: there are 8 samples"),
        (PAIRS, {"samples": 9}, "samples 9 cannot act whole: there are 8 to ask"),
        (PAIRS, {"config": {"assistant_only_loss": False}}, "assistant_only_loss cannot act"),
        (PAIRS, {"config": {"chat_template_path": "x"}}, "chat_template_path cannot act: no row"),
        (PAIRS, {"config": {"dataset_text_field": "x"}}, "dataset_text_field cannot act"),
        (CHATS, {"config": {"completion_only_loss": False}}, "completion_only_loss cannot act"),
        ([*PAIRS, *CHATS], {"config": {"assistant_only_loss": False}}, None),
        ([{"text": "a b"}] * 8, {"config": {"dataset_text_field": "text"}}, None),
        (PAIRS, {**EVAL, "eval_steps": 6, "save_steps": 6, "print_every": 6}, None),
    ],
)
def test_what_the_data_leaves_nothing_to_do_is_said(tmp_path, tokenizer, rows, changes, words):
    given = options(data=str(write(tmp_path / "d.jsonl", *rows)), **changes)
    data = load_data(given, sft_config(given), tokenizer)
    said = said_by(warn_idle_in_run, given, data, 6, 1)
    assert len(said) == bool(words) and (not words or words in said[0])
