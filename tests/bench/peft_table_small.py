"""PEFT's MetaMathQA harness, its real code, on a tiny model and made-up problems: what
``python -m bench.peft_table`` does, in seconds on a CPU.

    python tests/bench/peft_table_small.py PEFT FOLDER ENTRY

PEFT: a checkout of huggingface/peft. The harness runs on a copy of its files in FOLDER. Only what
it takes from outside is made up: model, data sets, the accelerator and its memory, PEFT's branch.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import peft.utils
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.peft_table.__main__ import HARNESS, run

STEPS, EVERY = 24, 12
WIKI = ["the cat sat on the mat and the dog sat on the cat. " * 2] * 4
LETTERS = [chr(code) for code in range(32, 127)] + ["\n"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: place for place, token in enumerate(["<eos>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A tiny LLaMA that has read WIKI until it costs the 1 to 2 nats a token that the harness wants
    of a model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=len(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor(tokenizer(WIKI)["input_ids"])
    for _ in range(200):
        loss = model(input_ids=ids, labels=ids).loss
        if loss < 1.6:
            return model
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"the tiny model still costs {loss:.2f} nats a token")


def load_dataset(name: str, *_: object, **__: object):
    sums = [(first, second) for first in range(2, 10) for second in range(2, 10)]
    questions = [f"What is {first} plus {second}?" for first, second in sums]
    if name == "HuggingFaceFW/finewiki":
        return datasets.Dataset.from_dict({"text": WIKI})
    if name == "openai/gsm8k":
        answers = [f"It is so.\n#### {first + second}" for first, second in sums]
        rows = datasets.Dataset.from_dict({"question": questions, "answer": answers})
        return datasets.DatasetDict(train=rows.select(range(8)), test=rows.select(range(8, 16)))
    assert name == "meta-math/MetaMathQA"
    columns = {"query": questions, "original_question": questions, "type": ["made up"] * len(sums)}
    columns["response"] = [f"It is so. The answer is: {first + second}" for first, second in sums]
    return datasets.DatasetDict(train=datasets.Dataset.from_dict(columns))


def pretend(harness: Path) -> None:
    """The CPU for one of the accelerators that the harness wants."""
    peft.utils.infer_device = lambda: "cuda"
    sys.path.insert(0, str(harness))
    import utils

    utils.device, utils.infer_device = "cpu", lambda: "cpu"
    peft.utils.infer_device = utils.infer_device
    utils.get_peft_branch = lambda: "losia"  # of the installed PEFT, which need not be a checkout
    if sys.version_info < (
        3,
        12,
    ):  # what newer ones can: the harness keeps or deletes what it saved
        utils.tempfile = SimpleNamespace(TemporaryDirectory=temporary_directory)
    for name in ("max_memory_reserved", "memory_allocated", "memory_reserved"):
        setattr(torch.cpu, name, lambda *_: 0)
    for name in ("reset_peak_memory_stats", "manual_seed_all", "empty_cache"):
        setattr(torch.cpu, name, lambda *_: None)
    torch.cpu.get_device_name = lambda *_: "a CPU that is taken for a GPU"
    datasets.load_dataset = load_dataset


def temporary_directory(ignore_cleanup_errors: bool, delete: bool):
    assert delete
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=ignore_cleanup_errors)


def copy_harness(checkout: Path, folder: Path) -> Path:
    """The harness with the sizes of a small run."""
    harness = folder / HARNESS
    harness.mkdir(parents=True)
    for name in ("run.py", "utils.py", "data.py", "default_training_params.json"):
        shutil.copy(checkout / HARNESS / name, harness)
    for name in ("results", "temporary_results", "cancelled_results"):
        (harness / name).mkdir()
    tokenizer = make_tokenizer()
    for made in (tokenizer, make_model(tokenizer)):
        made.save_pretrained(folder / "model")
    path = harness / "default_training_params.json"
    settings = json.loads(path.read_text())
    settings |= {"model_id": str(folder / "model"), "max_steps": STEPS, "eval_steps": EVERY}
    settings["generation_kwargs"] = {"max_length": 120, "max_new_tokens": 4}
    path.write_text(json.dumps(settings))
    return harness


def main() -> None:
    checkout, folder, entry = *(Path(word).resolve() for word in sys.argv[1:3]), sys.argv[3]
    pretend(copy_harness(checkout, folder))
    run(folder, entry)


if __name__ == "__main__":
    main()
