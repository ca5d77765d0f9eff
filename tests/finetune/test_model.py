"""What a model is held to before a run."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from losia_kernels.finetune.options import InputError
from losia_kernels.finetune.run import finetune
from tests.finetune.tiny_run import options
from tests.integrations.tiny_llama import make_tokenizer


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
