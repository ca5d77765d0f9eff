"""The integer timeline against the oracle that looks every step up, and against tables made by
hand."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc_ref.schedule import moving_ref, observing_ref, rewarm_ref
from losia_kernels.training.schedule import Schedule

SCHEDULES = st.builds(
    Schedule,
    groups=st.integers(1, 5),
    period=st.integers(1, 6),
    update_type=st.sampled_from(["async", "sync"]),
    warmup_steps=st.integers(0, 40),
    rewarm=st.booleans(),
    last_step_only=st.booleans(),
)
exhaustive = settings(max_examples=100, deadline=None, derandomize=True)


@exhaustive
@given(SCHEDULES)
def test_three_cycles_agree_with_the_oracle_in_every_step(schedule):
    clock = schedule.groups, schedule.period, schedule.update_type
    for step in range(3 * schedule.cycle + 2):
        observing, moving = observing_ref(step, *clock), moving_ref(step, *clock)
        if schedule.last_step_only and step % schedule.period != schedule.period - 1:
            observing = []
        assert list(schedule.observing(step)) == observing
        assert list(schedule.moving(step)) == moving
        assert set(moving) <= set(schedule.observing(step))  # nobody moves without having looked
        for group in range(schedule.groups):
            factor = (
                rewarm_ref(step, group, *clock, schedule.warmup_steps) if schedule.rewarm else 1.0
            )
            assert schedule.lr_factor(group, step) == factor


@exhaustive
@given(SCHEDULES)
def test_every_group_moves_once_a_cycle_after_observing_one_slot(schedule):
    for cycle in range(2):
        steps = range(cycle * schedule.cycle, (cycle + 1) * schedule.cycle)
        for group in range(schedule.groups):
            moves = [step for step in steps if group in schedule.moving(step)]
            watched = [step for step in steps if group in schedule.observing(step)]
            assert len(moves) == 1
            first = moves[0] if schedule.last_step_only else moves[0] - schedule.period + 1
            assert watched == list(range(first, moves[0] + 1))


@exhaustive
@given(SCHEDULES, st.integers(0, 90))
def test_moved_at_is_the_last_move_before_the_step(schedule, step):
    for group in range(schedule.groups):
        earlier = [s for s in range(step) if group in schedule.moving(s)]
        assert schedule.moved_at(group, step) == (earlier[-1] if earlier else None)


def test_asynchronous_by_hand():
    """Two groups, T = 3; the first two steps past a move are rewarmed, the third has the whole rate
    again."""
    schedule = Schedule(groups=2, period=3)
    assert [schedule.observing(step) for step in range(7)] == [
        (0,),
        (0,),
        (0,),
        (1,),
        (1,),
        (1,),
        (0,),
    ]
    assert [schedule.moving(step) for step in range(7)] == [(), (), (0,), (), (), (1,), ()]
    assert [schedule.lr_factor(0, step) for step in range(10)] == [
        1,
        1,
        1,
        1 / 3,
        2 / 3,
        1,
        1,
        1,
        1,
        1 / 3,
    ]
    assert [schedule.lr_factor(1, step) for step in range(10)] == [
        1,
        1,
        1,
        1,
        1,
        1,
        1 / 3,
        2 / 3,
        1,
        1,
    ]


def test_synchronous_by_hand():
    schedule = Schedule(groups=3, period=2, update_type="sync")
    assert [schedule.observing(step) for step in range(7)] == [
        (0, 1, 2),
        (0, 1, 2),
        (),
        (),
        (),
        (),
        (0, 1, 2),
    ]
    assert [schedule.moving(step) for step in range(6)] == [(), (0, 1, 2), (), (), (), ()]
    for group in range(3):
        assert [schedule.lr_factor(group, step) for step in range(6)] == [1, 1, 0.5, 1, 1, 1]


def test_one_group_observes_always():
    schedule = Schedule(groups=1, period=2)
    assert [schedule.observing(step) for step in range(5)] == [(0,)] * 5
    assert [schedule.lr_factor(0, step) for step in range(6)] == [1, 1, 0.5, 1, 0.5, 1]


def test_gradient_importance_looks_at_the_last_step_of_a_slot_only():
    schedule = Schedule(groups=2, period=3, last_step_only=True)
    assert [schedule.observing(step) for step in range(6)] == [(), (), (0,), (), (), (1,)]
    assert Schedule(groups=2, period=1, last_step_only=True).observing(0) == (0,)


def test_rewarming_waits_for_the_end_of_the_warm_up():
    """Step 4 is the first past it, in the middle of group 0's ramp."""
    factors = [Schedule(groups=2, period=3, warmup_steps=4).lr_factor(0, step) for step in range(6)]
    assert factors == [1, 1, 1, 1, 2 / 3, 1]


def test_without_rewarming_the_rate_is_whole():
    assert {
        Schedule(groups=2, period=3, rewarm=False).lr_factor(0, step) for step in range(20)
    } == {1.0}


def test_no_groups_nothing_happens():
    schedule = Schedule(groups=0, period=3)
    assert [schedule.observing(step) + schedule.moving(step) for step in range(4)] == [()] * 4
    assert schedule.too_short(0) is None


# Runs that end too early --------------------------------------------------------------------------


def groups_that_move(schedule: Schedule, total_steps: int) -> set[int]:
    return {group for step in range(total_steps) for group in schedule.moving(step)}


@exhaustive
@given(SCHEDULES, st.integers(0, 60))
def test_the_warning_tells_who_is_left_and_the_largest_period_that_fits(schedule, total_steps):
    message = schedule.too_short(total_steps)
    moved = groups_that_move(schedule, total_steps)
    assert (message is None) == (len(moved) == schedule.groups)
    if message is None:
        return
    left, groups = map(int, re.search(r"(\d+) of (\d+) groups never leave", message).groups())
    assert (left, groups) == (schedule.groups - len(moved), schedule.groups)

    def fits(period: int) -> bool:
        return (
            len(groups_that_move(Schedule(groups, period, schedule.update_type), total_steps))
            == groups
        )

    longest = re.search(r"the largest period that gives every group a turn is (\d+)", message)
    if longest:
        assert fits(int(longest[1])) and not fits(int(longest[1]) + 1)
    else:
        least = int(re.search(r"that takes at least (\d+) steps", message)[1])
        assert total_steps == least - 1 or total_steps < least and not fits(1)
        assert len(groups_that_move(Schedule(groups, 1, schedule.update_type), least)) == groups


@pytest.mark.parametrize(
    ("schedule", "total_steps", "message"),
    [
        (
            Schedule(32, 100),
            2800,
            "2800 steps are less than 32 slots of 100 steps: 4 of 32 groups never leave their first "
            "subnet; the largest period that gives every group a turn is 87",
        ),
        (
            Schedule(4, 10, "sync"),
            9,
            "9 steps are less than 1 slots of 10 steps: 4 of 4 groups never leave their first "
            "subnet; the largest period that gives every group a turn is 9",
        ),
        (
            Schedule(4, 1),
            3,
            "3 steps are less than 4 slots of 1 steps: 1 of 4 groups never leave their first subnet; that "
            "takes at least 4 steps",
        ),
        (Schedule(4, 10), 40, None),
        (Schedule(4, 10, "sync"), 10, None),
    ],
)
def test_the_warning_by_hand(schedule, total_steps, message):
    assert schedule.too_short(total_steps) == message
