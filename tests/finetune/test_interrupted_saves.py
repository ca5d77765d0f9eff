"""Processes that are killed in the middle of writing leave what was there before whole, and a run
goes on from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from losia_kernels.checkpoint import delta
from losia_kernels.finetune.folder import MARKER, last_checkpoint, remove_interrupted
from tests.checkpoint.trained_pairs import assert_same_model, make_pair
from tests.finetune.doomed_process import DOOMS

HERE = Path(__file__).parent
KILLED = -9


class Jobs:
    """The jobs of ``doomed_process.py``: each in a process of its own, whose exit status ``run``
    returns."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "doomed_process.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
        )

    def run(self, job: str, *arguments) -> int:
        arguments = [str(each) if isinstance(each, Path) else each for each in arguments]
        self._process.stdin.write(json.dumps([job, *arguments]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()  # at rest, it has nothing to lose
        self._process.communicate()


@pytest.fixture(scope="module")
def jobs():
    jobs = Jobs()
    yield jobs
    jobs.close()


@pytest.fixture(scope="module")
def whole(jobs, tmp_path_factory, model_folder):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert jobs.run("run", folder, model_folder) == 0
    return folder / "run"


def contents(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


@pytest.mark.parametrize("moment", DOOMS)
def test_a_killed_run_keeps_its_last_checkpoint_and_goes_on_from_it(
    jobs, whole, tmp_path, model_folder, moment
):
    assert jobs.run("run", tmp_path, model_folder, moment) == KILLED
    run = tmp_path / "run"
    last = "checkpoint-6" if moment == "export" else "checkpoint-4"
    assert get_last_checkpoint(run / "checkpoints").endswith(
        "checkpoint-6"
    )  # the Trainer would take the torn one
    assert not (run / "model").exists()
    ours, theirs = contents(run / "checkpoints" / last), contents(whole / "checkpoints" / last)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (run / "checkpoints" / last / MARKER).exists()
    assert jobs.run("run", tmp_path, model_folder, "", True) == 0
    assert f"resuming from {run / 'checkpoints' / last}\n" in (tmp_path / "said.txt").read_text()
    assert_same_model(run / "model", whole / "model")
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "checkpoint-4",
        "checkpoint-6",
    }
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_checkpoint_that_was_half_removed_is_not_whole(whole, tmp_path):
    """Whole are those whose files are all there, at the size at which they were written."""
    for name in ("checkpoint-4", "checkpoint-6"):
        (tmp_path / name).mkdir()
        for file in (whole / "checkpoints" / name).iterdir():
            os.link(file, tmp_path / name / file.name)
    assert last_checkpoint(tmp_path).name == "checkpoint-6"
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    with pytest.warns(
        UserWarning, match="checkpoint-6 in .*: not whole, .* the last that counts is checkpoint-4"
    ):
        assert last_checkpoint(tmp_path).name == "checkpoint-4"
    weights = tmp_path / "checkpoint-4" / "model.safetensors"
    half = weights.read_bytes()[: weights.stat().st_size // 2]
    weights.unlink()
    weights.write_bytes(half)
    with pytest.warns(
        UserWarning, match="checkpoint-6, checkpoint-4 in .*: not whole, .* none counts"
    ):
        assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("marker", [None, "", '{"files"'])
def test_what_nobody_completed_is_left_alone(tmp_path, marker):
    """Checkpoints of a Trainer without the callback, copies under a name of the user's, notes."""
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-best", "checkpoint-6-good"):
        (tmp_path / name).mkdir()
        if marker is not None:
            (tmp_path / name / MARKER).write_text(marker)
    (tmp_path / "checkpoint-notes.txt").write_text("the second was better")
    before = sorted(tmp_path.rglob("*"))
    with pytest.warns(UserWarning, match="checkpoint-10, checkpoint-2 in"):
        assert last_checkpoint(tmp_path) is None
    assert sorted(tmp_path.rglob("*")) == before
    remove_interrupted(tmp_path)  # of a run of finetune, which completes all of its own
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-best", "checkpoint-6-good", "checkpoint-notes.txt"}


def test_a_delta_is_made_and_applied_whole_or_not_at_all(jobs, tmp_path):
    pair = make_pair(tmp_path, steps=2, output_dim_factor=0.0)
    made, applied = tmp_path / "delta", tmp_path / "applied"
    assert jobs.run("convert", "make", 60, pair.base, pair.trained, made) == KILLED
    assert (tmp_path / "delta.tmp" / "base" / "values.safetensors").exists() and not made.exists()
    delta.make_delta(pair.base, pair.trained, made)
    assert jobs.run("convert", "apply", 10, pair.base, made, applied) == KILLED
    assert (tmp_path / "applied.tmp" / "model.safetensors").exists() and not applied.exists()
    delta.apply_delta(pair.base, made, applied)
    assert_same_model(applied, pair.trained)
    assert not list(tmp_path.glob("*.tmp"))
