"""A run of ``finetune`` that is over in seconds and uses every moving part."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from losia_kernels.finetune.data import load_data
from losia_kernels.finetune.options import FinetuneOptions
from losia_kernels.finetune.trainer import sft_config
from tests.integrations.tiny_llama import make_tokenizer
from tests.tiny import PAPER

STEPS = 14  # one epoch is 5


def write_data(path: Path, count: int, first: int = 0) -> Path:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [letters[i % 26] * (i % 5 + 1) for i in range(first, first + count)]
    path.write_text(
        "".join(json.dumps({"prompt": f"{w}:", "completion": w.upper()}) + "\n" for w in words)
    )
    return path


def options(folder: Path, model: Path, **changes) -> FinetuneOptions:
    """A run that uses every moving part: the paper's method, accumulation, length groups, output
    layer, warm-up, evaluation."""
    values = dict(
        model=str(model),
        data=str(write_data(folder / "train.jsonl", 38)),
        output=str(folder / "run"),
        eval_data=str(write_data(folder / "eval.jsonl", 6, first=40)),
        **PAPER,
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
    given = FinetuneOptions(model="", data=str(data), output="", max_length=64)
    samples = load_data(given, sft_config(given), make_tokenizer()).train
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    return float(model(**DataCollatorForLanguageModeling(256)(list(samples))).loss)
