"""The Trainer that a run uses, and its arguments."""

import dataclasses
import shutil

import pytest
from torch.nn.modules.module import _IncompatibleKeys
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from losia_kernels import LoSiAAdamW
from losia_kernels.finetune import run as finetune_run
from losia_kernels.finetune.model import convert_model
from losia_kernels.finetune.run import finetune
from losia_kernels.finetune.trainer import FinetuneTrainer, sft_config
from tests.finetune.tiny_run import options
from tests.integrations.tiny_llama import make_model


@pytest.mark.parametrize("how", [{"packing": True}, {"config": {"padding_free": True}}])
def test_packing_says_nothing_at_every_step(tmp_path, model_folder, how):
    with CaptureLogger(logging.get_logger("transformers.trainer")) as printed:
        finetune(options(tmp_path, model_folder, group_by_length=False, steps=2, **how))
    assert "Could not determine" not in printed.out


def test_a_constant_rate_has_no_warm_up_and_rewarms_from_the_first_move(tmp_path, model_folder):
    for scheduler, expected in (("constant", 0), ("constant_with_warmup", 2), ("cosine", 2)):
        chosen = options(tmp_path, model_folder, lr_scheduler=scheduler, warmup_ratio=0.1)
        model = make_model()
        convert_model(model, chosen, 20)
        assert LoSiAAdamW(model, total_steps=20).timeline.config.warmup_steps == expected
        assert sft_config(chosen, steps=20).warmup_steps == expected


def test_a_tied_weight_that_is_saved_once_is_not_missing(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("transformers.trainer.logger.warning", said.append)
    trainer = object.__new__(FinetuneTrainer)
    trainer.model = make_model()
    trainer._issue_warnings_after_load(_IncompatibleKeys(["lm_head.weight"], []))
    assert said == []
    trainer._issue_warnings_after_load(
        _IncompatibleKeys(["lm_head.weight", "model.norm.weight"], [])
    )
    assert len(said) == 1 and "model.norm.weight" in said[0] and "lm_head" not in said[0]


def test_what_a_resumed_run_may_have_otherwise_is_no_mistake(tmp_path, model_folder):
    first = options(tmp_path, model_folder, steps=4, save_steps=2)
    finetune(first)
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    with CaptureLogger(logging.get_logger("transformers.trainer_utils")) as printed:
        finetune(dataclasses.replace(first, resume=True, save_steps=3, print_every=1))
    assert printed.out == ""


def test_what_is_not_here_is_said_to_be_asked_of_the_hub(
    tmp_path, model_folder, capsys, monkeypatch
):
    monkeypatch.setattr(finetune_run, "check_rows", lambda *a: print("looked at"))
    monkeypatch.setattr(finetune_run, "load_tokenizer", lambda *a: 1 / 0)
    data = str(options(tmp_path, model_folder).data)
    for model, said in (
        ("some/model", "from the hub: some/model\nlooked"),
        (model_folder, "looked"),
    ):
        with pytest.raises(ZeroDivisionError):
            finetune(options(tmp_path, model, data=data))
        assert said in capsys.readouterr().out
