"""Subnets of runs of neighbours: sizes, draws, checks, selection by summed score, and the layer
that trains one."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from csrc_ref.selection import block_sum, select_marginal_ref, select_ref
from losia_kernels import LoSiAAdamW, LoSiALinear, Subnet, apply_losia, calibrate, select_subnet
from losia_kernels.layers.module import losia_layers
from losia_kernels.layers.subnet import subnet_size
from losia_kernels.training import optimizer
from losia_kernels.training.calibrate import start_from_frequency
from losia_kernels.training.selection import select_from_marginals
from tests.tiny import paper

thorough = settings(max_examples=80, deadline=None, derandomize=True)


def score_and_sizes(data, largest: int, alignment: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """A matrix of small whole numbers, whose ties are frequent, and sizes that whole runs (or all
    neurons) make up."""
    shape = tuple(data.draw(st.integers(alignment, largest)) for _ in range(2))
    entries = st.lists(
        st.integers(0, 9), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]
    )
    score = torch.tensor(data.draw(entries), dtype=torch.float32).view(shape)
    k = tuple(
        data.draw(st.sampled_from([*range(alignment, size + 1, alignment), size])) for size in shape
    )
    return score, k


def lists(subnet: Subnet) -> tuple[list[int], list[int]]:
    return subnet.out_idx.tolist(), subnet.in_idx.tolist()


@pytest.mark.parametrize("alignment", [1, 2, 4])
@thorough
@given(data=st.data())
def test_the_oracles_choice_ties_included(alignment, data):
    score, k = score_and_sizes(data, 13, alignment)
    chosen = select_subnet(score, *k, alignment)
    assert lists(chosen) == select_ref(score.numpy(), *k, alignment)
    chosen.check(tuple(score.shape), "layer", alignment)
    sums = score.sum(1), score.sum(0)
    assert lists(select_from_marginals(*sums, *k, alignment)) == select_marginal_ref(
        *sums, *k, alignment
    )


def best_of_all(score: np.ndarray, k: tuple[int, int], alignment: int) -> float:
    """The largest block sum of any aligned subnet, by trying them all."""
    choices = []
    for size, chosen in zip(score.shape, k, strict=True):
        runs = combinations(range(size // alignment), chosen // alignment)
        every = [[r * alignment + i for r in picked for i in range(alignment)] for picked in runs]
        choices.append([list(range(size))] if chosen == size else every)
    return max(block_sum(score, out_idx, in_idx) for out_idx in choices[0] for in_idx in choices[1])


@thorough
@given(data=st.data())
def test_between_the_choice_by_sums_and_the_best_of_all(data):
    score, k = score_and_sizes(data, 8, 2)
    table = score.numpy().astype(np.float64)
    found = block_sum(table, *lists(select_subnet(score, *k, 2)))
    assert found <= best_of_all(table, k, 2)
    assert found >= block_sum(
        table, *lists(select_from_marginals(score.sum(1), score.sum(0), *k, 2))
    )


def test_a_run_is_judged_by_its_sum():
    """The largest single neuron does not win, and what is left past the last whole run is never
    chosen."""
    score = torch.diag(torch.tensor([5.0, 0, 3, 3, 99]))
    assert lists(select_subnet(score, 2, 2, 2)) == ([2, 3], [2, 3])
    assert lists(select_subnet(score, 5, 2, 2)) == ([0, 1, 2, 3, 4], [2, 3])


def test_sizes_of_no_whole_runs_are_errors():
    with pytest.raises(ValueError, match="3 of 8 neurons are no whole number of runs of 2"):
        select_subnet(torch.rand(8, 8), 4, 3, 2)


@pytest.mark.parametrize(
    ("factor", "features", "k"),
    [
        (1 / 8, 4096, 512),
        (1 / 8, 11008, 1376),
        (0.3, 100, 16),
        (0.5, 50, 16),
        (1, 50, 50),
        (0.99, 64, 48),
    ],
)
def test_size_is_truncated_to_whole_runs_unless_it_is_all(factor, features, k):
    assert subnet_size(factor, features, "layer", 16) == k


@pytest.mark.parametrize(
    ("factor", "features", "least"), [(1 / 8, 64, "16/64"), (0.9, 12, "12/12")]
)
def test_a_factor_without_one_run_is_an_error(factor, features, least):
    with pytest.raises(
        ValueError,
        match=rf"q_proj: a rank factor of {factor} selects none of {features} neurons in "
        rf"runs of 16; use at least {least} or a smaller alignment",
    ):
        LoSiALinear.from_linear(nn.Linear(features, 128), factor, name="q_proj", alignment=16)


@thorough
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_random_subnets_are_runs(n_out, n_in, alignment, seed):
    shape = tuple(size // alignment * alignment or size for size in (n_out // 2, n_in))
    if not all(shape) or shape[0] % alignment:
        return
    subnet = Subnet.random((n_out, n_in), shape, torch.Generator().manual_seed(seed), alignment)
    subnet.check((n_out, n_in), "layer", alignment)
    assert subnet.shape == shape


BAD = {
    "a run from no multiple": [1, 2, 4, 5],
    "half a run": [0, 2, 4, 5],
    "no whole number of runs": [0, 1, 2],
}


@pytest.mark.parametrize("idx", BAD.values(), ids=BAD)
@pytest.mark.parametrize("side", ["out_idx", "in_idx"])
def test_indices_that_are_no_runs_are_refused(idx, side):
    good = torch.tensor([0, 1, 6, 7])
    indices = {"out_idx": good, "in_idx": good, side: torch.tensor(idx)}
    Subnet(**indices).check((8, 8), "up_proj")
    with pytest.raises(
        ValueError, match=f"up_proj: {side} must be runs of 2 neighbours, each from a multiple of 2"
    ):
        Subnet(**indices).check((8, 8), "up_proj", 2)


def test_the_layer_refuses_a_move_and_a_checkpoint_that_its_kernels_would_misread():
    layer = LoSiALinear(16, 16, rank_factor=0.25, alignment=2)
    runs, others = torch.tensor([0, 1, 4, 5]), torch.tensor([0, 2, 4, 5])
    layer.set_subnet_(runs, runs)
    with pytest.raises(ValueError, match="in_idx must be runs of 2"):
        layer.set_subnet_(runs, others)
    with pytest.raises(ValueError, match="out_idx must be runs of 2"):
        layer.load_state_dict({**layer.state_dict(), "out_idx": others})
    assert layer.out_idx.tolist() == [0, 1, 4, 5]


class TinyLM(nn.Module):
    """An embedding, two blocks of one linear, and an output layer of 25 tokens: 24 of them in whole
    runs."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(25, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.lm_head = nn.Linear(16, 25, bias=False)

    def forward(self, tokens):
        hidden = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        return self.lm_head(hidden)


def test_a_model_keeps_to_runs_from_the_first_draw_on():
    torch.manual_seed(0)
    config = paper(rank_factor=0.5, output_dim_factor=0.4, alignment=4, fused_loss=False)
    model = apply_losia(TinyLM(), config, output_layer="lm_head")
    layers = dict(losia_layers(model))

    def check() -> None:
        for name, layer in layers.items():
            layer.current_subnet.check((layer.out_features, layer.in_features), name, 4)

    check()
    assert tuple(layers["lm_head"].subnet.shape) == (8, 16) and layers["lm_head"].alignment == 4
    drawn = {name: layer.out_idx.clone() for name, layer in layers.items()}
    tokens = torch.randint(25, (3, 7))
    calibrate(model, [tokens], loss_fn=lambda model, x: model(x).logsumexp(-1).mean())
    check()
    assert any(not torch.equal(drawn[name], layer.out_idx) for name, layer in layers.items())
    start_from_frequency(model, [{"labels": torch.tensor([[3, 3, 9, 9, 9, 24, 24, 24, 24]])}])
    check()
    assert {3, 9} <= set(layers["lm_head"].out_idx.tolist())
    assert 24 not in layers["lm_head"].out_idx.tolist()  # past the last whole run


def test_the_update_is_told_of_runs(monkeypatch):
    """Of every layer its own: a side taken whole is one run, whatever the config's are."""
    given = []
    monkeypatch.setattr(optimizer, "update_subnets_", lambda updates, *rates: given.extend(updates))
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    config = paper(target_modules=["0", "1"], alignment=4, rank_pattern={"1": (0.5, 1.0)})
    apply_losia(model, config)
    stepper = LoSiAAdamW(model, lr=1e-3)
    model(torch.randn(3, 64)).sum().backward()
    stepper.step()
    found = {update.weight.shape[1]: update.alignment for update in given}
    assert found == {64: 4, 32: 32}
