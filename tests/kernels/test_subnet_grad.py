import pytest
import torch

from csrc_ref.subnet_grad import subnet_grad_ref
from losia_kernels.kernels.launch import launch_config, override_config
from losia_kernels.kernels.subnet_grad import VARIANTS, launch_partials, launch_subnet_grad
from losia_kernels.ops.subnet_grad import subnet_grad_plain
from tests.kernels.updates import choose
from tests.tolerance import assert_within

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True, params=VARIANTS)
def variant(request):
    """Every test of this file holds for every form."""
    with override_config("subnet_grad", variant=request.param):
        yield request.param


def aligned_index(n: int, k: int, alignment: int, device: str) -> torch.Tensor:
    """Runs of ``alignment`` neighbours, each from a multiple of it."""
    starts = choose(n // alignment, k // alignment, device) * alignment
    return (starts[:, None] + torch.arange(alignment, device=device)).flatten()


def partials_of(dy, x, out_idx, in_idx) -> torch.Tensor:
    k_out = dy.shape[-1] if out_idx is None else len(out_idx)
    k_in = x.shape[-1] if in_idx is None else len(in_idx)
    config = launch_config("subnet_grad", dy, tokens=len(dy), n_out=k_out, n_in=k_in)
    return launch_partials(dy, x, out_idx, in_idx, 1, config)[:, :k_out, :k_in]


def check(
    dy: torch.Tensor,
    x: torch.Tensor,
    out_idx: torch.Tensor | None,
    in_idx: torch.Tensor | None,
    alignment: int = 1,
) -> None:
    result = launch_subnet_grad(dy, x, out_idx, in_idx, alignment)
    plain = subnet_grad_plain(dy, x, out_idx, in_idx)
    assert_within(result, plain, subnet_grad_ref(dy, x, out_idx, in_idx))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens, n_out, k_out, n_in, k_in",
    [
        (1, 1, 1, 1, 1),
        (7, 13, 1, 11, 1),
        (7, 13, 13, 11, 11),
        (67, 31, 7, 29, 19),
        (5, 139, 131, 151, 137),
        (131, 40, 16, 40, 16),
    ],
)
def test_matches_oracle(device, dtype, tokens, n_out, k_out, n_in, k_in):
    dy = torch.randn(tokens, n_out, device=device).to(dtype)
    x = torch.randn(tokens, n_in, device=device).to(dtype)
    out_idx, in_idx = choose(n_out, k_out, device), choose(n_in, k_in, device)
    check(dy, x, out_idx, in_idx)
    check(dy, x[:, in_idx], out_idx, None)
    check(dy, x, None, in_idx)
    check(dy, x, None, None)


def test_the_longer_side_may_be_either(device):
    """Where both sides are gathered the kernel works on the transpose if that has fewer inputs."""
    dy, x = torch.randn(37, 90, device=device), torch.randn(37, 64, device=device)
    for k_out, k_in in ((5, 19), (19, 5), (1, 64)):
        idx = choose(90, k_out, device), choose(64, k_in, device)
        check(dy, x, *idx)
        assert launch_subnet_grad(dy, x, *idx).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alignment", [2, 16])
def test_runs_of_neighbours(device, dtype, alignment):
    dy, x = (
        torch.randn(37, 90, device=device).to(dtype),
        torch.randn(37, 64, device=device).to(dtype),
    )
    out_idx, in_idx = (
        aligned_index(90, 32, alignment, device),
        aligned_index(64, 48, alignment, device),
    )
    check(dy, x, out_idx, in_idx, alignment)
    check(dy, x[:, in_idx], out_idx, None, alignment)
    check(dy, x, None, in_idx, alignment)
    # neurons that lie next to each other, but not in memory
    check(dy.T.contiguous().T, x, out_idx, in_idx, alignment)


def test_the_index_of_a_run_is_that_of_its_start(device):
    """Only starts are read: the caller answers for the rest, so that no launch has to look."""
    dy, x = torch.randn(5, 8, device=device), torch.randn(5, 3, device=device)
    starts_only = torch.tensor([4, 0, 0, 0], device=device)
    full = torch.tensor([4, 5, 6, 7], device=device)
    assert torch.equal(
        launch_subnet_grad(dy, x, starts_only, None, 4), launch_subnet_grad(dy, x, full, None, 4)
    )


def test_any_strides(device):
    tokens, n_out, n_in = 12, 17, 23
    out_idx, in_idx = choose(n_out, 5, device), choose(n_in, 7, device)
    dy, x = torch.randn(tokens, n_out, device=device), torch.randn(tokens, n_in, device=device)
    check(torch.randn(n_out, tokens, device=device).T, x, out_idx, in_idx)  # transposed dy
    # transposed x with gaps
    check(dy, torch.randn(n_in, 2 * tokens, device=device)[:, ::2].T, out_idx, in_idx)
    # dy with gaps, not aligned
    check(torch.randn(tokens, 3 * n_out, device=device)[:, 1::3], x, out_idx, in_idx)
    check(torch.randn((), device=device).expand(tokens, n_out), x, out_idx, in_idx)  # dy of y.sum()
    check(dy.view(3, 4, n_out), x.view(3, 4, n_in), out_idx, in_idx)  # leading dimensions
    across = torch.randn(4, 3, n_out, device=device).transpose(0, 1)  # ... without a common stride
    check(across, x.view(3, 4, n_in), out_idx, in_idx)
    check(dy, x, out_idx[::2], in_idx[1::2])  # strided indices


def test_offsets_past_two_to_the_31(device, sparse_zeros):
    tokens_apart = sparse_zeros(2**31 + 16 + 5).as_strided((3, 5), (2**30 + 8, 1))
    tokens_apart.copy_(torch.randn(3, 5))
    beside = torch.randn(3, 7, device=device).half()
    check(tokens_apart, beside, torch.tensor([0, 3, 4], device=device), None)
    check(beside, tokens_apart, None, torch.tensor([1, 4], device=device))
    check(
        tokens_apart.T,
        torch.randn(5, 7, device=device).half(),
        torch.tensor([0, 2], device=device),
        None,
    )


@pytest.mark.parametrize("variant", ["fused"], indirect=True)
def test_128k_tokens(device):
    """One long context, with a last tile that is not full; in large tiles where they are
    interpreted one by one.

    Of whole numbers float32 holds every sum exactly, whatever the order and the unit.
    """
    tokens = 2**17 + 5
    dy, x = (torch.randint(-3, 4, (tokens, n), device=device).bfloat16() for n in (64, 17))
    out_idx = choose(64, 32, device)
    with override_config("subnet_grad", **{"block_t": 8192} if device == "cpu" else {}):
        result = launch_subnet_grad(dy, x, out_idx, None)
    assert torch.equal(result.double().cpu(), subnet_grad_ref(dy, x, out_idx, None).cpu())


def test_no_tokens_give_zeros(device):
    dy, x = torch.randn(2, 0, 9, device=device), torch.randn(2, 0, 11, device=device)
    grad = launch_subnet_grad(dy, x, choose(9, 4, device), None)
    assert torch.equal(grad, torch.zeros(4, 11, device=device))


def test_what_lies_beyond_the_tokens_is_not_read(device):
    """Masked lanes must not meet a NaN: zero times NaN is NaN."""
    dy = torch.full((16, 5), torch.nan, device=device)
    x = torch.full((16, 6), torch.nan, device=device)
    dy[:3], x[:3] = 1.0, 2.0
    assert torch.equal(
        launch_subnet_grad(dy[:3], x[:3], None, None), torch.full((5, 6), 6.0, device=device)
    )


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "gathered_library"], indirect=True)
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("prefetch", [False, True])
def test_splits_are_sums_over_ranges_of_tokens(device, splits, prefetch):
    """Also when the tokens do not divide evenly, and when a split gets none."""
    dy, x = torch.randn(53, 19, device=device), torch.randn(53, 21, device=device)
    out_idx, in_idx = choose(19, 6, device), choose(21, 8, device)
    with override_config(
        "subnet_grad", splits=splits, prefetch=prefetch, block_t=16, block_out=16, block_in=16
    ):
        partials = partials_of(dy, x, out_idx, in_idx)
        check(dy, x, out_idx, in_idx)
    assert partials.shape[0] == splits
    per_split = -(-53 // (splits * 16)) * 16
    for split in range(splits):
        part = slice(split * per_split, (split + 1) * per_split)
        truth = subnet_grad_ref(dy[part], x[part], out_idx, in_idx)
        assert_within(
            partials[split],
            subnet_grad_plain(dy[part], x[part], out_idx, in_idx),
            truth,
        )


def test_same_bits_twice(device, variant):
    dy, x = (
        torch.randn(200, 33, device=device).bfloat16(),
        torch.randn(200, 35, device=device).bfloat16(),
    )
    out_idx = choose(33, 17, device)
    with override_config("subnet_grad", splits=1 if variant == "gathered_library" else 4):
        first, second = (launch_subnet_grad(dy, x, out_idx, None) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("tokens, k_out, k_in", [(0, 3, 4), (1, 1, 1), (700, 3, 5), (520, 40, 20)])
def test_the_ranges_of_tokens_are_one_matrix(device, tokens, k_out, k_in):
    dy, x = torch.zeros(tokens, k_out, device=device), torch.zeros(tokens, k_in, device=device)
    partials = partials_of(dy, x, None, None)
    assert partials.shape[1:] == launch_subnet_grad(dy, x, None, None).shape == (k_out, k_in)
    assert len(partials) == 1 or tokens // len(partials) >= 256


def test_float32_keeps_all_its_bits(device):
    """TF32 would lose the difference between 1 and 1 + 2^-12."""
    dy = torch.full((4, 16), 1 + 2**-12, device=device)
    x = torch.ones(4, 16, device=device)
    assert torch.equal(
        launch_subnet_grad(dy, x, None, None),
        torch.full((16, 16), 4 + 2**-10, device=device),
    )


@pytest.mark.parametrize("k_out, k_in", [(7, 19), (72, 72), (17, 257)])
def test_rows_that_are_filled_up_give_the_bits_of_rows_that_are_not(device, k_out, k_in):
    """What fills them is read, and is NaN here: nothing of it may reach a value that counts."""
    dy = torch.randn(67, 300, device=device).bfloat16()
    width = -(-k_in // 16) * 16
    rows = torch.full((67, width), torch.nan, device=device).bfloat16()
    x = rows[:, :k_in]
    x.copy_(torch.randn(67, k_in, device=device))
    out_idx = choose(300, k_out, device)
    filled = launch_subnet_grad(dy, x, out_idx, None)
    assert filled.is_contiguous() and filled.shape == (k_out, k_in)
    check(dy, x, out_idx, None)
    assert torch.equal(filled, launch_subnet_grad(dy, x.contiguous(), out_idx, None))
    in_rows = torch.full((67, 304), torch.nan, device=device).bfloat16()
    in_rows[:, :k_out].copy_(dy[:, out_idx])
    check(in_rows[:, :k_out], x, None, None)
    # the last row ends with the memory: there is nothing behind it to read
    end = torch.randn(67 * width - (width - k_in), device=device).bfloat16()
    check(dy, end.as_strided((67, k_in), (width, 1)), out_idx, None)


@pytest.mark.gpu
def test_the_same_bits_in_a_hundred_runs(variant):
    dy, x = (torch.randn(8192, n, device="cuda").bfloat16() for n in (1024, 512))
    out_idx = choose(1024, 409, "cuda")
    first = launch_subnet_grad(dy, x, out_idx, None)
    assert all(torch.equal(launch_subnet_grad(dy, x, out_idx, None), first) for _ in range(100))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k_out, k_in", [(512, 512), (64, 64), (1376, 512)])
def test_long_sums_beside_a_library_that_splits_them_further(dtype, k_out, k_in):
    """The allowance is twice the error of that library's product. Of float32 it may split the tokens
    into more ranges than we do, and err less: red here is then that, and no mistake of the kernel."""
    dy, x = (torch.randn(8192, n, device="cuda").to(dtype) for n in (2 * k_out, k_in))
    check(dy, x, choose(2 * k_out, k_out, "cuda"), None)
