"""In float16 under torch's GradScaler the subnets move as without it, overflows and all."""

import pytest
import torch
from torch import nn

from losia_kernels import LoSiAAdamW, LoSiALinear, apply_losia
from tests.tiny import make_batches, paper, same_tensors, tiny_lm


def train_scaled(first_scale: float, importance: str) -> tuple[dict, int]:
    """Four steps, each tried until the scaler takes it; the final state and how many tries
    overflowed."""
    model = apply_losia(tiny_lm(), paper(rank_factor=0.5, period=2, importance=importance))
    optimizer = LoSiAAdamW(model, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=first_scale, backoff_factor=2.0**-16)
    tries = 0
    for batch in make_batches(4):
        step = optimizer.timeline.step
        while optimizer.timeline.step == step:
            optimizer.timeline.loss_divisor = 1 / scaler.get_scale()
            with torch.autocast("cpu", torch.float16):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            tries += 1
    return model.state_dict(), tries - 4


def test_an_overflow_leaves_no_trace():
    """The scaler skips the step, and the slot must not end in infinite scores for it."""
    for importance in ("sensitivity", "gradient", "marginal"):
        plain, overflows = train_scaled(2.0**8, importance)
        assert overflows == 0
        scaled, overflows = train_scaled(2.0**24, importance)
        assert overflows > 0
        assert same_tensors(plain, scaled), importance


def test_the_scale_backs_off_where_the_dense_gradient_overflows():
    """By the subnet's own gradient alone the scale would grow until nothing could be observed any
    more."""
    torch.manual_seed(0)
    layer = LoSiALinear(8, 8, rank_factor=0.5)
    seen = []
    layer.observe_(seen.append)
    outside = next(row for row in range(8) if row not in layer.out_idx)
    x, dy = torch.ones(4, 8), torch.ones(4, 8)
    dy[:, outside] = 3e4  # which fits float16, but the sum over four tokens does not
    with torch.autocast("cpu", torch.float16):
        layer(x).backward(dy.half())
    assert not seen[0].isfinite().all() and layer.subnet.grad.isinf().all()
    layer.subnet.grad = None
    layer.observe_(None)
    with torch.autocast("cpu", torch.float16):
        layer(x).backward(dy.half())
    assert layer.subnet.grad.isfinite().all()


@pytest.mark.parametrize("divisor", [0, -1.0, float("inf"), float("nan")])
def test_a_divisor_that_is_none_is_refused(divisor):
    timeline = LoSiAAdamW(apply_losia(nn.Sequential(nn.Linear(8, 8)), paper(0.5))).timeline
    with pytest.raises(ValueError, match="loss_divisor must be a positive number"):
        timeline.loss_divisor = divisor
