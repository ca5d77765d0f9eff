import pytest
import torch

from csrc_ref.gather import gather_features_ref
from losia_kernels.kernels.gather import launch_gather_features
from losia_kernels.kernels.launch import override_config
from tests.kernels.updates import choose

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(x: torch.Tensor, idx: torch.Tensor, alignment: int = 1) -> None:
    """A copy is exact: bit for bit what the oracle picks, in rows that zeros fill up to a multiple
    of 16."""
    result = launch_gather_features(x, idx, alignment)
    assert result.dtype == x.dtype
    assert torch.equal(result, gather_features_ref(x, idx))
    k, rows = len(idx), x.shape[:-1].numel()
    width = -(-k // 16) * 16
    whole = result.as_strided((rows, width), (width, 1))
    assert not whole[:, k:].any() and whole[:, :k].equal(result.reshape(rows, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, k",
    [
        ((1, 1), 1),
        ((7, 13), 1),
        ((7, 13), 13),
        ((37, 101), 17),
        ((17, 300), 257),
        ((2, 5, 31), 8),
        ((2, 3, 2, 11), 5),
        ((19,), 4),
    ],
)
def test_matches_oracle(device, dtype, shape, k):
    x = torch.randn(shape, device=device).to(dtype)
    check(x, choose(shape[-1], k, device))


def test_any_strides(device):
    n, k = 23, 9
    idx = choose(n, k, device)
    base = torch.randn(2 * n, 40, device=device)
    check(base[:n].T, idx)  # transposed
    check(base[::2, :].T, idx)  # transposed, every second feature
    check(torch.randn(12, n, device=device)[::2], idx)  # every second token
    check(torch.randn(n, device=device).expand(4, 5, n), idx)  # one row for all tokens
    check(torch.randn(5, 1, device=device).expand(5, n), idx)  # one value for all features
    # leading dimensions without a common stride
    check(torch.randn(3, 4, n, device=device).transpose(0, 1), idx)
    # start that is not aligned
    check(torch.randn(6, 7, device=device)[:, 1:], choose(6, 3, device))


def test_index_may_be_strided_repeated_and_unsorted(device):
    x = torch.randn(5, 11, device=device)
    check(x, torch.tensor([7, 0, 7, 3, 10, 1], device=device)[::2])
    check(x, torch.tensor([10, 2, 2], device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alignment", [2, 4, 16])
def test_runs_of_neighbours(device, dtype, alignment):
    idx = (
        choose(96 // alignment, 48 // alignment, device)[:, None] * alignment
        + torch.arange(alignment, device=device)
    ).flatten()
    check(torch.randn(2, 9, 96, device=device).to(dtype), idx, alignment)
    # start that is not aligned
    check(torch.randn(7, 101, device=device).to(dtype)[:, 5:], idx, alignment)
    # neighbours are not next to each other
    check(torch.randn(96, 6, device=device).to(dtype).T, idx, alignment)


def test_empty(device):
    idx = choose(8, 3, device)
    assert launch_gather_features(torch.randn(0, 8, device=device), idx).shape == (0, 3)
    assert launch_gather_features(torch.randn(2, 0, 8, device=device), idx).shape == (2, 0, 3)
    assert launch_gather_features(torch.randn(4, 8, device=device), idx[:0]).shape == (4, 0)


def test_tiles_need_not_divide_the_shape(device):
    with override_config("gather_features", block_t=2, block_in=16):
        check(torch.randn(7, 41, device=device), choose(41, 33, device))


def test_offsets_past_two_to_the_31(device, sparse_zeros):
    n = 5
    tokens_apart = sparse_zeros(2**31 + 16 + n).as_strided((3, n), (2**30 + 8, 1))
    tokens_apart.copy_(torch.arange(3 * n).view(3, n))
    check(tokens_apart, torch.tensor([0, 3, 4], device=device))
    check(tokens_apart.T, torch.tensor([0, 2], device=device))
