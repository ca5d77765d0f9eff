"""The folder of a run: processes that are killed in the middle of writing leave what was there
before whole, a run goes on from it, and nothing else."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from losia_kernels.checkpoint.checksums import write_sealed
from losia_kernels.checkpoint.folder import MARKER
from losia_kernels.finetune.checkpoints import last_checkpoint
from losia_kernels.finetune.folder import open_run, save_model
from losia_kernels.finetune.options import InputError
from losia_kernels.finetune.run import finetune
from tests.checkpoint.trained_pairs import assert_same_model
from tests.finetune.doomed_process import DOOMS
from tests.finetune.killed_runs import KILLED, Killed, Runs
from tests.finetune.tiny_run import options
from tests.integrations.tiny_llama import make_model, make_tokenizer


@pytest.fixture(scope="module")
def runs():
    runs = Runs()
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory, model_folder):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert runs.run(folder, model_folder) == 0
    return folder / "run"


def contents(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


@pytest.mark.parametrize("moment", DOOMS)
def test_a_killed_run_keeps_its_last_checkpoint_and_goes_on_from_it(
    runs, whole, tmp_path, model_folder, moment
):
    assert runs.run(tmp_path, model_folder, moment) == KILLED
    run = tmp_path / "run"
    last = "checkpoint-6" if moment == "export" or "removal" in moment else "checkpoint-4"
    # the Trainer would take the torn one
    assert get_last_checkpoint(run / "checkpoints").endswith("checkpoint-6")
    assert not (run / "model").exists()
    ours, theirs = contents(run / "checkpoints" / last), contents(whole / "checkpoints" / last)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (run / "checkpoints" / last / MARKER).exists()
    assert runs.run(tmp_path, model_folder, "", True) == 0
    assert f"resuming from {run / 'checkpoints' / last}\n" in (tmp_path / "printed.txt").read_text()
    assert_same_model(run / "model", whole / "model")
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "checkpoint-4",
        "checkpoint-6",
    }
    assert not [*tmp_path.rglob("*.tmp"), *tmp_path.rglob("*unfinished*")]


def test_a_checkpoint_that_was_half_removed_is_not_whole(whole, tmp_path):
    """Whole are those whose files are all there, at the size at which they were written."""
    for name in ("checkpoint-4", "checkpoint-6"):
        (tmp_path / name).mkdir()
        for file in (whole / "checkpoints" / name).iterdir():
            os.link(file, tmp_path / name / file.name)
    assert last_checkpoint(tmp_path).name == "checkpoint-6"
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    with pytest.warns(
        UserWarning,
        match="checkpoint-6 .*optimizer.pt is missing.* the last that counts is checkpoint-4",
    ):
        assert last_checkpoint(tmp_path).name == "checkpoint-4"
    weights = tmp_path / "checkpoint-4" / "model.safetensors"
    half = weights.read_bytes()[: weights.stat().st_size // 2]
    weights.unlink()
    weights.write_bytes(half)
    with pytest.warns(
        UserWarning, match="checkpoint-4 .*model.safetensors has .* bytes instead of .* none counts"
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
    with pytest.warns(UserWarning, match="checkpoint-10.*, checkpoint-2.* in"):
        assert last_checkpoint(tmp_path) is None
    assert sorted(tmp_path.rglob("*")) == before


def test_resume_with_other_options_or_data_is_a_mistake(tmp_path, model_folder):
    record, _ = open_run(options(tmp_path, model_folder))
    (tmp_path / "run").mkdir()
    write_sealed(tmp_path / "run" / "run.json", record)
    with pytest.raises(
        InputError, match=r"with other options: lr was 0.01, now 0.02, period was 3, now 4"
    ):
        finetune(options(tmp_path, model_folder, resume=True, lr=2e-2, period=4))
    changed = options(tmp_path, model_folder, resume=True)
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(InputError, match="train.jsonl is not the data that it was begun with"):
        finetune(changed)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(
        InputError, match="there is no .*train.jsonl, the data .*; --data FILE says"
    ):
        finetune(changed)
    with pytest.raises(InputError, match="with other options: eval_data was '.*', now None"):
        finetune(options(tmp_path, model_folder, resume=True, eval_data=None))


@pytest.mark.parametrize("best", [True, False])
def test_when_the_best_checkpoint_is_the_result_what_is_saved_counts(tmp_path, best):
    config = {"load_best_model_at_end": best}
    record, _ = open_run(options(tmp_path, tmp_path, config=config, save_steps=5))
    (tmp_path / "run").mkdir()
    write_sealed(tmp_path / "run" / "run.json", record)
    other = options(tmp_path, tmp_path, config=config, save_steps=10, resume=True)
    if not best:
        open_run(other)
        return
    with pytest.raises(InputError, match="with other options: save_steps was 5, now 10"):
        open_run(other)


def test_a_model_is_written_whole_or_not_at_all(tmp_path):
    class Full:
        def save_pretrained(self, folder):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        save_model(make_model(), Full(), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    save_model(make_model(), make_tokenizer(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_runs_killed_at_random_end_in_the_same_bits(runs, tmp_path, model_folder):
    """A handful; ``python -m tests.finetune.killed_runs 200`` has more."""
    killed = Killed(runs, tmp_path, model_folder)
    for number in range(4):
        killed.check(number, seed=1)
