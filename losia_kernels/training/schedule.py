"""The timeline of Section 3.3 in integers: optimizer step -> who observes, who moves, how far it is
rewarmed."""

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from ..config import LoSiAConfig

PAPER_PERIOD = 100  # A.3
CYCLES = 2  # of a short run: against a period of 100 no worse on any task of bench/quality


@dataclass(frozen=True)
class Schedule:
    """N ``groups`` take turns of T = ``period`` optimizer steps; a cycle is N * T steps. Steps
    count from 0. ``moves`` as of LoSiAConfig: groups that never move have no turns.

    ``last_step_only``: a group looks at the last step of its slot alone (importance "gradient").
    """

    groups: int
    period: int
    update_type: str = "async"
    warmup_steps: int = 0
    rewarm: bool = True
    last_step_only: bool = False
    moves: str = "importance"

    @property
    def cycle(self) -> int:
        """Steps until every group has had its turn."""
        return self.groups * self.period

    def slot(self, step: int) -> tuple[int, ...]:
        """The groups whose slot contains ``step``."""
        if self.groups == 0 or self.moves == "none":
            return ()
        turn = step // self.period % self.groups
        if self.update_type == "async":
            return (turn,)
        return tuple(range(self.groups)) if turn == 0 else ()

    def ends_slot(self, step: int) -> bool:
        """Whether ``step`` is the last one of its slot."""
        return step % self.period == self.period - 1

    def observing(self, step: int) -> tuple[int, ...]:
        """The groups that collect importance in ``step``."""
        if self.moves != "importance":
            return ()
        return self.slot(step) if self.ends_slot(step) or not self.last_step_only else ()

    def moving(self, step: int) -> tuple[int, ...]:
        """The groups that are relocalized after the update of ``step``."""
        return self.slot(step) if self.ends_slot(step) else ()

    def moved_at(self, group: int, step: int) -> int | None:
        """t_r of Eq. 8: the last step before ``step`` after whose update ``group`` moved; None if
        it never has."""
        if self.moves == "none":
            return None
        turn = group if self.update_type == "async" else 0
        slot_end = (turn + 1) * self.period - 1
        if step <= slot_end:
            return None
        return slot_end + (step - slot_end - 1) // self.cycle * self.cycle

    def lr_factor(self, group: int, step: int) -> float:
        """What ``step`` multiplies the group's learning rate with, Eq. 8: (t - t_r) / T in the T
        steps after a move, the first of which runs at 1 / T (in the authors' code at 0)."""
        moved_at = self.moved_at(group, step)
        if not self.rewarm or moved_at is None or step < self.warmup_steps:
            return 1.0
        return min(1.0, (step - moved_at) / self.period)

    def too_short(self, total_steps: int) -> str | None:
        """What to tell a user whose run ends before every group has moved once; None when it does
        not.

        The paper's ARC-C run left 4 of 32 blocks on their first subnet.
        """
        # slots until every group has moved
        turns = self.groups if self.update_type == "async" else 1
        if self.moves == "none" or self.groups == 0 or total_steps >= turns * self.period:
            return None
        left = self.groups - total_steps // self.period
        longest = total_steps // turns
        advice = f"the largest period that gives every group a turn is {longest}"
        if longest == 0:
            advice = f"that takes at least {turns} steps"
        return (
            f"{total_steps} steps are less than {turns} slots of {self.period} steps: {left} of {self.groups} groups "
            f"never leave their first subnet; {advice}"
        )


def auto_period(total_steps: int, groups: int) -> int:
    """T of ``period="auto"``: two cycles in a run of ``total_steps``, T at most the paper's 100 and
    at least 1."""
    return max(1, min(PAPER_PERIOD, total_steps // (CYCLES * max(1, groups))))


def check_steps(total_steps: Any) -> None:
    """Raise ValueError unless it is a whole number of at least 1."""
    if not isinstance(total_steps, Integral) or total_steps < 1:
        raise ValueError(
            f"total_steps must be a whole number of optimizer steps, at least 1, got "
            f"{total_steps!r}"
        )


class Clock:
    """Where a run stands: the steps taken, and the schedule once its period is known.

    Attributes:
        step: optimizer steps taken.
        config: with the period that ``period="auto"`` has become.
        auto: whether the config said "auto".
    """

    def __init__(self, config: LoSiAConfig, groups: int, last_step_only: bool):
        self.step, self.config, self.auto = 0, config, config.period == "auto"
        self._groups, self._last_step_only = groups, last_step_only
        self._schedule: Schedule | None = None
        if config.period != "auto":
            self.settle(config.period)
        elif config.moves == "none":
            self.settle(PAPER_PERIOD)  # of a run without turns any will do

    def settle(self, period: int) -> None:
        """From here on that is T."""
        self.config = replace(self.config, period=period)
        self._schedule = self.schedule_of(period)

    def settle_auto(self, total_steps: int) -> bool:
        """Make T of ``period="auto"`` that of a run of ``total_steps``, unless the run has begun;
        whether it did."""
        waits = self.auto and (not self.settled or self.step == 0)
        if waits:
            self.settle(auto_period(total_steps, self._groups))
        return waits

    def schedule_of(self, period: int) -> Schedule:
        """The schedule with that T, whatever is settled."""
        return Schedule(
            groups=self._groups,
            period=period,
            update_type=self.config.update_type,
            warmup_steps=self.config.warmup_steps,
            rewarm=self.config.rewarm,
            last_step_only=self._last_step_only,
            moves=self.config.moves,
        )

    @property
    def settled(self) -> bool:
        """Whether T is known."""
        return self._schedule is not None

    @property
    def schedule(self) -> Schedule:
        """Raises RuntimeError as long as ``period="auto"`` waits for the number of steps."""
        self.check_settled()
        assert self._schedule is not None
        return self._schedule

    def check_settled(self) -> None:
        """Raise RuntimeError as long as ``period="auto"`` waits for the number of steps."""
        if self._schedule is None:
            raise RuntimeError(
                "LoSiAConfig.period is 'auto', and nothing has said how many optimizer steps the "
                "run has: give LoSiAAdamW or attach total_steps=..., the Trainer a LoSiACallback, "
                "or call timeline.plan(total_steps)"
            )

    @property
    def observing(self) -> tuple[int, ...]:
        """The groups that observe in the step now beginning."""
        return self.schedule.observing(self.step)

    @property
    def moving(self) -> tuple[int, ...]:
        """The groups that move after this step's update."""
        return self.schedule.moving(self.step)

    def has_moved(self, group: int) -> bool:
        """Whether the group has moved before this step."""
        return self.step > 0 and self.schedule.moved_at(group, self.step) is not None

    def lr_factor(self, group: int) -> float:
        """What this step multiplies the group's learning rate with (Eq. 8)."""
        return self.schedule.lr_factor(group, self.step)
