"""The tables of ``docs/memory.md`` are what the memory model computes."""

import dataclasses
from pathlib import Path

import pytest

from bench.speed.memory import LoRA
from bench.speed.models import CONFIGS
from losia_kernels.finetune.estimate import LoSiA, ModelShape, Setting, estimate

LLAMA_7B = ModelShape.from_config(CONFIGS["llama-2-7b"])
PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
INT8 = dict(moments="int8", master="split")
IN_BACKWARD = dict(moments="int8", in_backward=True)
TABLE = {
    "wide, at random, as by default": dict(shape="wide", moves="random"),
    "square, by importance (`LoSiAConfig.paper()`)": {},
    'int8 moments, `"split"`': INT8,
    'int8 moments, `"split"` (or `"float32"`), `in_backward`': IN_BACKWARD,
    'the same with `importance="sensitivity_bfloat16"`': IN_BACKWARD
    | dict(importance="sensitivity_bfloat16"),
    'int8 moments, `"none"`, `in_backward`': IN_BACKWARD | dict(master="none"),
    'the same with `importance="marginal"`': IN_BACKWARD
    | dict(master="none", importance="marginal"),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_rank_factors_in_the_documents(name):
    (row,) = (line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |"))
    setting = LoSiA(output_dim_factor=1 / 8, checkpointing=True, fused_loss=True, **TABLE[name])
    sizes = [
        f"{estimate(LLAMA_7B, dataclasses.replace(setting, rank_factor=p)).total / 1e9:.2f}"
        for p in (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    ]
    assert row.strip("| ").split(" | ")[1:] == sizes


WITH_LIGER = {
    "frozen": Setting(fused_loss=True),
    "LoRA r 64, bfloat16 adapters": LoRA(fused_loss=True),
    "LoSiA, the default": LoSiA(fused_loss=True, rank_factor=3 / 20, shape="wide", moves="random"),
    "LoSiA, p = 1/8, the paper's": LoSiA(fused_loss=True),
}


@pytest.mark.parametrize("name", WITH_LIGER)
def test_the_table_of_liger_in_the_documents(name):
    (row,) = (line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |"))
    plain = WITH_LIGER[name]
    both = plain, dataclasses.replace(plain, liger=True)
    kept = [f"{each.saved_by_block(LLAMA_7B, False) / 1e6:.0f}" for each in both]
    runs = [
        f"{estimate(LLAMA_7B, dataclasses.replace(each, checkpointing=how)).total / 1e9:.2f}"
        for how in (False, True)
        for each in both
    ]
    assert row.strip("| ").split(" | ")[1:] == kept + runs


def test_with_liger_losia_keeps_less_than_the_frozen_model_without():
    frozen, ours = WITH_LIGER["frozen"], WITH_LIGER["LoSiA, the default"]
    with_liger = dataclasses.replace(ours, liger=True)
    saved = [each.saved_by_block(LLAMA_7B, False) for each in (with_liger, frozen, ours)]
    assert saved == sorted(saved)
