"""A tokenizer of one token a character, a tiny LLaMA, tasks of a few items and made-up results, for the tests of the
quality study."""

import math
from dataclasses import asdict

import torch

from bench.methods import STUDY
from bench.quality.items import Item, Splits
from bench.quality.study import SCALES, Run
from bench.quality.tasks import Task
from bench.quality.training import Base

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789:+-=*"


class CharTokenizer:
    def __call__(self, text: str, add_special_tokens: bool, return_offsets_mapping: bool) -> dict:
        return {
            "input_ids": [ALPHABET.index(letter) for letter in text],
            "offset_mapping": [(place, place + 1) for place in range(len(text))],
        }


def tiny_base(seed: int = 0) -> Base:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
        use_cache=False,
    )
    return Base(LlamaForCausalLM(config), CharTokenizer())


def tiny_splits() -> Splits:
    """Say the letter twice."""
    letters = ALPHABET[2:28]
    items = [Item(letter, f"say {letter}:", f" {letter}{letter}\n") for letter in letters]
    return Splits(items[8:], items[:4], items[4:8])


def tiny_tasks() -> dict[str, Task]:
    """Under the names of real tasks, which the study's list knows."""
    names = "past-tense", "pronunciation", "arithmetic", "code", "plural"
    return {name: Task(name, name, "made here", tiny_splits, 32, 3) for name in names}


SMALL = SCALES["small"]
ORIGIN = {"quiet": True, "commit": "abc", "device": "test"}


def fake_result(run: Run, nll: float | None = None, status: str = "ok", step: float = 1.0) -> dict:
    """Of a search's trials the method's second rate costs least."""
    split = "search" if run.kind == "search" else "held_out"
    if nll is None:
        nll = 1.0 + (split == "search") * abs(math.log10(run.lr / STUDY[run.method].lrs[1]))
    seconds = {"step": step, "prepare": 5.0, "train": 12 * step + 3}
    one = {"right": 50.0, "tokens": 60.0, "nll": nll, "items": 1}
    scores = {name: {"": one} for name in (split, "english")}
    found = {"run": asdict(run), "status": status, "items": split, "seconds": seconds}
    return found | {"scores": scores}
