"""What splits of the tokens have summed, added: in the order of the splits, whoever adds it and
whoever comes last."""

import itertools

import pytest
import torch
import triton.runtime.interpreter as interpreter

from csrc_ref.subnet_grad import subnet_grad_ref
from losia_kernels.kernels.launch import launch_config, override_config
from losia_kernels.kernels.subnet_grad import VARIANTS, launch_partials, launch_subnet_grad
from losia_kernels.kernels.sums import SUMS
from losia_kernels.ops.subnet_grad import subnet_grad_plain
from tests.kernels.updates import choose
from tests.tolerance import assert_within

OURS = [each for each in VARIANTS if each != "gathered_library"]
SMALL = {"block_t": 16, "block_out": 16, "block_in": 16}
SIZES = [  # (out, k_out), (in, k_in)
    ((19, 6), (21, 8)),
    ((40, 33), (48, 16)),
    ((64, 32), (40, 17)),
]


def operands(device, out, inner, tokens=120, dtype=torch.float32):
    torch.manual_seed(0)
    (n_out, k_out), (n_in, k_in) = out, inner
    dy, x = (torch.randn(tokens, n, device=device).to(dtype) for n in (n_out, n_in))
    return dy, x, choose(n_out, k_out, device), choose(n_in, k_in, device)


def in_order(dy, x, out_idx, in_idx) -> torch.Tensor:
    """The splits' sums, added one after the other."""
    config = launch_config("subnet_grad", dy)
    partials = launch_partials(dy, x, out_idx, in_idx, 1, config)
    k_out, k_in = (
        (out_idx if out_idx is not None else dy.T),
        (in_idx if in_idx is not None else x.T),
    )
    first, *rest = partials[:, : len(k_out), : len(k_in)]
    for each in rest:
        first = first + each
    return first


@pytest.mark.parametrize("sums", SUMS[1:])
@pytest.mark.parametrize("variant", OURS)
@pytest.mark.parametrize("out, inner", SIZES)
@pytest.mark.parametrize("splits", [2, 9])
def test_splits_are_added_in_order(device, sums, variant, out, inner, splits):
    """Also where a split has no tokens, and where the kernel works on the transposed gradient."""
    dy, x, out_idx, in_idx = operands(device, out, inner)
    fields = {"variant": variant, "splits": splits, **SMALL}
    for operand in ((dy, x[:, in_idx], out_idx, None), (dy, x, None, in_idx)):
        with override_config("subnet_grad", **fields):
            expected = in_order(*operand)
        with override_config("subnet_grad", sums=sums, **fields):
            found = launch_subnet_grad(*operand)
        assert torch.equal(found, expected) and found.is_contiguous()
    with override_config("subnet_grad", sums=sums, **fields):
        found = launch_subnet_grad(dy, x, out_idx, in_idx)
    assert found.is_contiguous()
    given = dy, x, out_idx, in_idx
    assert_within(found, subnet_grad_plain(*given), subnet_grad_ref(*given))


@pytest.mark.parametrize("variant", OURS)
def test_whoever_comes_last_adds_the_same_bits(device, variant, monkeypatch):
    if device != "cpu":
        pytest.skip("a GPU chooses the order by itself")
    dy, x, out_idx, in_idx = operands(device, (40, 33), (48, 20))
    fields = {"variant": variant, "splits": 4, "sums": "in_kernel", **SMALL}
    builder, found = interpreter.interpreter_builder, []
    set_grid_idx = builder.set_grid_idx
    for order in itertools.permutations(range(4)):

        def permuted(tile, split, z, order=order):
            tile = tile if order[0] % 2 else builder.grid_dim[0] - 1 - tile
            set_grid_idx(tile, order[split] if builder.grid_dim[1] == 4 else split, z)

        monkeypatch.setattr(builder, "set_grid_idx", permuted)
        with override_config("subnet_grad", **fields):
            found.append(launch_subnet_grad(dy, x, out_idx, in_idx))
    assert len(found) == 24 and not found[0].isnan().any()
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("sums", SUMS)
def test_one_split_needs_no_sum(device, sums):
    dy, x, out_idx, in_idx = operands(device, *SIZES[0])
    with override_config("subnet_grad", splits=1, **SMALL):
        expected = launch_subnet_grad(dy, x, out_idx, in_idx)
        with override_config("subnet_grad", sums=sums):
            assert torch.equal(launch_subnet_grad(dy, x, out_idx, in_idx), expected)


@pytest.mark.parametrize("sums", SUMS)
@pytest.mark.parametrize("tokens, k_out", [(0, 4), (9, 0)])
def test_nothing_to_add(device, sums, tokens, k_out):
    dy, x, out_idx, in_idx = operands(device, (19, k_out), (21, 5), tokens)
    with override_config("subnet_grad", splits=3, sums=sums, **SMALL):
        found = launch_subnet_grad(dy, x, out_idx, in_idx)
    assert torch.equal(found, torch.zeros(k_out, 5, device=device))


def test_an_unknown_way_of_adding_is_refused(device):
    dy, x, out_idx, in_idx = operands(device, *SIZES[0])
    with override_config("subnet_grad", splits=2, sums="atomic", **SMALL):
        with pytest.raises(ValueError, match="launch, dependent, in_kernel, not 'atomic'"):
            launch_subnet_grad(dy, x, out_idx, in_idx)


BIG = ((4096, 512), (512, 384))


def big() -> tuple:
    return operands("cuda", *BIG, tokens=8192, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("sums", SUMS)
def test_the_same_bits_in_a_hundred_runs_on_two_streams(sums):
    """Each stream adds with counters of its own, which begin at zero."""
    given, streams = big(), (torch.cuda.Stream(), torch.cuda.Stream())
    torch.cuda.synchronize()
    found = []
    with override_config("subnet_grad", sums=sums):
        for number in range(100):
            with torch.cuda.stream(streams[number % 2]):
                found.append(launch_subnet_grad(*given))
    torch.cuda.synchronize()
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.gpu
@pytest.mark.parametrize("sums", SUMS)
def test_replays_of_a_graph(sums):
    given = big()
    with override_config("subnet_grad", sums=sums):
        launch_subnet_grad(*given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = launch_subnet_grad(*given)
        for _ in range(3):
            given[0].normal_()
            graph.replay()
            assert torch.equal(captured, launch_subnet_grad(*given))


@pytest.mark.gpu
@pytest.mark.parametrize("sums", SUMS)
def test_compiled_with_graphs(sums):
    from losia_kernels import ops

    given = big()
    compiled = torch.compile(ops.subnet_grad, mode="reduce-overhead")
    with override_config("subnet_grad", sums=sums), torch.no_grad():
        for _ in range(4):
            given[0].normal_()
            assert torch.equal(compiled(*given), ops.subnet_grad(*given))
