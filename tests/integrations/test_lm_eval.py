"""An exported folder in lm-evaluation-harness, on the tasks in examples/, without a hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from losia_kernels.finetune.run import finetune
from tests.finetune.tiny_run import options
from tests.integrations.tiny_llama import make_model

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness, 350 MB with what it needs, is not installed"
)
ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_an_exported_folder_evaluates(tmp_path, model_folder):
    make_model()
    model = finetune(options(tmp_path, model_folder, steps=4, save_steps=0, eval_data=None))
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "lm_eval",
            "--model",
            "hf",
            "--model_args",
            f"pretrained={model}",
            "--device",
            "cpu",
            "--include_path",
            "examples/lm_eval",
            "--tasks",
            "past_tense,past_tense_choice",
            "--batch_size",
            "16",
            "--output_path",
            str(tmp_path / "results"),
            "--log_samples",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    assert result.returncode == 0, result.stderr
    (file,) = (tmp_path / "results").rglob("results*.json")
    found = json.loads(file.read_text())
    assert (
        found["n-samples"]["past_tense"]["effective"]
        == found["n-samples"]["past_tense_choice"]["effective"]
        == 120
    )
    scores = (
        found["results"]["past_tense"]["exact_match,stripped"],
        found["results"]["past_tense_choice"]["acc,none"],
    )
    assert 0 <= scores[0] < 0.2 and 0 < scores[1] < 1  # of a model with random weights
    (samples,) = (tmp_path / "results").rglob("samples_past_tense_2*.jsonl")
    first = json.loads(samples.read_text().splitlines()[0])
    assert (
        first["arguments"]["gen_args_0"]["arg_0"] == f"Verb: {first['doc']['lemma']}\nPast tense:"
    )
