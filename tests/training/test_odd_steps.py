"""Steps as nobody plans them: compiled, at rate 0, after a cast, by a copy, by torch's checkpointing."""

import copy
import io

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from losia_kernels import LoSiAAdamW, apply_losia, attach
from tests.tiny import make_batches, paper, same_tensors, snapshot, take_step, tiny_lm

KINDS = ["losia", "torch"]


def make_run(kind="losia", dtype=torch.float32, lr=0.01, options=None, **config):
    config = paper(**{"rank_factor": 0.5, "period": 2} | config)
    model = apply_losia(tiny_lm().to(dtype), config)
    if kind == "losia":
        return model, LoSiAAdamW(model, lr=lr, **(options or {}))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
    attach(optimizer, model)
    return model, optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_is_the_same(kind):
    """What a step does changes with the clock: past torch's limit of recompilations too."""
    plain, compiled = make_run(kind), make_run(kind)
    step = torch.compile(compiled[1].step, backend="eager")
    for batch in make_batches(20):
        take_step(*plain, batch)
        compiled[0](**batch).loss.backward()
        step()
        compiled[1].zero_grad()
    assert same_tensors(plain[0].state_dict(), compiled[0].state_dict())
    states = [optimizer.state_dict()["state"] for _, optimizer in (plain, compiled)]
    assert all(same_tensors(states[0][i], states[1][i]) for i in states[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_scheduler_finds_the_step_that_it_wraps(kind):
    model, optimizer = make_run(kind)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)
    for batch in make_batches(3):
        take_step(model, optimizer, batch)
        scheduler.step()
    assert optimizer.timeline.step == 3


def test_a_detached_optimizer_has_its_own_methods_again():
    _, optimizer = make_run("torch")
    assert {"step", "zero_grad"} <= optimizer.__dict__.keys()
    optimizer.timeline.detach()
    assert not {"step", "zero_grad"} & optimizer.__dict__.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_step_at_rate_0_without_a_gradient_counts(kind):
    """A warm-up begins at 0, and a batch may have nothing to learn."""
    model, optimizer = make_run(kind, lr=0.0)
    (model(**make_batches(1)[0]).loss * 0).backward()
    optimizer.step()
    assert optimizer.timeline.step == 1


@pytest.mark.parametrize("kind", KINDS)
def test_making_state_for_a_checkpoint_does_not_count(kind):
    model, optimizer = make_run(kind)
    before = snapshot(model)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.timeline.step == 0 and same_tensors(before, model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtype, config, options, cast",
    [
        (torch.float32, {}, {}, torch.float64),
        (torch.bfloat16, {}, {}, torch.float64),
        (torch.float32, {}, {"in_backward": True}, torch.float64),
    ],
)
def test_a_cast_that_the_state_does_not_follow_is_refused_by_name(
    kind, dtype, config, options, cast
):
    if kind == "torch" and options:
        pytest.skip("LoSiAAdamW's")
    model, optimizer = make_run(kind, dtype, options=options, **config)
    first, second = make_batches(2)
    take_step(model, optimizer, first)
    model.to(cast)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="proj: its subnet has become torch.float64.*exp_avg"):
        take_step(model, optimizer, second)
    assert same_tensors(before, model.state_dict())


def test_the_split_master_of_a_model_that_was_cast_is_refused_by_name():
    model, optimizer = make_run(dtype=torch.bfloat16, master="split")
    first, second = make_batches(2)
    take_step(model, optimizer, first)
    model.float()
    with pytest.raises(ValueError, match="master='split' keeps.*up_proj's is torch.float32"):
        take_step(model, optimizer, second)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float32])
def test_a_cast_that_leaves_the_masters_alone_trains_on(kind, cast):
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = make_run(kind, dtype)
        for batch in make_batches(3):
            take_step(model, optimizer, batch)
        model.to(cast)
        for batch in make_batches(5):
            take_step(model, optimizer, batch)
        assert optimizer.timeline.step == 8


def test_lbfgs_is_refused():
    model = apply_losia(tiny_lm(), paper(rank_factor=0.5))
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="attach: LBFGS evaluates the loss several times"):
        attach(optimizer, model)
    assert not hasattr(optimizer, "timeline") and len(optimizer.param_groups) == 1


def pickled(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("with_model", [True, False])
def test_a_copy_says_that_it_drives_no_model(kind, copied, with_model):
    model, optimizer = make_run(kind)
    first, second = make_batches(2)
    take_step(model, optimizer, first)
    twin, other = copied((model, optimizer)) if with_model else (model, copied(optimizer))
    twin(**second).loss.backward()
    before = snapshot(twin)
    with pytest.raises(RuntimeError, match="a copy of .*AdamW .* drives no model: make a new one"):
        other.step()
    other.zero_grad()
    assert same_tensors(before, twin.state_dict())
    take_step(model, optimizer, second)  # and the original goes on
    assert optimizer.timeline.step == 2
