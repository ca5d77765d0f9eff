"""The Trainer that a run uses, and its arguments."""

from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from losia_kernels import LoSiAAdamW
from losia_kernels.finetune.model import convert_model
from losia_kernels.finetune.run import finetune
from losia_kernels.finetune.trainer import sft_config
from tests.finetune.tiny_run import options
from tests.integrations.tiny_llama import make_model


def test_packing_says_nothing_at_every_step(tmp_path, model_folder):
    with CaptureLogger(logging.get_logger("transformers.trainer")) as printed:
        finetune(options(tmp_path, model_folder, packing=True, group_by_length=False, steps=2))
    assert "Could not determine" not in printed.out


def test_a_constant_rate_has_no_warm_up_and_rewarms_from_the_first_move(tmp_path, model_folder):
    for scheduler, expected in (("constant", 0), ("constant_with_warmup", 2), ("cosine", 2)):
        chosen = options(tmp_path, model_folder, lr_scheduler=scheduler, warmup_ratio=0.1)
        model = make_model()
        convert_model(model, chosen, 20)
        assert LoSiAAdamW(model, total_steps=20).timeline.config.warmup_steps == expected
        assert sft_config(chosen, steps=20).warmup_steps == expected
