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

from losia_kernels import ops

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ("trainer", "sft", "pytorch")


def run_example(name, model_folder, output):
    if name == "sft":
        pytest.importorskip("trl")
    script = ROOT / "examples" / f"{name}.py"
    return run([sys.executable, script, model_folder, output, "6"], output)


def run(command, folder):
    result = subprocess.run(
        command,
        cwd=folder,
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


BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page, names", [("tutorial", EXAMPLES), ("layer", ("layer",))])
def test_a_page_is_taken_from_the_examples(page, names):
    """Each of its Python blocks stands in one of them, line by line."""
    examples = [(ROOT / "examples" / f"{name}.py").read_text() for name in names]
    blocks = BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text())
    assert len(blocks) >= 5
    for block in blocks:
        assert any(f"\n{block}" in example for example in examples), block


@pytest.mark.parametrize("page", ["README.md", "docs/loop.md"])
def test_the_first_lines_run(page, model_folder, tmp_path, monkeypatch):
    lines = BLOCK.findall((ROOT / page).read_text())[0]
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.arange(24).view(2, 12)
    names = {"model": model, "batches": 8 * [{"input_ids": ids, "labels": ids}]}
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    monkeypatch.chdir(tmp_path)
    exec(lines, names)
    after = AutoModelForCausalLM.from_pretrained("tuned").state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in after)


def test_the_layer_and_the_ops_need_torch_alone(tmp_path):
    script = """
import runpy, sys
for name in ("triton", "transformers", "accelerate", "peft"):
    sys.modules[name] = None  # as if not installed
runpy.run_path(sys.argv[1], run_name="__main__")
"""
    said = run([sys.executable, "-c", script, ROOT / "examples" / "layer.py"], tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", said)]
    assert len(losses) == 4 and max(losses[1:]) < losses[0] / 2
    assert not list(tmp_path.iterdir())


def test_every_op_is_called_once():
    code = (ROOT / "examples" / "layer.py").read_text()
    assert sorted(re.findall(r"\bops\.(\w+)\(", code)) == ops.__all__
