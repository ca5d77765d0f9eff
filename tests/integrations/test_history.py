"""What a run reports and records of its subnets."""

import itertools
import struct

import pytest

from losia_kernels.integrations.history import SubnetHistory, rewind_log
from tests import tiny
from tests.integrations.test_trainer_features import Watch, logged, make_trainer
from tests.tiny import paper

STEPS = 9
CONFIG = paper(rank_factor=1 / 4, output_dim_factor=1 / 8, period=2, warmup_steps=1)


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
    watch = Watch(lambda optimizer, model: tiny.places(model))
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


def test_rewinding_a_log_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    rewind_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
