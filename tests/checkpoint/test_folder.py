"""Folders of models: which are read, and how a new one comes to be, whole or not at all."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from losia_kernels import cli
from losia_kernels.checkpoint import delta
from losia_kernels.checkpoint.writing import beside_of
from tests.checkpoint.trained_pairs import assert_same_model, change, make_pair
from tests.integrations.tiny_llama import make_model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


def test_folders_that_are_no_models(pair, tmp_path, capsys):
    index = "model.safetensors.index.json"
    torn = {
        ("torn", "model.safetensors"): "\x10",
        ("unread", index): "{",
        ("sharded", index): '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
    }
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for (name, file), content in torn.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content)
    problems = {
        "absent": "is no folder",
        "file": "is no folder",
        "empty": "is no model folder",
        "torn": "cannot be read as safetensors",
        "unread": "index.json cannot be read as JSON",
        "sharded": "model-00001-of-00002.safetensors cannot be read",
    }
    for name, problem in problems.items():
        for folders in ((tmp_path / name, pair.trained), (pair.base, tmp_path / name)):
            assert cli.main(["delta", "make", *map(str, folders), str(tmp_path / "out")]) == 2
            printed = capsys.readouterr().err
            assert printed.count("\n") == 1 and problem in printed, printed
    assert not (tmp_path / "out").exists()


def test_models_that_are_not_of_one_training(pair, tmp_path, capsys):
    make_model(tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    make_model(hidden_size=64).save_pretrained(tmp_path / "wide")
    shutil.copytree(pair.trained, tmp_path / "checkpoint")
    change(tmp_path / "checkpoint", model__layers__0__mlp__up_proj__subnet=torch.ones(12, 8))
    for name, problem in (
        ("untied", f"{pair.base} lacks lm_head.weight"),
        ("wide", "not base and result of one"),
        ("checkpoint", "it is a checkpoint: write its plain model first"),
    ):
        assert (
            cli.main(["delta", "make", str(pair.base), str(tmp_path / name), str(tmp_path / "out")])
            == 2
        )
        assert problem in capsys.readouterr().err


def test_an_output_that_exists_is_left_alone(pair, made, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("")
    base, trained, delta_folder, mine = map(str, (pair.base, pair.trained, made, tmp_path / "mine"))
    for command in (
        ["make", base, trained],
        ["apply", base, delta_folder],
        ["subtract", trained, delta_folder],
    ):
        assert cli.main(["delta", *command, mine]) == 2
        assert capsys.readouterr().err == f"losia-kernels: {mine} exists: name a new folder\n"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["precious"]


def test_what_is_beside_and_not_ours_is_left(tmp_path):
    """``mv model model.tmp``, then writing to ``model``."""
    pair = make_pair(tmp_path, steps=2, output_dim_factor=0.0)
    delta.make_delta(pair.base, pair.trained, tmp_path / "delta")
    base = pair.base.rename(tmp_path / "model.tmp")
    before = sorted(path.name for path in base.iterdir())
    delta.apply_delta(base, tmp_path / "delta", tmp_path / "model")
    assert sorted(path.name for path in base.iterdir()) == before
    assert_same_model(tmp_path / "model", pair.trained)
    shutil.rmtree(tmp_path / "model")
    base = base.rename(tmp_path / "base")
    (base / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json is neither in"):
        delta.apply_delta(base, tmp_path / "delta", tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "trained"]


def convert_and_die(*arguments) -> int:
    """The exit status of ``doomed_conversion.py``."""
    command = [sys.executable, "-m", "tests.checkpoint.doomed_conversion", *map(str, arguments)]
    return subprocess.run(command, cwd=Path(__file__).parents[2]).returncode


def test_a_delta_is_made_and_applied_whole_or_not_at_all(tmp_path):
    pair = make_pair(tmp_path, steps=2, output_dim_factor=0.0)
    made, applied = tmp_path / "delta", tmp_path / "applied"
    assert convert_and_die("make", 60, pair.base, pair.trained, made) == -9
    assert (beside_of(made) / "base" / "values.safetensors").exists() and not made.exists()
    delta.make_delta(pair.base, pair.trained, made)
    assert convert_and_die("apply", 10, pair.base, made, applied) == -9
    assert (beside_of(applied) / "model.safetensors").exists() and not applied.exists()
    delta.apply_delta(pair.base, made, applied)
    assert_same_model(applied, pair.trained)
    assert not beside_of(made).exists() and not beside_of(applied).exists()
