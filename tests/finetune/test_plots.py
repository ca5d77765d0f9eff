"""What a run reports and records of its subnets, and the pictures made from it."""

import itertools
import math
import shutil
import struct
import time
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
import torch
from PIL import Image

from losia_kernels import LoSiAConfig, cli
from losia_kernels.finetune import plots, spectra
from losia_kernels.finetune.options import PICTURES
from losia_kernels.finetune.progress import moving_average
from losia_kernels.finetune.run import finetune
from losia_kernels.integrations.history import SubnetHistory
from losia_kernels.integrations.transformers import LoSiACallback
from losia_kernels.layers.module import losia_layers
from tests.finetune.test_run import options
from tests.integrations.test_trainer_features import Watch, logged, make_trainer
from tests.integrations.tiny_llama import make_model

STEPS = 9
CONFIG = LoSiAConfig(rank_factor=1 / 4, output_dim_factor=1 / 8, period=2, warmup_steps=1)


def places_now(model):
    return {
        name: (layer.out_idx.tolist(), layer.in_idx.tolist()) for name, layer in losia_layers(model)
    }


# reported and recorded ----------------------------------------------------------------------------


def read_events(folder):
    """(tag, step) -> value of the scalars in TensorBoard's files: records of length, checksum,
    event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    scalars = {}
    for file in folder.rglob("events*"):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            scalars |= {
                (value.tag, event.step): value.simple_value for value in event.summary.value
            }
            at += length + 16
    return scalars


def test_tensorboard_gets_rates_moves_and_who_observes(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(
        tmp_path, config=CONFIG, report_to="tensorboard", lr_scheduler_type="linear"
    )
    trainer.train()
    events = read_events(tmp_path / "board")
    rates = logged(trainer, "learning_rate")
    groups = ["lm_head", "model.layers.0", "model.layers.1"]
    for step, (group, name) in itertools.product(range(STEPS), enumerate(groups)):
        moved = [
            end for end in range(2, STEPS + 1, 2) if (end // 2 - 1) % 3 == group and end <= step
        ]
        factor = 0.5 if step in moved else 1.0  # Eq. 8 with T = 2
        assert events[f"train/losia/lr/{name}", step + 1] == pytest.approx(
            rates[step] * factor, rel=1e-6
        )
    assert [events["train/losia/observing", step + 1] for step in range(STEPS)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        0,
        0,
        1,
    ]
    for name in ("overlap", "captured"):
        found = {
            step: value for (tag, step), value in events.items() if tag == f"train/losia/{name}"
        }
        assert list(found) == [2, 4, 6, 8] and all(0 < value <= 1 for value in found.values())


def test_the_history_is_where_the_subnets_were(tmp_path):
    path = tmp_path / "run" / "subnets.jsonl"
    watch = Watch(lambda optimizer, model: places_now(model))
    trainer = make_trainer(tmp_path, config=CONFIG, callbacks=[watch])
    trainer.callback_handler.callbacks[-1].history = path
    trainer.train()
    history = SubnetHistory.read(path)
    assert history.groups == ["lm_head", "model.layers.0", "model.layers.1"]
    assert history.config == CONFIG.to_dict()
    layers = history.of_layers()
    assert len(layers) == 15 and [place.step for place in layers["lm_head"]] == [0, 2, 8]
    for (name, places), step in itertools.product(layers.items(), range(STEPS)):
        place = [place for place in places if place.step <= step][-1]
        assert (place.out_idx.tolist(), place.in_idx.tolist()) == watch.seen[step][name], (
            name,
            step,
        )
    first, second = layers["model.layers.0.mlp.up_proj"]
    kept = (
        len(set(first.out_idx) & set(second.out_idx))
        / 12
        * len(set(first.in_idx) & set(second.in_idx))
        / 8
    )
    assert (
        first.overlap is None and second.overlap == pytest.approx(kept) and 0 < second.captured < 1
    )
    assert second.features == (48, 32)


def test_marginal_importance_captures_nothing_that_is_known(tmp_path):
    config = LoSiAConfig(rank_factor=1 / 4, period=2, importance="marginal")
    trainer = make_trainer(tmp_path, config=config, max_steps=3)
    trainer.callback_handler.callbacks[-1].history = tmp_path / "subnets.jsonl"
    trainer.train()
    history = SubnetHistory.read(tmp_path / "subnets.jsonl")
    moved = [place for place in history.places if place.step]
    assert moved and all(place.captured is None and place.overlap is not None for place in moved)
    told = replace(history, places=[replace(place, captured=0.5) for place in history.places])
    widths = []
    for known in (history, told):
        plots.draw_timeline(known, 3, tmp_path / "timeline.png")
        widths.append(Image.open(tmp_path / "timeline.png").width)
    assert widths[0] < 0.7 * widths[1], "a panel for what nobody knows"


# pictures -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("plotted")
    finetune(options(folder, model_folder))
    return folder / "run"


@pytest.mark.slow
def test_plot_draws_every_picture(run, capsys):
    assert cli.main(["plot", str(run), "--vectors", "8"]) == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(run / "plots" / f"{name}.png") for name in PICTURES]
    assert "gradients" in said.err and "singular vectors: 100%" in said.err  # progress
    for name in PICTURES:
        image = np.asarray(Image.open(run / "plots" / f"{name}.png").convert("L"))
        assert min(image.shape) > 200 and len(np.unique(image)) > 50, name


def test_plot_says_what_is_missing(run, tmp_path, capsys):
    def refused(*arguments):
        assert cli.main(["plot", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "holds no run" in refused(tmp_path)
    shutil.copy(run / "log.jsonl", tmp_path)
    assert "no " in (said := refused(tmp_path, "--only", "subnets")) and "subnets.jsonl" in said
    assert "no run.json" in refused(tmp_path, "--only", "gradients")
    shutil.copy(run / "run.json", tmp_path)
    assert "not finished" in refused(tmp_path, "--only", "singular_vectors")
    assert "no model folder ./gone" in refused(tmp_path, "--only", "gradients", "--base", "./gone")
    assert cli.main(["plot", str(tmp_path), "--only", "loss"]) == 0


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


def test_a_resumed_run_records_each_place_once(run, model_folder):
    lines = (run / "subnets.jsonl").read_text()
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "checkpoint-14")  # it goes on from 12
    finetune(options(run.parent, model_folder, resume=True))
    assert (run / "subnets.jsonl").read_text() == lines


# the numbers in them ------------------------------------------------------------------------------


def test_gradient_sums_are_those_of_the_dense_gradients():
    torch.manual_seed(0)
    batches = [
        {"input_ids": (ids := torch.randint(0, 256, (2, 8))), "labels": ids} for _ in range(2)
    ]
    model = make_model()
    sums = spectra.gradient_sums(model, batches, LoSiAConfig(rank_factor=0.5))
    assert not list(losia_layers(model))
    plain, expected = make_model().train(), {name: (0, 0) for name in sums}
    for batch in batches:
        plain.zero_grad()
        plain(**batch).loss.backward()
        for name, (out_sums, in_sums) in expected.items():
            size = plain.get_parameter(f"{name}.weight").grad.abs()
            expected[name] = out_sums + size.sum(1) / 2, in_sums + size.sum(0) / 2
    assert len(sums) == 14
    for name in sums:
        for ours, theirs in zip(sums[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_similarity_of_singular_vectors(tmp_path):
    base, trained = make_model(), make_model()
    layer = trained.model.layers[0].mlp.up_proj
    u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    turned = u.clone()
    turned[:, 1], turned[:, 2] = (
        (u[:, 1] + u[:, 2]) / math.sqrt(2),
        (u[:, 2] - u[:, 1]) / math.sqrt(2),
    )
    layer.weight.data = turned @ s.diag() @ v
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    found = spectra.singular_vector_similarity(base, trained, names, count=5)
    expected = torch.tensor([1, 0.5**0.5, 0.5**0.5, 1, 1])
    torch.testing.assert_close(found[names[0]], expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(found[names[1]], torch.ones(5), atol=1e-5, rtol=0)


def test_the_share_of_the_run_in_which_a_neuron_is_trained(run):
    history = SubnetHistory.read(run / "subnets.jsonl")
    for places in history.of_layers().values():
        for side in (0, 1):
            trained = plots._time_trained(places, side, 14)
            assert (
                trained.sum() == pytest.approx(len(plots._idx(places[0], side)))
                and trained.max() <= 1 + 1e-9
            )


def test_the_loss_curve_of_a_long_run_takes_no_longer_than_its_steps():
    """It is drawn at every checkpoint, and a sum over each window of 150,000 steps would take half
    a minute."""
    values = [math.sin(step) for step in range(150_000)]
    started = time.process_time()
    smooth = moving_average(values, 15_000)
    assert time.process_time() - started < 3
    for last in (0, 1, 14_999, 15_000, 149_999):
        assert smooth[last] == pytest.approx(
            fmean(values[max(0, last - 14_999) : last + 1]), abs=1e-12
        )
    assert moving_average([3.0, 5.0], 1) == [3.0, 5.0]
