"""docs/finetune.md as a newcomer follows it, with a tiny model in the place of the one it names."""

import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from losia_kernels.cli import main
from losia_kernels.finetune.checks import check_options
from losia_kernels.finetune.declare import read_config
from losia_kernels.finetune.options import FinetuneOptions, with_config
from losia_kernels.finetune.trainer import sft_config

PAGE = (Path(__file__).parents[2] / "docs" / "finetune.md").read_text()
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def block(beginning: str, language: str = "") -> str:
    """The first fenced block after some words of the page."""
    after = PAGE.partition(beginning)[2]
    return re.search(rf"```{language}\n(.*?)```", after, re.DOTALL)[1]


def test_the_page_from_an_empty_folder_to_a_model_that_answers(
    tmp_path, monkeypatch, model_folder, capsys
):
    monkeypatch.chdir(tmp_path)
    exec(block("made by `python make_chats.py`", "python"), {})
    name, *arguments = shlex.split(block("The run: ").replace("\\\n", " "))
    assert name == "losia-kernels"
    assert main([str(model_folder) if each == MODEL else each for each in arguments]) == 0
    said = capsys.readouterr().out
    assert "step 20/20" in said and "eval loss" in said and "->" in said

    request = json.loads(re.search(r"-d \\\n\s*'(.*)'", block("whatever serves models"))[1])
    folder = tmp_path / request["model"]
    assert f"transformers serve {request['model']} " in PAGE
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        request["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt, max_new_tokens=4).shape[1] > prompt["input_ids"].shape[1]
    stops = tokenizer.convert_tokens_to_ids(["<|end|>", "<eos>"])
    assert model.generation_config.eos_token_id == stops


def test_the_pages_config_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    (tmp_path / "run.yaml").write_text(block("## A config file", "yaml"))
    options = FinetuneOptions(**with_config({"config": read_config(str(tmp_path / "run.yaml"))}))
    check_options(options)
    config = sft_config(options)
    assert (options.packing, config.neftune_noise_alpha, config.push_to_hub) == (True, 5, True)


@pytest.mark.parametrize("name", ["model", "samples.jsonl", "run.json", "log.jsonl"])
def test_the_page_names_what_a_run_leaves(name):
    assert f"`{name}" in PAGE
