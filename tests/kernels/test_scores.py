import pytest
import torch

from csrc_ref.scores import score_marginals_ref
from losia_kernels.ops.scores import score_marginals_plain
from tests.kernels.updates import choose
from tests.tolerance import assert_within

SHAPES = [(1, 1), (1, 7), (13, 1), (37, 53), (5, 300), (67, 131)]
DTYPES = [torch.float32, torch.bfloat16]


def launch(*args):
    from losia_kernels.kernels.scores import launch_score_marginals

    return launch_score_marginals(*args)


def make_state(shape, dtype, device):
    torch.manual_seed(0)
    return [torch.rand(shape, device=device).to(dtype) for _ in range(2)]


def check(*args):
    expected = score_marginals_plain(*args)
    truth = score_marginals_ref(*(None if arg is None else arg.cpu() for arg in args))
    for kernel, plain, exact in zip(launch(*args), expected, truth, strict=True):
        assert_within(kernel, plain, exact)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_uncertainty", [True, False])
def test_whole_matrix(device, shape, dtype, with_uncertainty):
    importance, uncertainty = make_state(shape, dtype, device)
    check(importance, uncertainty if with_uncertainty else None, None, None)


@pytest.mark.parametrize("k_out, k_in", [(9, 17), (1, 1), (67, 131), (9, None), (None, 17), (0, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_restricted(device, dtype, k_out, k_in):
    state = make_state((67, 131), dtype, device)
    check(
        *state,
        *(None if k is None else choose(size, k, device) for size, k in ((67, k_out), (131, k_in))),
    )


def test_any_strides(device):
    importance, uncertainty = make_state((37, 53), torch.bfloat16, device)
    importance = importance.T.contiguous().T
    uncertainty = torch.stack([uncertainty, -uncertainty], dim=-1)[..., 0]
    out_idx, in_idx = (
        torch.stack([choose(37, 8, device)] * 2, dim=-1)[:, 0],
        choose(53, 20, device)[::2],
    )
    check(importance, uncertainty, out_idx, in_idx)


def test_inputs_are_left_alone(device):
    args = [
        *make_state((37, 53), torch.float32, device),
        choose(37, 5, device),
        choose(53, 6, device),
    ]
    before = [arg.clone() for arg in args]
    launch(*args)
    assert all(torch.equal(arg, old) for arg, old in zip(args, before, strict=True))


def test_deterministic(device):
    args = [*make_state((67, 131), torch.float32, device), None, choose(131, 60, device)]
    assert all(
        torch.equal(first, second)
        for first, second in zip(launch(*args), launch(*args), strict=True)
    )


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_matrix(device, shape):
    out_sums, in_sums = launch(*make_state(shape, torch.float32, device), None, None)
    assert torch.equal(out_sums, torch.zeros(shape[0], device=device))
    assert torch.equal(in_sums, torch.zeros(shape[1], device=device))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_score_shows_where_it_counts(device, bad):
    """Entry (4, 50) is not finite: it must show in every sum that contains it and in no other."""
    importance, uncertainty = make_state((37, 53), torch.float32, device)
    uncertainty[4, 50] = bad
    with_it, without_it = (torch.tensor(idx, device=device) for idx in ([4, 9, 50], [3, 9]))
    outs, ins = with_it[:2], with_it[1:]
    for out_idx, in_idx, shown_out, shown_in in (
        (None, None, [[4]], [[50]]),
        (outs, ins, [[4]], [[50]]),
        (without_it, ins, [[4]], []),
        (outs, without_it, [], [[50]]),
        (without_it, without_it, [], []),
    ):
        out_sums, in_sums = launch(importance, uncertainty, out_idx, in_idx)
        assert (~out_sums.isfinite()).nonzero().tolist() == shown_out
        assert (~in_sums.isfinite()).nonzero().tolist() == shown_in


def test_offsets_past_two_to_the_31(device, sparse_zeros):
    apart = sparse_zeros(2**31 + 16 + 5).view(torch.bfloat16).as_strided((3, 5), (2**30 + 8, 1))
    beside = torch.rand(3, 5, device=device).bfloat16()
    apart.copy_(torch.rand(3, 5))
    chosen = torch.tensor([0, 2], device=device), torch.tensor([1, 4], device=device)
    check(apart, beside, *chosen)
    check(beside, apart, *chosen)
