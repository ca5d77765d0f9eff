"""Algorithm 1 against the oracle, against every subnet of small matrices, and at its edges."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc_ref.selection import block_sum, brute_force_ref, select_marginal_ref, select_ref
from losia_kernels import NonFiniteScoreError, Subnet, select_subnet
from losia_kernels.training.selection import select_from_importance, select_from_marginals

thorough = settings(max_examples=80, deadline=None, derandomize=True)


def matrices(largest: int, top: int = 9):
    """Small whole numbers: sums are exact in any order, and ties are frequent."""
    return st.tuples(st.integers(1, largest), st.integers(1, largest)).flatmap(
        lambda shape: st.lists(
            st.integers(0, top), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]
        ).map(lambda entries: torch.tensor(entries, dtype=torch.float32).view(shape))
    )


def sizes(data, score):
    return tuple(data.draw(st.integers(1, size)) for size in score.shape)


def lists(subnet: Subnet) -> tuple[list[int], list[int]]:
    assert subnet.out_idx.dtype == subnet.in_idx.dtype == torch.int64
    return subnet.out_idx.tolist(), subnet.in_idx.tolist()


@thorough
@given(matrices(9), st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_the_oracles_choice_ties_included(score, data, dtype):
    k_out, k_in = sizes(data, score)
    assert lists(select_subnet(score.to(dtype), k_out, k_in)) == select_ref(
        score.numpy(), k_out, k_in
    )


@thorough
@given(matrices(8, top=5), st.data())
def test_importance_and_uncertainty_are_multiplied(importance, data):
    k_out, k_in = sizes(data, importance)
    entries = st.lists(st.integers(0, 5), min_size=importance.numel(), max_size=importance.numel())
    uncertainty = torch.tensor(data.draw(entries), dtype=torch.float32).view(importance.shape)
    chosen = select_from_importance(importance, uncertainty, k_out, k_in)
    assert lists(chosen) == select_ref((importance * uncertainty).numpy(), k_out, k_in)


@thorough
@given(matrices(9), st.data())
def test_the_share_of_the_score_that_is_captured(score, data):
    k_out, k_in = sizes(data, score)
    chosen = select_subnet(score, k_out, k_in)
    table = score.numpy().astype(np.float64)
    share = block_sum(table, *lists(chosen)) / table.sum() if table.any() else float("nan")
    np.testing.assert_allclose(float(chosen.captured), share, rtol=1e-6)


@thorough
@given(matrices(5), st.data())
def test_never_better_than_the_best_subnet_never_worse_than_half_way(score, data):
    """At most the optimum; at least what independent choices by the sums reach."""
    k_out, k_in = sizes(data, score)
    table = score.numpy().astype(np.float64)
    found = block_sum(table, *lists(select_subnet(score, k_out, k_in)))
    assert found <= block_sum(table, *brute_force_ref(table, k_out, k_in))
    marginal = select_from_marginals(score.sum(1), score.sum(0), k_out, k_in)
    assert found >= block_sum(table, *lists(marginal))


def test_a_block_that_stands_out_is_found():
    score = torch.rand(40, 30, generator=torch.Generator().manual_seed(0))
    score[torch.tensor([3, 17, 39])[:, None], torch.tensor([0, 8, 29])] += 50
    assert lists(select_subnet(score, 3, 3)) == ([3, 17, 39], [0, 8, 29])


@thorough
@given(st.integers(1, 7), st.integers(1, 7), st.data())
def test_renumbering_the_neurons_renumbers_the_subnet(n_out, n_in, data):
    """With all sums different, the choice depends on scores and not on positions."""
    seed = data.draw(st.integers(0, 1000))
    score = torch.rand(
        n_out, n_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    out_order = torch.tensor(data.draw(st.permutations(range(n_out))))
    in_order = torch.tensor(data.draw(st.permutations(range(n_in))))
    k_out, k_in = sizes(data, score)
    plain = select_subnet(score, k_out, k_in)
    renumbered = select_subnet(score[out_order][:, in_order], k_out, k_in)
    assert sorted(out_order[renumbered.out_idx].tolist()) == plain.out_idx.tolist()
    assert sorted(in_order[renumbered.in_idx].tolist()) == plain.in_idx.tolist()


@thorough
@given(matrices(7), st.data())
def test_the_score_transposed_gives_as_good_a_subnet(score, data):
    k_out, k_in = sizes(data, score)
    table = score.numpy()
    found = block_sum(table, *lists(select_subnet(score, k_out, k_in)))
    assert block_sum(table.T, *lists(select_subnet(score.T.contiguous(), k_in, k_out))) == found


@pytest.mark.parametrize(("k_out", "k_in"), [(1, 1), (2, 3), (4, 5), (4, 1), (1, 5)])
def test_of_equal_sums_the_lower_indices_win(k_out, k_in):
    assert lists(select_subnet(torch.ones(4, 5), k_out, k_in)) == (
        list(range(k_out)),
        list(range(k_in)),
    )
    assert lists(select_subnet(torch.zeros(4, 5), k_out, k_in)) == (
        list(range(k_out)),
        list(range(k_in)),
    )


def test_of_equal_blocks_that_of_in_then_out_wins():
    # out_then_in would say ([3], [2])
    score = torch.tensor([[4.0, 0, 0], [0, 4, 0], [0, 3, 0], [2, 0, 4]])
    assert lists(select_subnet(score, 1, 1)) == ([1], [1])


@pytest.mark.parametrize("transpose", [False, True])
def test_the_better_order_wins(transpose):
    """The largest row sum and the largest column sum lie in different blocks; only one of them
    holds the 9."""
    score = torch.tensor([[9.0, 0, 0], [0, 6, 0], [0, 5, 0]])
    assert lists(select_subnet(score.T.contiguous() if transpose else score, 1, 1)) == ([0], [0])


def test_an_output_layer_keeps_all_inputs():
    """Section 3.2: with all inputs taken, the outputs of largest summed score."""
    score = torch.rand(50, 8, generator=torch.Generator().manual_seed(1))
    chosen = select_subnet(score, 6, 8)
    assert torch.equal(chosen.in_idx, torch.arange(8))
    assert torch.equal(chosen.out_idx, score.sum(1).topk(6).indices.sort().values)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [(0, 0), (3, 4), (2, 1)])
def test_a_score_that_is_not_finite_is_an_error(value, position):
    score = torch.rand(4, 5)
    score[position] = value
    with pytest.raises(NonFiniteScoreError, match="importance is not finite for 1 of 4 neurons"):
        select_subnet(score, 2, 2)
    with pytest.raises(NonFiniteScoreError):
        select_from_importance(torch.ones(4, 5), score, 2, 2)
    for sums in [(score.sum(1), torch.ones(5)), (torch.ones(4), score.sum(0))]:
        with pytest.raises(NonFiniteScoreError):
            select_from_marginals(*sums, 2, 2)


@pytest.mark.parametrize(
    ("shape", "k", "problem"),
    [
        ((4, 5), (0, 2), "cannot select 0 x 2"),
        ((4, 5), (2, 0), "cannot select 2 x 0"),
        ((4, 5), (5, 2), "cannot select 5 x 2"),
        ((4, 5), (2, 6), "cannot select 2 x 6"),
        ((4,), (1, 1), r"score must be \[out, in\]"),
        ((2, 4, 5), (1, 1), r"score must be \[out, in\]"),
    ],
)
def test_sizes_that_cannot_be_selected_are_errors(shape, k, problem):
    with pytest.raises(ValueError, match=problem):
        select_subnet(torch.rand(shape), *k)


@thorough
@given(matrices(9), st.data())
def test_marginals_choose_each_side_by_its_own_sums(score, data):
    k_out, k_in = sizes(data, score)
    sums = score.sum(1), score.sum(0)
    assert lists(select_from_marginals(*sums, k_out, k_in)) == select_marginal_ref(
        *sums, k_out, k_in
    )


def test_the_score_is_left_as_it_was():
    score = torch.rand(6, 7)
    before = score.clone()
    select_subnet(score, 2, 3)
    assert torch.equal(score, before)
