"""The pictures made from what a run records of its subnets."""

import errno
import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from losia_kernels import cli
from losia_kernels.checkpoint.checksums import read_sealed, write_sealed
from losia_kernels.finetune import draw
from losia_kernels.finetune.folder import read_record
from losia_kernels.finetune.options import PICTURES
from losia_kernels.finetune.run import finetune
from losia_kernels.integrations.history import SubnetHistory
from losia_kernels.integrations.transformers import LoSiACallback
from tests.finetune.tiny_run import options
from tests.integrations.test_trainer_features import make_trainer
from tests.tiny import paper

CONFIG = paper(rank_factor=1 / 4, output_dim_factor=1 / 8, period=2, warmup_steps=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("plotted")
    finetune(options(folder, model_folder))
    return folder / "run"


@pytest.mark.slow
def test_plot_draws_every_picture(run, capsys):
    assert cli.main(["plot", str(run), "--vectors", "8"]) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == [str(run / "plots" / f"{name}.png") for name in PICTURES]
    assert "gradients" in printed.err and "singular vectors: 100%" in printed.err  # progress
    for name in PICTURES:
        image = np.asarray(Image.open(run / "plots" / f"{name}.png").convert("L"))
        assert min(image.shape) > 200 and len(np.unique(image)) > 50, name


def test_plot_says_what_is_missing(run, tmp_path, capsys):
    def mistake(*arguments):
        assert cli.main(["plot", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "holds no run" in mistake(tmp_path)
    shutil.copy(run / "log.jsonl", tmp_path)
    assert (
        "no " in (printed := mistake(tmp_path, "--only", "subnets")) and "subnets.jsonl" in printed
    )
    assert "no run.json" in mistake(tmp_path, "--only", "gradients")
    shutil.copy(run / "run.json", tmp_path)
    assert "not finished" in mistake(tmp_path, "--only", "singular_vectors")
    assert "no model folder ./gone" in mistake(tmp_path, "--only", "gradients", "--base", "./gone")
    assert cli.main(["plot", str(tmp_path), "--only", "loss"]) == 0


@pytest.mark.parametrize("log", ["", '{"step": 1, "loss": "low"}\n'])
def test_of_no_loss_no_picture_is_shown(tmp_path, capsys, log):
    """Neither is the one that was drawn before."""
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    assert cli.main(["plot", str(tmp_path)]) == 0
    assert "loss.png" in capsys.readouterr().out
    (tmp_path / "log.jsonl").write_text(log)
    assert cli.main(["plot", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "log.jsonl has no loss yet" in printed.err and not printed.out


def test_a_trainers_history_is_enough_for_what_it_shows(tmp_path, capsys):
    trainer = make_trainer(tmp_path, config=CONFIG, max_steps=3)
    trainer.pop_callback(LoSiACallback)
    del trainer.training_step  # which that callback has replaced
    trainer.add_callback(LoSiACallback(trainer, history=f"{tmp_path}/run/subnets.jsonl"))
    trainer.train()
    capsys.readouterr()
    assert cli.main(["plot", str(tmp_path / "run")]) == 0
    drawn = capsys.readouterr().out.split()
    assert drawn == [
        str(tmp_path / "run" / "plots" / f"{name}.png")
        for name in ("timeline", "subnets", "frequency")
    ]


def test_marginal_importance_captures_nothing_that_is_known(tmp_path):
    config = paper(rank_factor=1 / 4, period=2, importance="marginal")
    trainer = make_trainer(tmp_path, config=config, max_steps=3)
    trainer.callback_handler.callbacks[-1].history = tmp_path / "subnets.jsonl"
    trainer.train()
    history = SubnetHistory.read(tmp_path / "subnets.jsonl")
    moved = [place for place in history.places if place.step]
    assert moved and all(place.captured is None and place.overlap is not None for place in moved)
    claimed = replace(history, places=[replace(place, captured=0.5) for place in history.places])
    widths = []
    for known in (history, claimed):
        draw.draw_timeline(known, 3).savefig(tmp_path / "timeline.png")
        widths.append(Image.open(tmp_path / "timeline.png").width)
    assert widths[0] < 0.7 * widths[1], "a panel for what nobody knows"


def test_a_resumed_run_records_each_place_once(run, model_folder):
    lines = (run / "subnets.jsonl").read_text()
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "checkpoint-14")  # it goes on from 12
    finetune(options(run.parent, model_folder, resume=True))
    assert (run / "subnets.jsonl").read_text() == lines


def test_the_share_of_the_run_in_which_a_neuron_is_trained(run):
    history = SubnetHistory.read(run / "subnets.jsonl")
    for places in history.of_layers().values():
        for side in (0, 1):
            trained = draw.time_trained(places, side, 14)
            assert (
                trained.sum() == pytest.approx(len(draw.idx_of(places[0], side)))
                and trained.max() <= 1 + 1e-9
            )


def test_a_base_that_has_moved_is_named_with_what_to_say(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    record = read_sealed(folder / "run.json", {})
    assert Path(record["model"]).is_absolute()  # wherever plot is called from
    record["model"] = "/no/longer/here"
    write_sealed(folder / "run.json", record)
    for picture in ("gradients", "singular_vectors"):
        assert cli.main(["plot", str(folder), "--only", picture]) == 2
        said = capsys.readouterr().err
        assert (
            "/no/longer/here, the model before training, is no longer there: --base MODEL" in said
        )


@pytest.mark.parametrize(
    "line, problem",
    [
        ("", "holds no subnet"),
        ('{"step": 0}', "is damaged"),
        (
            '{"step": 0, "layer": "x", "group": "lm_head", "features": [10000000000, 8], "out_idx": "AA==", '
            '"in_idx": "AA==", "overlap": null, "captured": null}',
            "8 bits are not those of 10000000000 neurons",
        ),
    ],
    ids=["none", "cut", "lying"],
)
def test_a_damaged_history_is_named(run, tmp_path, capsys, line, problem):
    head = (run / "subnets.jsonl").read_text().splitlines()[0]
    (tmp_path / "subnets.jsonl").write_text(f"{head}\n{line}\n" if line else f"{head}\n")
    assert cli.main(["plot", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'subnets.jsonl'} " in said and problem in said and said.count("\n") == 1


def test_a_count_of_vectors_that_cannot_be(run, capsys):
    assert cli.main(["plot", str(run), "--vectors", "0"]) == 2
    assert "--vectors must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--base", "m"), "--base cannot act: it is for gradients and singular_vectors"),
        (("--vectors", "7"), "--vectors cannot act: it is for singular_vectors"),
    ],
)
def test_what_the_pictures_leave_nothing_to_do_is_said(run, capsys, given, said):
    assert cli.main(["plot", str(run), *given, "--only", "loss"]) == 0
    assert said in capsys.readouterr().err


def test_pictures_that_cannot_be_written_are_one_line(run, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("plots", "checkpoints"))
    (folder / "plots").write_text("")
    assert cli.main(["plot", str(folder), "--only", "loss"]) == 2
    assert (
        capsys.readouterr().err == f"losia-kernels: cannot write {folder / 'plots'}: File exists\n"
    )

    def full(*where, **how):
        raise OSError(errno.ENOSPC, "No space left on device")

    (folder / "plots").unlink()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert cli.main(["plot", str(folder), "--only", "loss"]) == 2
    assert capsys.readouterr().err.endswith("plots: No space left on device\n")


LIES = {
    "features": {"features": [10**10, 10**10]},
    "negative features": {"features": [-8, 32]},
    "one feature": {"features": [32]},
    "no bits": {"out_idx": ""},
    "group": {"group": "x"},
    "types": {"step": "1"},
    "late": {"step": 3, "layer": "new"},
}


@pytest.mark.parametrize("lie", LIES)
def test_records_that_lie_about_their_size_are_refused(run, tmp_path, capsys, lie):
    """What a picture is made in is as large as the file says: 74 GiB, once."""
    lines = (run / "subnets.jsonl").read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), **LIES[lie]})
    (tmp_path / "subnets.jsonl").write_text("\n".join(lines) + "\n")
    for picture in ("timeline", "subnets", "frequency"):
        assert cli.main(["plot", str(tmp_path), "--only", picture]) == 2
        assert "subnets.jsonl is damaged" in capsys.readouterr().err


def test_a_run_of_very_many_steps_is_drawn_in_as_many_columns_as_can_be_seen(run, tmp_path):
    shutil.copy(run / "subnets.jsonl", tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 10000000000, "loss": 1.0}\n')
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, before[1]))
    try:
        assert cli.main(["plot", str(tmp_path), "--only", "timeline", "subnets", "frequency"]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_gradients_of_other_data_are_not_drawn_as_the_runs(run, tmp_path, capsys):
    """The data's file was written anew since."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    record = read_record(folder)
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "aaa"}\n')
    write_sealed(folder / "run.json", {**record, "data": str(other)})
    assert cli.main(["plot", str(folder), "--only", "gradients"]) == 2
    assert "its gradients would be of other data" in capsys.readouterr().err
