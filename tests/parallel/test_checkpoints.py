"""Checkpoints: from N ranks to M and from one engine to another bit for bit; a resumed run is the
one not stopped."""

import pytest
import torch

from losia_kernels import export_state_dict
from tests.parallel import runs
from tests.parallel.runs import CYCLE, Run
from tests.parallel.test_ddp import assert_same_bits

CPU = torch.device("cpu")
STEP = CYCLE + 1  # in the middle of a slot, after every group has moved
UNTIL = 2 * CYCLE


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["sensitivity", "marginal", "attached"])
def test_a_resumed_run_is_the_one_not_stopped(two, tmp_path, engine, name):
    run = (
        Run(attached=True)
        if name == "attached"
        else Run({"importance": name, "modules_to_save": ["norm"]})
    )
    two.run(runs.save, engine, run, STEP, str(tmp_path / "a"))
    resumed = two.run(runs.load, engine, run, str(tmp_path / "a"), UNTIL)
    straight = two.run(runs.straight, engine, run, UNTIL)
    for (model, optimizer, step), expected in zip(resumed, straight, strict=True):
        assert step == UNTIL
        assert_same_bits(model, expected[0])
        assert_same_bits(optimizer, expected[1])


def test_a_period_that_is_not_settled_yet_becomes_the_checkpoints(two, tmp_path):
    two.run(runs.save, "fsdp", Run(), STEP, str(tmp_path / "a"))
    resumed = two.run(runs.load, "fsdp", Run({"period": "auto"}), str(tmp_path / "a"), UNTIL)
    for (model, optimizer, step), expected in zip(
        resumed, two.run(runs.straight, "fsdp", Run(), UNTIL), strict=True
    ):
        assert step == UNTIL
        assert_same_bits(model, expected[0])
        assert_same_bits(optimizer, expected[1])


@pytest.mark.parametrize("saved, loaded", [("fsdp", "fsdp"), ("fsdp", "ddp"), ("ddp", "fsdp")])
def test_from_two_ranks_to_four_and_one(two, four, tmp_path, saved, loaded):
    (model, optimizer), _ = two.run(runs.save, saved, Run(), STEP, str(tmp_path / "a"))
    others = four.run(runs.load, loaded, Run(), str(tmp_path / "a"))
    others.append(runs.load(CPU, "none", Run(), str(tmp_path / "a")))
    for other_model, other_optimizer, step in others:
        assert step == STEP
        assert_same_bits(other_model, model)
        present = {key: value for key, value in optimizer.items() if key in other_optimizer}
        assert_same_bits({key: other_optimizer[key] for key in present}, present)
        assert all(not value.any() for key, value in optimizer.items() if key not in present)
        assert any("losia_importance" in key for key in present)


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_shards_with_state_in_fewer_bits_resume(two, tmp_path, moments):
    """Rows of codes and of their scales are in shards as the subnet is."""
    run = Run({"master": "none"}, dtype=torch.bfloat16, optimizer={"moments": moments})
    two.run(runs.save, "fsdp", run, STEP, str(tmp_path / "a"))
    resumed = two.run(runs.load, "fsdp", run, str(tmp_path / "a"), UNTIL)
    straight = two.run(runs.straight, "fsdp", run, UNTIL)
    for (model, optimizer, _), expected in zip(resumed, straight, strict=True):
        assert_same_bits(model, expected[0])
        assert_same_bits(optimizer, expected[1])
    dtypes = {key.rpartition(":")[2]: value.dtype for key, value in optimizer.items()}
    assert dtypes["exp_avg"] == (torch.bfloat16 if moments == "bfloat16" else torch.uint8)
    assert ("exp_avg_scale" in dtypes) == (moments == "int8")


def test_from_one_process_to_two_shards(two, tmp_path):
    model, optimizer = runs.save(CPU, "none", Run(), STEP, str(tmp_path / "a"))
    for other_model, other_optimizer, _ in two.run(runs.load, "fsdp", Run(), str(tmp_path / "a")):
        assert_same_bits(other_model, model)
        assert_same_bits({key: other_optimizer[key] for key in optimizer}, optimizer)


@pytest.mark.parametrize("run", [Run(), Run(attached=True)], ids=["own", "attached"])
@pytest.mark.parametrize("step", [0, 1, runs.PERIOD, STEP])
def test_torchs_own_helpers_resume_shards(two, tmp_path, step, run):
    """What accelerate and Trainer call: also before the first step, and at the start of a slot."""
    resumed = two.run(runs.torch_helpers, run, step, CYCLE + 2, str(tmp_path / "a"))
    straight = two.run(runs.straight, "fsdp", run, CYCLE + 2)
    for (model, optimizer), expected in zip(resumed, straight, strict=True):
        assert_same_bits(model, expected[0])
        assert_same_bits(optimizer, expected[1])


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_full_export_on_rank_0(two, engine):
    first, second = two.run(runs.export, engine)
    assert second == {}
    model, forward, optimizer, timeline = runs.make(CPU, "none", Run())
    runs.advance(Run(), CPU, forward, optimizer, timeline, 3)
    torch.testing.assert_close(first, dict(export_state_dict(model)), rtol=0, atol=1e-12)


def test_bad_checkpoints(tmp_path):
    folder = str(tmp_path / "a")
    runs.save(CPU, "none", Run(), 1, folder)
    with pytest.raises(FileExistsError, match="name a new folder"):
        runs.save(CPU, "none", Run(), 1, folder)
    with pytest.raises(ValueError, match="LoSiAConfig.period=2, this run has 3|period"):
        runs.load(CPU, "none", Run({"period": 3}), folder)
    with pytest.raises(ValueError, match="another model"):
        runs.load(CPU, "none", Run({"exclude_modules": ["down_proj"]}), folder)
    with pytest.raises(FileNotFoundError):
        runs.load(CPU, "none", Run(), str(tmp_path / "b"))


@pytest.mark.parametrize("importance", ["sensitivity", "gradient"])
@pytest.mark.parametrize("step", [CYCLE, CYCLE + 1])
def test_what_nobody_had_observed_is_no_hole_in_a_checkpoint(two, tmp_path, importance, step):
    """Between two slots, and with "gradient" before a slot's last step, whole layers save no
    importance."""
    run = Run({"importance": importance})
    (model, _), _ = two.run(runs.save, "ddp", run, step, str(tmp_path / "a"))
    resumed = two.run(runs.load, "fsdp", run, str(tmp_path / "a"), UNTIL)
    straight = two.run(runs.straight, "ddp", run, UNTIL)
    for (loaded, _, at), (expected, _) in zip(resumed, straight, strict=True):
        assert at == UNTIL
        for name, value in expected.items():
            torch.testing.assert_close(loaded[name], value)
