"""The model card of an adapter says what loads it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.paper_adapter import paper_adapter

pytest.importorskip("peft")
from huggingface_hub import ModelCard  # noqa: E402
from peft import get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

ROOT = Path(__file__).parents[2]


def make_adapter(model_folder, name="default"):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    config = paper_adapter(rank_factor=1 / 4, task_type="CAUSAL_LM", init_weights=False)
    return get_peft_model(model, config, adapter_name=name)


def test_the_code_of_a_card_loads_the_adapter(model_folder, tmp_path):
    make_adapter(model_folder).save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.tags and "losia" in card.data.tags and card.data.library_name == "peft"
    (code,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
        if "losia_kernels" in block
    ]
    result = subprocess.run(
        [sys.executable, "-c", code + "print(model.peft_config['default'].peft_type.value)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert result.stdout == "LOSIA\n", result.stderr


def test_a_card_is_completed_once_and_another_is_left_alone(model_folder, tmp_path):
    model = make_adapter(model_folder, "mine")
    for _ in range(2):
        model.save_pretrained(tmp_path / "out")  # out/mine/, and the card in out/
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.count("import losia_kernels.integrations.peft") == 1 and "'mine'" in text
    (tmp_path / "README.md").write_text("my notes")
    model.peft_config["mine"].save_pretrained(tmp_path / "bare")
    assert (tmp_path / "README.md").read_text() == "my notes"
    assert not (tmp_path / "bare" / "README.md").exists()
