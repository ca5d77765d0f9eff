"""Each example runs as a user would run it, on a tiny model, and leaves a plain one that has
learned."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ("trainer", "sft", "pytorch")


def run_example(name, model_folder, output):
    if name == "sft":
        pytest.importorskip("trl")
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", model_folder, output, "6"],
        cwd=output,
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        },
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path, model_folder):
    said = run_example(name, model_folder, tmp_path)
    assert "loss" in said
    before, after = (
        load_file(folder / "model.safetensors") for folder in (model_folder, tmp_path / "model")
    )
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if "_proj" in key}
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    assert (tmp_path / "model" / "tokenizer.json").exists()


def test_the_tutorial_is_taken_from_the_examples():
    """Every line of its Python blocks stands in one of the examples, but for comments."""
    lines = {
        line.strip()
        for name in EXAMPLES
        for line in (ROOT / "examples" / f"{name}.py").read_text().splitlines()
    }
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL
    )
    assert len(blocks) >= 3
    for line in "".join(blocks).splitlines():
        line = line.strip()
        assert not line or line.startswith(("#", "+", "-")) or line in lines, line
