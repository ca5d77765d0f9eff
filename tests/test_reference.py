"""The oracles against facts that do not come from them: autograd, torch.optim.AdamW, enumeration,
hand-made tables."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from csrc_ref import schedule, selection
from csrc_ref.adamw import subnet_adamw_ref
from csrc_ref.gather import gather_features_ref
from csrc_ref.importance import importance_marginals_ref, importance_ref, importance_update_ref
from csrc_ref.scores import score_marginals_ref
from csrc_ref.subnet_grad import subnet_grad_ref

torch.manual_seed(0)


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# Kernels ------------------------------------------------------------------------------------------


def test_sensitivity_is_the_loss_change_of_removing_a_weight():
    """Eq. 3 is exact for a loss that is quadratic in each weight with the curvature g^2 (the Fisher
    estimate)."""
    weight, slope = rand(4, 3), rand(4, 3)

    def loss_per_weight(w):
        return slope * (w - weight) + 0.5 * slope**2 * (w - weight) ** 2

    at = weight.clone().requires_grad_(True)
    loss_per_weight(at).sum().backward()
    change = (loss_per_weight(torch.zeros_like(weight)) - loss_per_weight(weight)).abs()
    torch.testing.assert_close(importance_ref(weight, at.grad), change)
    torch.testing.assert_close(importance_ref(weight, at.grad / 4, grad_scale=4.0), change)


def test_importance_kinds_are_the_parts_of_eq_3():
    weight, grad = torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, -1.0]])
    expected = {
        "first_order": [6.0, 1.0],
        "second_order": [18.0, 0.5],
        "sensitivity": [12.0, 1.5],
        "gradient": [3.0, 1.0],
    }
    for kind, values in expected.items():
        assert importance_ref(weight, grad, kind).tolist() == [values]


def test_smoothing_of_a_constant_importance_has_a_closed_form():
    """From zero and with I constant: mean_n = (1 - b^n) I and uncertainty_n = n (1 - b) b^n I, b
    the common beta."""
    weight, grad, beta, n = rand(3, 5), rand(3, 5), 0.85, 7
    now = importance_ref(weight, grad)
    state = torch.zeros(3, 5), torch.zeros(3, 5)
    for _ in range(n):
        state = importance_update_ref(*state, weight, grad, beta, beta)
    torch.testing.assert_close(state[0], (1 - beta**n) * now)
    torch.testing.assert_close(state[1], n * (1 - beta) * beta**n * now)


def test_each_beta_smooths_its_own_average():
    weight, grad = torch.ones(1, 1), torch.ones(1, 1)  # I = 1/2
    mean, deviation = importance_update_ref(
        torch.ones(1, 1), torch.ones(1, 1), weight, grad, 0.5, 0.75
    )
    assert mean.item() == 0.75
    assert deviation.item() == 0.75 * 1 + 0.25 * 0.25


def test_marginals_are_sums_over_the_given_neurons():
    importance, uncertainty = (
        torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        torch.full((3, 2), 10.0),
    )
    out_sums, in_sums = score_marginals_ref(importance, uncertainty)
    assert (out_sums.tolist(), in_sums.tolist()) == ([30, 70, 110], [90, 120])
    out_sums, in_sums = score_marginals_ref(
        importance, None, torch.tensor([0, 2]), torch.tensor([1])
    )
    assert (out_sums.tolist(), in_sums.tolist()) == ([2, 4, 6], [6, 8])
    out_sums, in_sums = importance_marginals_ref(importance, importance, "gradient", 2.0)
    assert (out_sums.tolist(), in_sums.tolist()) == ([6, 14, 22], [18, 24])


def test_subnet_gradient_is_autograds():
    linear, x = nn.Linear(5, 6).double(), rand(2, 3, 5)
    out_idx, in_idx = torch.tensor([1, 4, 5]), torch.tensor([0, 3])
    y = linear(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    torch.testing.assert_close(subnet_grad_ref(dy, x), linear.weight.grad)
    expected = linear.weight.grad[out_idx][:, in_idx]
    torch.testing.assert_close(subnet_grad_ref(dy, x, out_idx, in_idx), expected)
    gathered = gather_features_ref(x, in_idx)
    assert torch.equal(gathered, torch.stack([x[..., 0], x[..., 3]], dim=-1))
    torch.testing.assert_close(subnet_grad_ref(dy, gathered, out_idx), expected)


def test_subnet_adamw_is_torchs_and_leaves_the_rest_alone():
    weight, out_idx, in_idx = rand(5, 4), torch.tensor([0, 3]), torch.tensor([1, 2, 3])
    start, options = weight.clone(), {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.2}
    subnet = weight[out_idx][:, in_idx]
    theirs = nn.Parameter(subnet.clone())
    optimizer = torch.optim.AdamW([theirs], betas=(0.8, 0.95), **options)
    moments = torch.zeros(2, 3), torch.zeros(2, 3)
    for step in range(1, 5):
        grad = rand(2, 3)
        theirs.grad = grad
        optimizer.step()
        weight, subnet, *moments = subnet_adamw_ref(
            weight,
            subnet,
            grad,
            *moments,
            out_idx,
            in_idx,
            beta1=0.8,
            beta2=0.95,
            step=step,
            **options,
        )
        torch.testing.assert_close(subnet, theirs.detach(), rtol=1e-12, atol=1e-12)
        assert torch.equal(weight[out_idx][:, in_idx], subnet)
    outside = torch.ones(5, 4, dtype=torch.bool)
    outside[out_idx[:, None], in_idx] = False
    assert torch.equal(weight[outside], start[outside])


# Selection ----------------------------------------------------------------------------------------

SCORES = st.tuples(st.integers(1, 5), st.integers(1, 5)).flatmap(
    lambda shape: st.lists(
        st.integers(0, 9), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]
    ).map(lambda values: np.array(values, dtype=float).reshape(shape))
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SCORES, st.data())
def test_greedy_is_a_subnet_between_each_order_and_the_optimum(score, data):
    k_out, k_in = (data.draw(st.integers(1, size)) for size in score.shape)
    chosen = selection.select_ref(score, k_out, k_in)
    for idx, k, size in zip(chosen, (k_out, k_in), score.shape, strict=True):
        assert len(idx) == k and idx == sorted(set(idx)) and 0 <= idx[0] and idx[-1] < size
    found = score[np.ix_(*chosen)].sum()
    orders = [order(score, k_out, k_in) for order in (selection.in_then_out, selection.out_then_in)]
    assert found == max(score[np.ix_(*subnet)].sum() for subnet in orders)
    assert found <= score[np.ix_(*selection.brute_force_ref(score, k_out, k_in))].sum()
    assert selection.in_then_out(score.T, k_in, k_out) == orders[1][::-1]


def test_greedy_finds_a_block_that_stands_out():
    rng = np.random.default_rng(0)
    score = rng.random((6, 7))
    block = [0, 3, 5], [1, 2, 6]
    score[np.ix_(*block)] += 10
    assert selection.select_ref(score, 3, 3) == block == selection.brute_force_ref(score, 3, 3)


def test_the_better_order_wins():
    # inputs sum to 9, 11, 0; outputs to 9, 6, 5
    score = np.array([[9.0, 0.0, 0.0], [0.0, 6.0, 0.0], [0.0, 5.0, 0.0]])
    assert selection.in_then_out(score, 1, 1) == ([1], [1])
    assert selection.out_then_in(score, 1, 1) == ([0], [0])
    assert selection.select_ref(score, 1, 1) == ([0], [0])
    assert selection.select_ref(score.T, 1, 1) == ([0], [0])


def test_greedy_is_not_the_optimum():
    score = np.array(
        [[5.0, 4.0, 4.0, 0.0], [4.0, 0.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]]
    )
    assert selection.select_ref(score, 1, 1) == ([0], [0])
    assert selection.brute_force_ref(score, 1, 1) == ([3], [3])


def test_ties_go_to_the_lower_index_and_to_in_then_out():
    assert selection.select_ref(np.ones((4, 5)), 2, 3) == ([0, 1], [0, 1, 2])
    score = np.array([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 3.0, 0.0], [2.0, 0.0, 4.0]])
    assert selection.in_then_out(score, 1, 1) == ([1], [1])
    assert selection.out_then_in(score, 1, 1) == ([3], [2])  # as good
    assert selection.select_ref(score, 1, 1) == ([1], [1])


def test_forms_that_select_from_sums():
    score = np.array([[1.0, 1.0], [5.0, 0.0], [0.0, 3.0]])
    assert selection.select_outputs_ref(score, 2) == [1, 2]
    assert selection.select_marginal_ref([1.0, 4.0, 4.0, 2.0], [0.0, 1.0], 2, 1) == ([1, 2], [1])
    assert selection.largest([1.0, 4.0, 4.0, 4.0], 2) == [1, 2]


# Timeline -----------------------------------------------------------------------------------------

THIRD = pytest.approx(1 / 3)
TWO_THIRDS = pytest.approx(2 / 3)


def test_asynchronous_timeline():
    """Two groups, T = 3: a cycle of six steps, written out by hand."""
    steps = range(12)
    assert [schedule.observing_ref(s, 2, 3) for s in steps] == ([[0]] * 3 + [[1]] * 3) * 2
    assert [schedule.moving_ref(s, 2, 3) for s in steps] == [[], [], [0], [], [], [1]] * 2
    first, second = ([schedule.rewarm_ref(s, group, 2, 3) for s in steps] for group in (0, 1))
    assert first == [1, 1, 1, THIRD, TWO_THIRDS, 1, 1, 1, 1, THIRD, TWO_THIRDS, 1]
    assert second == [1, 1, 1, 1, 1, 1, THIRD, TWO_THIRDS, 1, 1, 1, 1]


def test_synchronous_timeline():
    steps = range(12)
    assert [schedule.observing_ref(s, 2, 3, "sync") for s in steps] == ([[0, 1]] * 3 + [[]] * 3) * 2
    assert [schedule.moving_ref(s, 2, 3, "sync") for s in steps] == [[], [], [0, 1], [], [], []] * 2
    for group in (0, 1):
        factors = [schedule.rewarm_ref(s, group, 2, 3, "sync") for s in steps]
        assert factors == [1, 1, 1, THIRD, TWO_THIRDS, 1, 1, 1, 1, THIRD, TWO_THIRDS, 1]


def test_one_group_rewarms_without_pause_and_period_one_moves_every_step():
    assert [schedule.rewarm_ref(s, 0, 1, 2) for s in range(6)] == [1, 1, 0.5, 1, 0.5, 1]
    assert [schedule.moving_ref(s, 3, 1) for s in range(4)] == [[0], [1], [2], [0]]
    assert [schedule.rewarm_ref(s, 0, 3, 1) for s in range(4)] == [1, 1, 1, 1]


def test_no_rewarming_before_the_warm_up_has_ended():
    """Step 4 is the first past a warm-up of 4 steps, in the middle of group 0's rewarming."""
    assert [schedule.rewarm_ref(s, 0, 2, 3, warmup_steps=4) for s in range(6)] == [
        1,
        1,
        1,
        1,
        TWO_THIRDS,
        1,
    ]
