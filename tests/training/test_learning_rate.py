"""The rate of a step: any schedule, times the rewarming; clipping; closures."""

import copy

import pytest
import torch
from torch import nn

from losia_kernels import LoSiAAdamW
from tests.tiny import make_batches, same_tensors, take_step
from tests.training.test_optimizer import make_model, trainable


def applied_rates(
    model: nn.Module, optimizer: LoSiAAdamW, scheduler, steps: int
) -> list[list[float]]:
    """Per step the rate that each group was updated with: Adam's first step after a reset moves by
    exactly lr."""
    rates = []
    for batch in make_batches(steps):
        optimizer.state.clear()
        before = [layers[0].subnet.detach().clone() for layers in optimizer.timeline.groups]
        model(**batch).loss.backward()
        subnets = [copy.deepcopy(layers[0].current_subnet) for layers in optimizer.timeline.groups]
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        weights = [layers[0].weight for layers in optimizer.timeline.groups]
        now = [subnet.gather(weight) for subnet, weight in zip(subnets, weights, strict=True)]
        rates.append(
            [(after - then).abs().max().item() for after, then in zip(now, before, strict=True)]
        )
    return rates


def constant(optimizer, steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def one_cycle(optimizer, steps):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps + 1)


def exponential(optimizer, steps):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def linear_with_warmup(optimizer, steps):
    transformers = pytest.importorskip("transformers")
    return transformers.get_linear_schedule_with_warmup(optimizer, 3, steps + 1)


@pytest.mark.parametrize("make_scheduler", [constant, one_cycle, exponential, linear_with_warmup])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_rewarming_multiplies_whatever_schedule_runs(make_scheduler, warmup_steps):
    steps = 9
    model = make_model(torch.float64, warmup_steps=warmup_steps)
    optimizer = LoSiAAdamW(model, lr=0.01, eps=0)
    scheduler = make_scheduler(optimizer, steps)
    twin = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.01)
    planned_scheduler, planned = make_scheduler(twin, steps), []
    for _ in range(steps):
        planned.append(twin.param_groups[0]["lr"])
        twin.step()
        planned_scheduler.step()
    factors = [
        [optimizer.timeline.schedule.lr_factor(group, step) for group in (0, 1)]
        for step in range(steps)
    ]
    assert [0.5, 1] in factors
    expected = [[lr * factor for factor in row] for lr, row in zip(planned, factors, strict=True)]
    measured = applied_rates(model, optimizer, scheduler, steps)
    torch.testing.assert_close(
        torch.tensor(measured), torch.tensor(expected), rtol=1e-6, atol=1e-12
    )
    assert {group["lr"] for group in optimizer.param_groups} == {scheduler.get_last_lr()[0]}


def test_clipping_sees_the_subnets_gradients():
    model = make_model(modules_to_save=["norm"])
    model(**make_batches(1)[0]).loss.backward()
    gradients = [parameter.grad for parameter in trainable(model)]
    total = torch.stack([grad.square().sum() for grad in gradients]).sum().sqrt()
    torch.testing.assert_close(
        nn.utils.clip_grad_norm_(model.parameters(), total.item() / 4), total
    )
    clipped = torch.stack([grad.square().sum() for grad in gradients]).sum().sqrt()
    torch.testing.assert_close(clipped, total / 4)


def test_a_closure_is_evaluated_before_the_update():
    model, other = make_model(), make_model()
    optimizer, reference = LoSiAAdamW(model, lr=0.01), LoSiAAdamW(other, lr=0.01)
    for batch in make_batches(5):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == take_step(other, reference, batch)
    assert same_tensors(model.state_dict(), other.state_dict())


def test_a_tensor_as_rate_is_reduced_once_on_a_plateau():
    """By a scheduler that fills the tensor of each parameter group."""
    optimizer = LoSiAAdamW(make_model(blocks=3), lr=torch.tensor(0.8))
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    scheduler.step(1.0)
    scheduler.step(1.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.4] * 3)
