"""``period="auto"``: two cycles in the run, T at most the paper's 100; settled by whoever knows the
number of steps."""

import copy

import numpy as np
import pytest
import torch

from losia_kernels import LoSiAAdamW, apply_losia, attach
from losia_kernels.layers.convert import trained_parameters
from losia_kernels.layers.module import losia_layers
from losia_kernels.training.schedule import Schedule, auto_period
from tests.tiny import make_batches, paper, same_tensors, snapshot, take_step, tiny_lm

STEPS = 12  # of two groups: two cycles of T = 3


def make_model(period="auto", **options):
    return apply_losia(tiny_lm(), paper(rank_factor=0.5, period=period, **options))


def losia_adamw(model, total_steps=None):
    return LoSiAAdamW(model, lr=0.01, total_steps=total_steps)


def attached(model, total_steps=None):
    optimizer = torch.optim.AdamW(
        [p for _, p in trained_parameters(model)]
        + [layer.subnet for _, layer in losia_layers(model)],
        lr=0.01,
    )
    attach(optimizer, model, total_steps)
    return optimizer


BOTH = pytest.mark.parametrize("make", [losia_adamw, attached])


@pytest.mark.parametrize(
    ("total_steps", "groups", "period"),
    [
        (60, 30, 1),
        (59, 30, 1),
        (10, 30, 1),
        (120, 30, 2),
        (179, 30, 2),
        (12, 2, 3),
        (6000, 30, 100),
        (5999, 30, 99),
        (36_000, 33, 100),
        (50, 0, 25),
    ],
)
def test_by_hand(total_steps, groups, period):
    assert auto_period(total_steps, groups) == period


@pytest.mark.parametrize("groups", [1, 2, 7, 30])
@pytest.mark.parametrize("cycles", [2, 2.4, 5])
def test_every_group_moves_twice_where_the_steps_allow_it(groups, cycles):
    total = int(groups * cycles)
    schedule = Schedule(groups, auto_period(total, groups))
    moves = [group for step in range(total) for group in schedule.moving(step)]
    assert min(moves.count(group) for group in range(groups)) >= 2


@BOTH
@pytest.mark.parametrize(
    "options", [{}, {"importance": "gradient"}, {"update_type": "sync"}], ids=str
)
def test_it_is_the_run_of_the_period_that_it_stands_for(make, options):
    states = []
    for period in ("auto", 3):
        model = make_model(period, **options)
        optimizer = make(model, STEPS)
        assert optimizer.timeline.config.period == optimizer.timeline.schedule.period == 3
        for batch in make_batches(STEPS):
            take_step(model, optimizer, batch)
        states.append(snapshot(model))
    assert same_tensors(*states)
    assert not same_tensors(states[0], make_model(3, **options).state_dict())


@BOTH
def test_a_step_is_refused_while_nobody_knows_the_number_of_steps(make):
    model = make_model()
    before, optimizer = snapshot(model), make(model)
    with pytest.raises(RuntimeError, match="period is 'auto'.*total_steps"):
        take_step(model, optimizer, make_batches(1)[0])
    assert same_tensors(before, model.state_dict())
    optimizer.timeline.plan(STEPS)
    take_step(model, optimizer, make_batches(1)[0])
    assert optimizer.timeline.step == 1 and not same_tensors(before, model.state_dict())


def test_a_run_with_fewer_steps_than_groups_is_warned_about():
    with pytest.warns(UserWarning, match="that takes at least 2 steps"):
        assert losia_adamw(make_model(), 1).timeline.config.period == 1


@BOTH
@pytest.mark.parametrize("told", [None, STEPS, 2 * STEPS], ids=["untold", "told", "longer"])
def test_a_resumed_run_has_the_period_of_its_checkpoint(make, told):
    model = make_model()
    optimizer = make(model, STEPS)
    batches = make_batches(STEPS)
    for batch in batches[:5]:
        take_step(model, optimizer, batch)
    saved = snapshot(model), copy.deepcopy(optimizer.state_dict())
    again = make_model(seed=1)
    other = make(again, told)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert other.timeline.config.period == 3
    for batch in batches[5:]:
        take_step(model, optimizer, batch)
        take_step(again, other, batch)
    assert same_tensors(model.state_dict(), again.state_dict())


def test_a_number_in_the_place_of_auto_is_held_to_the_checkpoint():
    saved = losia_adamw(make_model(), STEPS).state_dict()
    with pytest.raises(ValueError, match="LoSiAConfig.period=3, this run has 6"):
        losia_adamw(make_model(6), STEPS).load_state_dict(saved)


def test_before_the_first_step_another_length_can_be_told():
    """As when the Trainer has found a smaller batch."""
    optimizer = losia_adamw(make_model("auto", importance="gradient"), 4)
    assert optimizer.timeline.config.period == 1 and optimizer.timeline.observing == (0,)
    optimizer.timeline.plan(STEPS)
    assert optimizer.timeline.config.period == 3 and optimizer.timeline.observing == ()
    take_step(optimizer.timeline.model, optimizer, make_batches(1)[0])
    optimizer.timeline.plan(100)
    assert optimizer.timeline.config.period == 3


@pytest.mark.parametrize("period", ["auto", 3])
@pytest.mark.parametrize("total_steps", [0, -5, 10.0, "40"])
def test_a_length_that_is_none_is_refused(period, total_steps):
    model = make_model(period)
    with pytest.raises(
        ValueError, match="total_steps must be a whole number of optimizer steps, at least 1, got"
    ):
        losia_adamw(model, total_steps)


def test_a_numpy_number_is_a_length():
    assert losia_adamw(make_model(), np.int64(STEPS)).timeline.config.period == 3


def test_the_clock_cannot_be_set_before_the_period_is_known():
    timeline = losia_adamw(make_model()).timeline
    with pytest.raises(RuntimeError, match="total_steps"):
        timeline.resume_at(2)
    assert timeline.step == 0


def test_what_was_saved_before_the_number_of_steps_was_known_can_be_loaded():
    saved = losia_adamw(make_model()).state_dict()
    for told in (None, STEPS):
        optimizer = losia_adamw(make_model(), told)
        optimizer.load_state_dict(saved)
        assert optimizer.timeline.config.period == ("auto" if told is None else 3)
