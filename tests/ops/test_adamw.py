"""What ``subnets_adamw_`` refuses, and how updates reach it."""

import pytest
import torch

from losia_kernels import ops
from losia_kernels.ops import adamw
from losia_kernels.ops.adamw import subnets_adamw_plain_, update_subnets_
from tests.kernels.updates import BF16, ODD, OPTIONS, assert_same, copy, in_bf16, in_codes, make


def change(updates, i, **fields):
    updates[i] = updates[i]._replace(**fields)


def change_all(updates, **fields):
    updates[:] = [update._replace(**fields) for update in updates]


@pytest.mark.parametrize(
    "spoil, problem",
    [
        (lambda u: change(u, 1, grad=torch.ones(2, 2)), r"grad must be \(1, 1\) .*, \(2, 2\)\]"),
        (
            lambda u: change(u, 0, exp_avg=u[0].exp_avg.half()),
            "moments must both be .*, got torch.float16",
        ),
        (
            lambda u: (u.__setitem__(slice(None), in_bf16(u)), change_all(u, seed=None)),
            "torch.bfloat16 moments need seeds",
        ),
        (
            lambda u: (
                u.__setitem__(slice(None), in_codes(u)),
                change_all(u, exp_avg_scale=None),
            ),
            r"uint8 moments need float32 scales of shape \(3, 1\)",
        ),
        (
            lambda u: change_all(u, exp_avg_scale=torch.ones(3, 1)),
            "scales belong to uint8 moments",
        ),
        (
            lambda u: change_all(u, remainder=torch.ones(3, 11)),
            "a remainder belongs to a bfloat16 subnet",
        ),
        (
            lambda u: change(u, 0, exp_avg_sq=u[0].exp_avg_sq.T.contiguous().T),
            "must be contiguous, got strides",
        ),
        (
            lambda u: change(u, 0, in_idx=u[0].in_idx.repeat_interleave(2)[::2]),
            "indices must be contiguous",
        ),
        (lambda u: change(u, 2, step=0), "step counts from 1, got 0"),
    ],
)
def test_refused_before_anything_changes(spoil, problem):
    updates = make(ODD, BF16, torch.float32, "cpu")
    spoil(updates)
    before = copy(updates)
    with pytest.raises(ValueError, match=f"subnets_adamw_: .*{problem}"):
        update_subnets_(updates, **OPTIONS)
    assert_same(updates, before)


def test_lists_of_unlike_lengths_are_refused():
    columns = list(map(list, zip(*make(ODD, BF16, torch.float32, "cpu"), strict=True)))
    columns[2].pop()
    with pytest.raises(ValueError, match="subnets_adamw_: .* one entry for each of the 3 weights"):
        ops.subnets_adamw_(*columns[:10], *OPTIONS.values(), [], [], [])


def test_updates_of_every_form_in_one_call(monkeypatch):
    """One call for those with the same optional fields; each is what it would be alone."""
    exact = make(ODD, BF16, torch.float32, "cpu", seeded=False)
    nearest = make(ODD, BF16, BF16, "cpu", seeded=False)
    stochastic = make(ODD, BF16, BF16, "cpu")
    coded = in_codes(make(ODD, BF16, torch.float32, "cpu"))
    split = [
        update._replace(remainder=torch.ones_like(update.subnet, dtype=torch.int16))
        for update in make(ODD, BF16, BF16, "cpu")
    ]
    forms = exact, nearest, stochastic, coded, split
    mixed = [update for row in zip(*forms, strict=True) for update in row]
    alone = copy(mixed)
    for update in alone:
        subnets_adamw_plain_([update], **OPTIONS)
    op, sizes = adamw.subnets_adamw_, []
    monkeypatch.setattr(
        adamw,
        "subnets_adamw_",
        lambda weights, *rest: sizes.append(len(weights)) or op(weights, *rest),
    )
    update_subnets_(mixed, **OPTIONS)
    assert sizes == [6, 3, 3, 3]
    assert_same(mixed, alone)
    for ours, theirs in zip(mixed, alone, strict=True):
        for name in ("exp_avg_scale", "exp_avg_sq_scale", "remainder"):
            value = getattr(theirs, name)
            assert value is None or torch.equal(getattr(ours, name), value)
