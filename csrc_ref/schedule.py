"""The asynchronous schedule (section 3.3) and rewarming (Eq. 8), by looking every step up.

Optimizer steps count from 0; ``n_groups`` layer groups each observe for one slot of ``period``
steps per cycle.
"""


def observing_ref(step: int, n_groups: int, period: int, update_type: str = "async") -> list[int]:
    """The groups that collect importance in the forward and backward of this step."""
    slot = (step // period) % n_groups
    if update_type == "async":
        return [slot]
    # ablation SL: all in the first slot of a cycle
    return list(range(n_groups)) if slot == 0 else []


def moving_ref(step: int, n_groups: int, period: int, update_type: str = "async") -> list[int]:
    """The groups that are relocalized after the update of this step: those whose slot it ends."""
    ends_slot = step % period == period - 1
    return observing_ref(step, n_groups, period, update_type) if ends_slot else []


def rewarm_ref(
    step: int,
    group: int,
    n_groups: int,
    period: int,
    update_type: str = "async",
    warmup_steps: int = 0,
) -> float:
    """Eq. 8: what multiplies the group's learning rate at this step, ``(t - t_r) / T`` in the T
    steps after a move, counted from 1 (the authors' code counts from 0)."""
    if step < warmup_steps:
        return 1.0
    for moved_at in range(max(0, step - period), step):  # t_r
        if group in moving_ref(moved_at, n_groups, period, update_type):
            return (step - moved_at) / period
    return 1.0
