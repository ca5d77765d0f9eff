"""Subnet: sizes, checks that name the layer, the block it cuts out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losia_kernels import LoSiALinear, Subnet, apply_losia
from losia_kernels.layers.subnet import subnet_size
from losia_kernels.training.adam_state import AdamState
from tests.tiny import paper, same_tensors, tiny_lm

GOOD = torch.tensor([0, 2, 3])


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 3000), st.data())
def test_a_factor_of_k_over_n_selects_k_of_n(features, data):
    """Truncation, but not of rounding noise: 1/49 * 49 is 0.999..., 0.29 * 100 is 28.999..."""
    k = data.draw(st.integers(1, features))
    assert subnet_size(k / features, features, "layer") == k


@pytest.mark.parametrize(
    ("factor", "features", "k"), [(1 / 8, 4096, 512), (0.99, 10, 9), (0.3, 10, 3), (1, 7, 7)]
)
def test_size_is_truncated(factor, features, k):
    assert subnet_size(factor, features, "layer") == k


@pytest.mark.parametrize("factor", [0, -0.5, 1.0001, float("nan")])
def test_a_factor_out_of_range_is_an_error(factor):
    with pytest.raises(ValueError, match=r"layer7: the rank factor must be in \(0, 1\]"):
        subnet_size(factor, 8, "layer7")


@pytest.mark.parametrize("shape", [(7, 64), (64, 7)])
def test_an_empty_subnet_is_an_error(shape):
    with pytest.raises(
        ValueError,
        match="q_proj: a rank factor of 0.125 selects none of 7 neurons; use at least 1/7",
    ):
        LoSiALinear.from_linear(torch.nn.Linear(*shape), 1 / 8, name="q_proj")


BAD = {
    "too large": (torch.tensor([0, 2, 5]), r"must be in \[0, 5\), got values from 0 to 5"),
    "negative": (torch.tensor([-1, 0, 2]), r"must be in \[0, 5\), got values from -1 to 2"),
    "unsorted": (torch.tensor([2, 0, 3]), "sorted and without repeats"),
    "repeated": (torch.tensor([0, 2, 2]), "sorted and without repeats"),
    "int32": (GOOD.int(), "1-D int64 tensor, got .* torch.int32"),
    "float": (GOOD.float(), "1-D int64 tensor, got .* torch.float32"),
    "bool mask": (torch.tensor([True, False, True]), "1-D int64 tensor, got .* torch.bool"),
    "2-D": (GOOD[None], r"1-D int64 tensor, got \(1, 3\)"),
    "0-D": (torch.tensor(1), r"1-D int64 tensor, got \(\)"),
    "empty": (GOOD[:0], "is empty"),
}


@pytest.mark.parametrize("side", ["out_idx", "in_idx"])
@pytest.mark.parametrize(("idx", "message"), BAD.values(), ids=BAD.keys())
def test_bad_indices_are_refused_by_layer_and_side(side, idx, message):
    subnet = Subnet(idx, GOOD) if side == "out_idx" else Subnet(GOOD, idx)
    with pytest.raises(ValueError, match=rf"^layers\.3\.q: {side}.*{message}"):
        subnet.check((5, 5), "layers.3.q")


def test_each_side_is_checked_against_its_own_size():
    Subnet(torch.tensor([6]), torch.tensor([2])).check((7, 3), "layer")
    with pytest.raises(ValueError, match="in_idx"):
        Subnet(torch.tensor([2]), torch.tensor([6])).check((7, 3), "layer")


def test_gather_is_a_copy_of_the_block():
    weight = torch.arange(12.0).view(3, 4)
    subnet = Subnet(torch.tensor([0, 2]), torch.tensor([1, 3]))
    block = subnet.gather(weight)
    assert block.tolist() == [[1, 3], [9, 11]] and subnet.shape == (2, 2)
    block.zero_()
    assert weight[0, 1] == 1


def test_overlap_is_the_share_of_common_weights():
    subnet = Subnet(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1]))
    assert subnet.overlap(subnet) == 1
    assert subnet.overlap(Subnet(torch.tensor([3, 7, 8, 9]), torch.tensor([1, 5]))) == 1 / 8
    assert subnet.overlap(Subnet(torch.tensor([0, 1, 2, 3]), torch.tensor([2, 3]))) == 0


@settings(derandomize=True, deadline=None)
@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.data(), st.integers(0, 2**31))
def test_random_subnets_are_valid_and_repeat_with_the_seed(features, data, seed):
    shape = tuple(data.draw(st.integers(1, size)) for size in features)
    first, again = (
        Subnet.random(features, shape, torch.Generator().manual_seed(seed)) for _ in range(2)
    )
    first.check(features, "layer")
    assert first.shape == shape
    assert torch.equal(first.out_idx, again.out_idx) and torch.equal(first.in_idx, again.in_idx)


def test_random_sides_are_independent_and_uniform():
    generator = torch.Generator().manual_seed(0)
    draws = [Subnet.random((8, 8), (2, 2), generator) for _ in range(2000)]
    assert sum(torch.equal(d.out_idx, d.in_idx) for d in draws) < 200  # 1/28 of them by chance
    for side in ("out_idx", "in_idx"):
        counts = torch.cat([getattr(draw, side) for draw in draws]).bincount(minlength=8)
        assert (counts - 500).abs().max() < 100  # 5 standard deviations


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_torchs_defaults_are_not_asked(device):
    expected = apply_losia(tiny_lm(), paper(rank_factor=0.5)).state_dict()
    model = tiny_lm()
    torch.set_default_device(device)
    torch.set_default_dtype(torch.bfloat16)
    try:
        apply_losia(model, paper(rank_factor=0.5))
        state = AdamState().make(model.model.layers[0].up_proj.subnet)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert same_tensors(model.state_dict(), expected)
    # bfloat16 counts to 256
    assert state["step"].dtype == torch.float32 and state["step"].device.type == "cpu"
