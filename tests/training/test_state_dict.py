"""A run stopped at any step and resumed is the one that was not, bit for bit; a wrong checkpoint
changes nothing."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from losia_kernels import LoSiAAdamW, apply_losia, attach
from losia_kernels.layers.module import losia_layers
from tests.tiny import make_batches, paper, same_tensors, snapshot, take_step, tiny_lm

STEPS = 12  # two cycles of three groups, T = 2


def make_run(seed: int = 0, attached: bool = False, dtype=torch.float32, **options):
    """Model, optimizer and scheduler; ``seed`` of the first subnets, which a resumed run draws
    otherwise."""
    defaults = {"rank_factor": 0.5, "output_dim_factor": 0.5, "period": 2, "warmup_steps": 3}
    model = apply_losia(tiny_lm().to(dtype), paper(**defaults | options, seed=seed))
    if attached:
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1
        )
        attach(optimizer, model)
    else:
        optimizer = LoSiAAdamW(model, lr=0.01, weight_decay=0.1)
    return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)


def train(run, steps: range) -> None:
    """Two micro-batches a step."""
    model, optimizer, scheduler = run
    batches = make_batches(2 * STEPS)
    for step in steps:
        take_step(model, optimizer, *batches[2 * step : 2 * step + 2])
        scheduler.step()


def save(run) -> bytes:
    file = io.BytesIO()
    torch.save([part.state_dict() for part in run], file)
    return file.getvalue()


def load(run, checkpoint: bytes) -> None:
    for part, state in zip(run, torch.load(io.BytesIO(checkpoint), weights_only=True), strict=True):
        part.load_state_dict(state)


def flatten(value, name="") -> dict:
    """The leaves of a state dict, tensors as bytes, by their path."""
    if isinstance(value, torch.Tensor):
        return {
            name: (
                value.dtype,
                tuple(value.shape),
                value.contiguous().view(torch.uint8).numpy().tobytes()
                if value.dim()
                else value.item(),
            )
        }
    if name.endswith("losia_config"):
        value = json.loads(value)
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            path: leaf
            for key, item in items
            for path, leaf in flatten(item, f"{name}.{key}").items()
        }
    return {name: value}


def assert_same_run(run, other) -> None:
    for part, twin in zip(run, other, strict=True):
        ours, theirs = flatten(part.state_dict()), flatten(twin.state_dict())
        seeds = {path for path in ours if path.endswith("losia_config.seed")}
        assert {k: v for k, v in ours.items() if k not in seeds} == {
            k: v for k, v in theirs.items() if k not in seeds
        }


VARIANTS = {
    "defaults": {},
    "gradient": {"importance": "gradient"},
    "marginal": {"importance": "marginal"},
    "bfloat16 importance": {"importance": "sensitivity_bfloat16"},
    "sync": {"update_type": "sync"},
    "sync gradient": {"update_type": "sync", "importance": "gradient"},
    "steps kept": {"reset_step": False, "rewarm": False},
    "bf16": {"dtype": torch.bfloat16, "modules_to_save": ["embed_tokens", "norm"]},
    "bf16 marginal sync": {
        "dtype": torch.bfloat16,
        "importance": "marginal",
        "update_type": "sync",
    },
    "no master": {"dtype": torch.bfloat16, "master": "none"},
    "float64": {"dtype": torch.float64},
    "dense head": {"output_dim_factor": 1.0, "dtype": torch.bfloat16},
    "attached": {"attached": True, "modules_to_save": ["norm"]},
    "attached sync": {"attached": True, "update_type": "sync", "importance": "marginal"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_stopped_at_every_step_of_two_cycles(options):
    """The stochastic rounding takes its bits from the seed, so a run without masters resumes with
    the same one."""
    whole, checkpoints = make_run(**options), []
    for step in range(STEPS):
        checkpoints.append(save(whole))
        train(whole, range(step, step + 1))
    assert not same_tensors(make_run(**options)[0].state_dict(), whole[0].state_dict())
    for stop, checkpoint in enumerate(checkpoints):
        resumed = make_run(seed=0 if options.get("master") == "none" else 1, **options)
        if stop % 2:
            train(resumed, range(stop))  # a run that has been elsewhere, not a fresh one
        load(resumed, checkpoint)
        train(resumed, range(stop, STEPS))
        assert_same_run(resumed, whole)


def test_in_a_fresh_process(tmp_path):
    stops = [0, 1, 5, 8]
    whole = make_run(dtype=torch.bfloat16)
    for step in range(STEPS):
        if step in stops:
            (tmp_path / f"{step}.pt").write_bytes(save(whole))
        train(whole, range(step, step + 1))
    script = f"""
import torch
from pathlib import Path
from tests.training.test_state_dict import STEPS, load, make_run, save, train
for stop in {stops}:
    run = make_run(seed=1, dtype=torch.bfloat16)
    load(run, Path(f"{tmp_path}/{{stop}}.pt").read_bytes())
    train(run, range(stop, STEPS))
    Path(f"{tmp_path}/{{stop}}.end").write_bytes(save(run))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=300)
    for stop in stops:
        resumed = make_run(seed=1, dtype=torch.bfloat16)
        load(resumed, (tmp_path / f"{stop}.end").read_bytes())
        assert_same_run(resumed, whole)


def test_the_optimizer_may_be_loaded_before_the_model():
    whole, resumed = make_run(), make_run(seed=1)
    train(whole, range(5))
    model, optimizer, scheduler = torch.load(io.BytesIO(save(whole)), weights_only=True)
    resumed[1].load_state_dict(optimizer)
    resumed[0].load_state_dict(model)
    resumed[2].load_state_dict(scheduler)
    train(whole, range(5, STEPS))
    train(resumed, range(5, STEPS))
    assert_same_run(resumed, whole)


def test_saving_does_not_disturb_and_the_saved_clock_stands():
    whole, watched = make_run(), make_run()
    train(whole, range(STEPS))
    train(watched, range(3))
    state = watched[1].state_dict()
    train(watched, range(3, STEPS))
    assert state["param_groups"][0]["losia_step"] == 3
    assert_same_run(watched, whole)


def test_the_state_has_tensors_and_plain_values_only():
    run = make_run()
    train(run, range(3))
    state = run[1].state_dict()
    leaves = flatten(state)
    assert {type(leaf) for leaf in leaves.values()} <= {tuple, int, float, bool, str, type(None)}
    names = [
        name for entries in state["state"].values() for name in entries if name.startswith("losia_")
    ]
    # of the observing block's layers
    assert sorted(names) == ["losia_importance"] * 2 + ["losia_uncertainty"] * 2
    held = [entries.items() for entries in run[1].state.values()]
    assert {value for items in held for name, value in items if name.startswith("losia")} <= {None}


# Checkpoints that do not fit ----------------------------------------------------------------------


def plain_adamw_state():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    return torch.optim.AdamW([{"params": [p]} for p in parameters]).state_dict()


def state_of(**options):
    run = make_run(**options)
    train(run, range(3))
    return run[1].state_dict()


OTHERS = {
    "period": (
        lambda: state_of(period=3),
        r"LoSiAConfig\.period=3, this run has 2; resume with the same config",
    ),
    "importance": (
        lambda: state_of(importance="marginal"),
        r"LoSiAConfig\.importance='marginal', this run has 'sens",
    ),
    "update_type": (lambda: state_of(update_type="sync"), r"LoSiAConfig\.update_type='sync'"),
    "rank_factor": (lambda: state_of(rank_factor=0.25), r"LoSiAConfig\.rank_factor=0.25"),
    "reset_step": (lambda: state_of(reset_step=False), r"LoSiAConfig\.reset_step=False"),
    "rank_pattern": (
        lambda: state_of(rank_pattern={"layers.0.up_proj": 0.25}),
        r"model\.layers\.0\.up_proj: the checkpoint's exp_avg is \(3, 2\), the subnet \(6, 4\)",
    ),
    "groups": (
        lambda: state_of(exclude_modules=r".*layers\.1.*"),
        "different number of parameter groups",
    ),
    "layers": (
        lambda: state_of(exclude_modules=["layers.1.up_proj"]),
        r"model\.layers\.1\.up_proj: the checkpoint's exp_avg is \(4, 6\), the subnet \(6, 4\)",
    ),
    "plain AdamW": (plain_adamw_state, "was not saved by a LoSiA run"),
}


@pytest.mark.parametrize(("make", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_a_checkpoint_of_another_config_or_shape_is_refused_before_anything_changes(make, message):
    run, twin = make_run(), make_run()
    for each in (run, twin):
        train(each, range(3))
    other = make()
    with pytest.raises(ValueError, match=message):
        run[1].load_state_dict(other)
    assert_same_run(run, twin)
    for each in (run, twin):
        train(each, range(3, STEPS))
    assert_same_run(run, twin)


def test_a_model_checkpoint_of_another_shape_is_refused_by_layer():
    model, _, _ = make_run()
    before = snapshot(model.model.layers[0])
    other = make_run(rank_pattern={"layers.0.up_proj": 0.25})[0]
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.up_proj: the checkpoint's subnet is \(3, 2\), ours"
    ):
        model.load_state_dict(other.state_dict())
    assert same_tensors(
        model.model.layers[0].up_proj.state_dict(),
        {
            name.removeprefix("up_proj."): value
            for name, value in before.items()
            if name.startswith("up_proj.")
        },
    )


def test_importance_of_another_shape_is_refused():
    run = make_run()
    state = state_of()
    for entries in state["state"].values():
        if "losia_importance" in entries:
            entries["losia_importance"] = torch.zeros(2, 2)
    with pytest.raises(
        ValueError, match=r"the checkpoint's importance is \(2, 2\), the weight \(\d+, \d+\)"
    ):
        run[1].load_state_dict(state)
    assert run[1].timeline.step == 0


def test_a_run_may_go_on_with_other_free_choices():
    """What is neither the timeline nor the meaning of the state: the seed, how the first subnets
    were found."""
    run, other = make_run(), make_run(seed=5, init_subnet="random")
    train(run, range(3))
    load(other, save(run))
    assert other[1].timeline.step == 3 and next(losia_layers(other[0]))
