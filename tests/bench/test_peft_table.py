"""LoSiA's entries for PEFT's MetaMathQA table, and a small run of its harness where that is there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from bench.harness.provenance import ROOT
from bench.peft_table import __main__ as table
from losia_kernels import LoSiAAdamW
from losia_kernels.integrations.peft import LoSiAPeftConfig

CHECKOUT = os.environ.get("PEFT_CHECKOUT", "")


def tiny_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


@pytest.fixture
def harness_utils(monkeypatch):
    """What the command needs of the harness's utils: the lookup in torch.optim, as it is there."""
    monkeypatch.delattr(torch.optim, "LoSiAAdamW", raising=False)

    def make(model, *, optimizer_type, max_steps, lr_scheduler_arg, **kwargs):
        return getattr(torch.optim, optimizer_type)(model.parameters(), **kwargs), lr_scheduler_arg

    utils = SimpleNamespace(get_optimizer_and_scheduler=make)
    table.add_optimizer(utils)
    yield utils
    monkeypatch.delattr(torch.optim, "LoSiAAdamW", raising=False)


@pytest.mark.parametrize("entry", table.ENTRIES)
def test_an_entry_is_what_the_harness_reads(entry, harness_utils):
    folder = table.EXPERIMENTS / "losia" / entry
    config = PeftConfig.from_pretrained(folder)
    assert type(config) is LoSiAPeftConfig
    assert config.init_subnet == "random", "the harness gives no batches to calibrate with"
    assert config.warmup_steps == 500, "a tenth of its 5000 steps"
    settings = json.loads((folder / "training_params.json").read_text())
    assert settings.keys() == {"optimizer_type", "optimizer_kwargs"}
    assert hasattr(torch.optim, settings["optimizer_type"]), "it checks that"
    model = get_peft_model(tiny_model(), config)
    optimizer, scheduler = harness_utils.get_optimizer_and_scheduler(
        model,
        optimizer_type=settings["optimizer_type"],
        max_steps=5000,
        lr_scheduler_arg="cosine",
        **settings["optimizer_kwargs"],
    )
    assert type(optimizer) is LoSiAAdamW and scheduler == "cosine"
    assert {group["lr"] for group in optimizer.param_groups} == {settings["optimizer_kwargs"]["lr"]}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    assert optimizer.timeline.clock.settled, "it knows the number of steps"


def test_other_optimizers_are_made_as_before(harness_utils):
    optimizer, _ = harness_utils.get_optimizer_and_scheduler(
        tiny_model(), optimizer_type="AdamW", max_steps=8, lr_scheduler_arg=None, lr=1e-4
    )
    assert type(optimizer) is torch.optim.AdamW


def test_the_page_says_how_many_values_each_entry_trains():
    page = (Path(table.__file__).parent / "README.md").read_text()
    linears = 28 * (2 * 3072**2 + 2 * 3072 * 1024 + 3 * 3072 * 8192)
    for entry in table.ENTRIES:
        row = next(line for line in page.splitlines() if f"`{entry}`" in line)
        found = table.trained_values(entry)
        assert f"{found / 1e6:.1f} M" in row
        part = 256 if "p16" in entry else 64
        head = 128256 // 8 * 3072 if "paper" in entry else 0
        assert found - head == linears // part


def test_a_folder_that_is_no_checkout_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        table.main([str(tmp_path)])
    said = capsys.readouterr().err
    assert "expected a checkout of huggingface/peft" in said and "run.py" in said


@pytest.mark.skipif(not CHECKOUT, reason="PEFT_CHECKOUT names no checkout of huggingface/peft")
def test_the_harness_runs_the_entries(tmp_path):
    results = {}
    for entry in table.ENTRIES:
        folder = tmp_path / entry
        script = ROOT / "tests" / "bench" / "peft_table_small.py"
        command = [sys.executable, str(script), CHECKOUT, str(folder), entry]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run(command, env=environment, check=True, timeout=300)
        (path,) = (folder / table.HARNESS / "temporary_results").glob("*.json")
        results[entry] = json.loads(path.read_text())
    for entry, result in results.items():
        assert result["run_info"]["experiment_name"] == f"losia/{entry}"
        assert result["run_info"]["peft_config"]["peft_type"] == "LOSIA"
        assert result["run_info"]["train_config"]["optimizer_type"] == "LoSiAAdamW"
        found = result["train_info"]
        assert found["status"] == "success" and result["run_info"]["error_msg"] == ""
        losses = [row["train loss"] for row in found["metrics"]]
        assert losses[-1] < losses[0]
        assert {"test accuracy", "forgetting"} <= found["metrics"][-1].keys()
    wide, still, p16, paper = (
        results[f"llama-3.2-3B-{name}"]["train_info"]
        for name in ("wide", "wide-still", "wide-p16", "paper")
    )
    assert wide["num_trainable_params"] == still["num_trainable_params"]
    assert 4 * p16["num_trainable_params"] == wide["num_trainable_params"]
    assert wide["num_trainable_params"] < paper["num_trainable_params"]
    assert still["file_size"] < wide["file_size"] < 99999999, "each place of a subnet is a block"
