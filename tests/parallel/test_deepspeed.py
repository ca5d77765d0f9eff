"""DeepSpeed's ZeRO is refused wherever it is met: by what it marks parameters with, and where it is
installed by itself."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from losia_kernels import LoSiAAdamW, LoSiALinear, apply_losia
from tests.integrations.paper_adapter import paper_adapter
from tests.tiny import TinyLM, paper

REFUSED = "LoSiA does not train under DeepSpeed.*FSDP2.*or DDP"
CONFIG = paper(rank_factor=0.25)


def partition(linear: nn.Linear) -> nn.Linear:
    """As ZeRO-3 leaves it on every process: without values."""
    linear.weight.data = torch.empty(0)
    linear.weight.ds_id = 0
    return linear


def test_a_partitioned_model_is_refused_before_anything_changes():
    model = TinyLM()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            partition(module)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"up_proj: {REFUSED}"):
        apply_losia(model, CONFIG)
    assert [type(module) for module in model.modules()] == before
    with pytest.raises(ValueError, match=REFUSED):
        LoSiALinear.from_linear(partition(nn.Linear(8, 8)), rank_factor=0.25)


def test_a_partitioned_base_is_refused_through_peft():
    peft = pytest.importorskip("peft")

    model = nn.Sequential(partition(nn.Linear(8, 8)), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=f"0: {REFUSED}"):
        peft.get_peft_model(model, paper_adapter(rank_factor=0.25, target_modules=["0"]))


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_an_optimizer_made_of_an_engine_is_refused(mark):
    """In one process, too."""
    model = apply_losia(TinyLM(), CONFIG)
    setattr(next(p for p in model.parameters() if p.requires_grad), mark, 0)
    with pytest.raises(ValueError, match=REFUSED):
        LoSiAAdamW(model)


def test_an_optimizer_given_to_an_engine_is_refused_in_the_first_step():
    """ZeRO-1 and 2 put flat parameters of their own into it."""
    model = apply_losia(TinyLM(), CONFIG)
    optimizer = LoSiAAdamW(model)
    for group in optimizer.param_groups:
        for subnet in group["params"]:
            subnet._hp_mapping = 0
        group["params"] = [nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))]
    with pytest.raises(RuntimeError, match=f"up_proj: {REFUSED}"):
        optimizer.step()


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_the_real_one_is_refused_in_the_same_words():
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-m", "tests.parallel.deepspeed_engines"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [json.loads(line) for line in run.stderr.splitlines() if line.startswith('["')]
    said = {(name, stage): words for name, stage, words in lines}
    assert said.pop(("initialized", 0)) == "trained 3 steps"
    assert len(lines) == 10, run.stderr[-2000:]
    for case, words in said.items():
        assert "LoSiA does not train under DeepSpeed" in words, (case, words)
