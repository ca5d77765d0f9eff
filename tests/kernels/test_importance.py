import pytest
import torch

from csrc_ref.importance import importance_marginals_ref, importance_update_ref
from losia_kernels.kernels.launch import override_config
from losia_kernels.ops.importance import KINDS, importance_marginals_plain, importance_update_plain_
from tests.kernels.offline import run_offline
from tests.tolerance import assert_within

SHAPES = [(1, 1), (1, 7), (13, 1), (37, 53), (5, 300), (67, 131)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def launch_update(*args):
    from losia_kernels.kernels.importance import launch_importance_update_

    launch_importance_update_(*args)


def launch_marginals(*args):
    from losia_kernels.kernels.importance import launch_importance_marginals

    return launch_importance_marginals(*args)


def make_args(shape, device, dtype=torch.float32, state_dtype=torch.float32, grad_dtype=None):
    """importance, uncertainty, weight, grad, all ``[out, in]``, in the middle of a slot."""
    torch.manual_seed(0)
    state = [torch.rand(shape, device=device).to(state_dtype) for _ in range(2)]
    weight, grad = (torch.randn(shape, device=device) for _ in range(2))
    return [*state, weight.to(dtype), grad.to(grad_dtype or dtype)]


def check_update(args, kind="sensitivity", grad_scale=0.5, beta1=0.85, beta2=0.7):
    """One update by the kernel, in place on ``args``, held to float64 by the tolerance rule."""
    scalars = (beta1, beta2, kind, grad_scale)
    before = [arg.clone() for arg in args]
    expected = [arg.clone() for arg in args]
    truth = importance_update_ref(*(arg.cpu() for arg in args), *scalars)
    importance_update_plain_(*expected, *scalars)
    launch_update(*args, *scalars)
    for kernel, plain, exact in zip(args[:2], expected[:2], truth, strict=True):
        assert_within(kernel, plain, exact)
    assert torch.equal(args[2], before[2]) and torch.equal(args[3], before[3])


def check_marginals(weight, grad, kind="sensitivity", grad_scale=0.5):
    truth = importance_marginals_ref(weight.cpu(), grad.cpu(), kind, grad_scale)
    expected = importance_marginals_plain(weight, grad, kind, grad_scale)
    # numpy adds the outputs of a tile one after the other, a GPU in a tree: short tiles keep the
    # two alike.
    tile = {"block_out": 16} if weight.device.type == "cpu" else {}
    with override_config("importance_marginals", **tile):
        sums = launch_marginals(weight, grad, kind, grad_scale)
    for kernel, plain, exact in zip(sums, expected, truth, strict=True):
        assert_within(kernel, plain, exact)


def framed(tensor):
    """``tensor`` as a view, transposed and of stride 2, into a larger tensor of sevens -> (view,
    frame)."""
    size_out, size_in = tensor.shape
    frame = torch.full((size_in, 2 * size_out + 1), 7.0, dtype=tensor.dtype, device=tensor.device)
    view = frame[:, 1::2].T
    return view.copy_(tensor), frame


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_update(device, shape, dtype, state_dtype):
    check_update(make_args(shape, device, dtype, state_dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_marginals(device, shape, dtype):
    check_marginals(*make_args(shape, device, dtype)[2:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad_scale", [1.0, 0.125, 3.0])
def test_kinds(device, kind, grad_scale):
    args = make_args((37, 53), device, torch.bfloat16)
    check_marginals(*args[2:], kind, grad_scale)
    check_update(args, kind, grad_scale)


@pytest.mark.parametrize(
    "dtype, grad_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
)
def test_gradient_of_another_dtype(device, dtype, grad_dtype):
    args = make_args((37, 53), device, dtype, grad_dtype=grad_dtype)
    check_marginals(*args[2:])
    check_update(args)


@pytest.mark.parametrize("strided", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)])
def test_any_strides(device, strided):
    args, frames = make_args((37, 53), device, torch.bfloat16, torch.bfloat16), []
    for i in strided:
        args[i], frame = framed(args[i])
        frames.append(frame)
    check_marginals(*args[2:])
    check_update(args)
    for frame in frames:
        frame[:, 1::2] = 7.0
        assert (frame == 7.0).all()


def test_broadcast_gradient(device):
    args = make_args((37, 53), device)
    args[3] = args[3][:1].expand(37, 53)
    check_marginals(*args[2:])
    check_update(args)


def test_slot_from_zero(device):
    """Three micro-batches: the second and third update read what the first wrote."""
    args = make_args((13, 29), device, torch.bfloat16)
    kernel = [torch.zeros(13, 29, device=device) for _ in range(2)]
    plain, truth = [state.clone() for state in kernel], [state.cpu().double() for state in kernel]
    for micro_batch in range(3):
        grad = args[3] * (micro_batch + 1)
        launch_update(*kernel, args[2], grad, 0.85, 0.85, "sensitivity", 1.0)
        importance_update_plain_(*plain, args[2], grad, 0.85, 0.85, "sensitivity", 1.0)
        truth = importance_update_ref(*truth, args[2].cpu(), grad.cpu(), 0.85, 0.85)
    for index in range(2):
        assert_within(kernel[index], plain[index], truth[index])


def test_deterministic(device):
    args = make_args((67, 131), device, torch.bfloat16)
    first, second = (launch_marginals(*args[2:], "sensitivity", 1.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_matrix(device, shape):
    args = make_args(shape, device)
    launch_update(*args, 0.85, 0.85, "sensitivity", 1.0)
    out_sums, in_sums = launch_marginals(*args[2:], "sensitivity", 1.0)
    assert torch.equal(out_sums, torch.zeros(shape[0], device=device))
    assert torch.equal(in_sums, torch.zeros(shape[1], device=device))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_sums_and_leaves_the_state_alone(device, bad):
    args = make_args((37, 53), device, torch.bfloat16, torch.bfloat16)
    args[3][4, 50] = bad
    out_sums, in_sums = launch_marginals(*args[2:], "sensitivity", 1.0)
    assert (~out_sums.isfinite()).nonzero().tolist() == [[4]] and (
        ~in_sums.isfinite()
    ).nonzero().tolist() == [[50]]
    scalars = (0.85, 0.85, "sensitivity", 1.0)
    truth = importance_update_ref(*(arg.cpu() for arg in args), *scalars)
    plain = [arg.clone() for arg in args]
    before = [state[4, 50].clone() for state in args[:2]]
    importance_update_plain_(*plain, *scalars)
    launch_update(*args, *scalars)
    for state, expected, exact, old in zip(args, plain, truth, before, strict=False):
        assert_within(state, expected, exact)
        assert state[4, 50] == expected[4, 50] == exact[4, 50] == old


@pytest.mark.slow
@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_contiguous_tensors_move_in_vectors(state):
    """Every access of the update to memory is 8 or 16 bytes wide when all four tensors are
    contiguous."""
    script = f"""
import re
from tests.kernels.compile_cases import importance_update, torch
from bench.harness.machine_code import launches

(kernel,) = launches("sm_90", lambda: importance_update(torch.bfloat16, torch.{state}))
print(*sorted(set(re.findall(r"(?:ld|st)\\.global[.a-z]*\\.(v\\d\\.\\w+|\\w+)", kernel.asm["ptx"]))))
"""
    accesses = set(run_offline("-c", script).split())
    assert accesses and accesses <= {"v2.b32", "v4.b32", "v2.b64"}, accesses


def test_offsets_past_two_to_the_31(device, sparse_zeros):
    """A row starts 2^30 entries after the one before, in each tensor in turn."""
    shape, apart = (3, 5), (2**30 + 8, 1)
    for far in range(4):
        args = make_args(shape, device, torch.bfloat16, torch.bfloat16)
        view = sparse_zeros(2**31 + 16 + 5).view(torch.bfloat16).as_strided(shape, apart)
        args[far] = view.copy_(args[far])
        check_marginals(*args[2:])
        check_update(args)
