"""What an observer holds after several micro-batches, from the oracles; when a slot begins anew;
who does not move."""

import pytest
import torch
from torch import nn

from csrc_ref.importance import importance_marginals_ref, importance_update_ref
from csrc_ref.selection import select_marginal_ref, select_ref
from losia_kernels import LoSiAAdamW, LoSiALinear, apply_losia
from losia_kernels.config import IMPORTANCES
from losia_kernels.parallel.ranks import Ranks, RowShard
from losia_kernels.training.importance import make_observer, new_subnet
from tests.tiny import make_batches, paper, take_step, tiny_lm

BETAS = {"importance_beta1": 0.7, "importance_beta2": 0.6}
SCALE = 2.0


@pytest.fixture
def layer() -> LoSiALinear:
    torch.manual_seed(0)
    return LoSiALinear.from_linear(nn.Linear(9, 6, dtype=torch.float64), 0.5, name="up_proj")


@pytest.fixture
def gradients(layer) -> list[torch.Tensor]:
    return [torch.randn_like(layer.weight) for _ in range(3)]


def rows_of(layer) -> RowShard:
    return RowShard(Ranks(), layer.out_features)


def observed(layer, gradients, importance: str):
    observer = make_observer(paper(importance=importance, **BETAS))
    for grad in gradients:
        observer.observe(layer.weight, grad, SCALE, rows_of(layer))
    return observer, new_subnet(layer, observer, rows_of(layer))


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_where_no_place_is_better_a_subnet_stays(layer, importance):
    nothing = [torch.zeros_like(layer.weight)]
    assert observed(layer, nothing, importance)[1] is None
    nothing[0][2, 1] = 1.0
    assert observed(layer, nothing, importance)[1] is not None


def indices(subnet) -> tuple[list[int], list[int]]:
    return subnet.out_idx.tolist(), subnet.in_idx.tolist()


def test_sensitivity_smooths_importance_and_uncertainty_each_with_its_beta(layer, gradients):
    state = torch.zeros(1), torch.zeros(1)
    for grad in gradients:
        state = importance_update_ref(
            *state, layer.weight.detach(), grad, 0.7, 0.6, grad_scale=SCALE
        )
    observer, subnet = observed(layer, gradients, "sensitivity")
    torch.testing.assert_close(
        observer.tensors, dict(zip(("importance", "uncertainty"), state, strict=True))
    )
    assert indices(subnet) == select_ref((state[0] * state[1]).numpy(), 3, 4)


def test_sensitivity_in_bfloat16_is_rounded_to_it_and_chooses_as_float32_does_nearly():
    """Each smoothing rounds once: three of them are within 2^-8 of the float32 states, and so is
    what is captured."""
    torch.manual_seed(0)
    layer = LoSiALinear.from_linear(nn.Linear(64, 48), 0.25, name="up_proj")
    gradients = [torch.randn_like(layer.weight) for _ in range(3)]
    exact, _ = observed(layer, gradients, "sensitivity")
    observer, subnet = observed(layer, gradients, "sensitivity_bfloat16")
    for name, tensor in observer.tensors.items():
        assert tensor.dtype == torch.bfloat16 and exact.tensors[name].dtype == torch.float32
        torch.testing.assert_close(tensor.float(), exact.tensors[name], rtol=3 * 2**-8, atol=0)
    score = exact.tensors["importance"] * exact.tensors["uncertainty"]
    best = new_subnet(layer, exact, rows_of(layer))
    assert (
        score[subnet.out_idx][:, subnet.in_idx].sum()
        > 0.98 * score[best.out_idx][:, best.in_idx].sum()
    )


def test_gradient_is_the_size_of_the_sum_of_the_micro_batches(layer, gradients):
    """Not the sum of the sizes, and not the last one."""
    observer, subnet = observed(layer, gradients, "gradient")
    torch.testing.assert_close(observer.tensors, {"gradient": sum(gradients)})
    assert indices(subnet) == select_ref(sum(gradients).abs().numpy(), 3, 4)


def test_marginal_smooths_the_sums(layer, gradients):
    out_sums, in_sums = torch.zeros(6), torch.zeros(9)
    for grad in gradients:
        now = importance_marginals_ref(layer.weight.detach(), grad, grad_scale=SCALE)
        out_sums, in_sums = 0.7 * out_sums + 0.3 * now[0], 0.7 * in_sums + 0.3 * now[1]
    observer, subnet = observed(layer, gradients, "marginal")
    torch.testing.assert_close(
        observer.tensors, {"out_importance": out_sums, "in_importance": in_sums}
    )
    assert indices(subnet) == select_marginal_ref(out_sums, in_sums, 3, 4)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_layer_that_saw_nothing_does_not_move(layer, importance):
    assert observed(layer, [], importance)[1] is None


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_choosing_changes_nothing(layer, gradients, importance):
    observer, first = observed(layer, gradients, importance)
    before = layer.out_idx.clone(), layer.subnet.clone()
    assert indices(new_subnet(layer, observer, rows_of(layer))) == indices(first)
    assert torch.equal(layer.out_idx, before[0]) and torch.equal(layer.subnet, before[1])


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_importance_starts_from_zero_in_each_slot_even_of_the_same_group(importance):
    """With one group a slot follows the other: what the first one saw is forgotten."""
    config = paper(rank_factor=0.5, period=2, importance=importance)
    model = apply_losia(tiny_lm(blocks=1), config)
    optimizer = LoSiAAdamW(model, lr=0.01)
    for step, batch in enumerate(make_batches(6)):
        observers = optimizer.timeline.observers
        assert all(
            bool(observer.tensors) == (importance != "gradient" and step % 2 == 1)
            for observer in observers.values()
        )
        take_step(model, optimizer, batch)
        assert len(observers) == (2 if importance != "gradient" or step % 2 == 0 else 0)
