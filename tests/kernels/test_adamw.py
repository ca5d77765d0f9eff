import pytest
import torch

from csrc_ref.kernels import subnet_adamw_ref
from losia_kernels.ops import eager
from tests.kernels.offline import run_offline
from tests.tolerance import assert_within

HYPER = {
    "lr": 0.01,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "step": 3,
    "seed": None,
}
PLAIN_STEP = {
    "beta1": 0.0,
    "beta2": 0.0,
    "eps": 0.0,
    "weight_decay": 0.0,
    "step": 1,
}  # subnet -= lr * sign(grad)
SHAPES = [  # (out, in), (k_out, k_in), splits; 0 splits: a finished 2-D gradient
    ((1, 1), (1, 1), 0),
    ((7, 13), (1, 1), 1),
    ((7, 13), (7, 13), 3),
    ((31, 37), (5, 11), 2),
    ((9, 600), (3, 509), 0),
    ((40, 24), (40, 3), 4),
]
MASTER, NEAREST, STOCHASTIC = "master", "nearest", "stochastic"


def launch(*args, **hyper):
    from losia_kernels.kernels.subnet_adamw import launch_subnet_adamw_

    launch_subnet_adamw_(*args, **hyper)


def choose(size: int, k: int, device: str) -> torch.Tensor:
    return torch.randperm(size)[:k].sort().values.to(device)


def make_args(size, k, splits, dtype, subnet_dtype, device):
    """weight, subnet, grad, exp_avg, exp_avg_sq, out_idx, in_idx as after a few steps."""
    torch.manual_seed(0)
    weight = torch.randn(size, device=device).to(dtype)
    out_idx, in_idx = choose(size[0], k[0], device), choose(size[1], k[1], device)
    subnet = weight[out_idx][:, in_idx].to(subnet_dtype)
    grad = torch.randn((splits, *k) if splits else k, device=device)
    exp_avg, exp_avg_sq = torch.randn(k, device=device) * 0.1, torch.rand(k, device=device)
    return [weight, subnet, grad, exp_avg, exp_avg_sq, out_idx, in_idx]


def clones(args):
    return [arg.clone() for arg in args]


def outside(weight, out_idx, in_idx):
    """The entries of ``weight`` that are not in the subnet."""
    inside = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    inside[out_idx[:, None], in_idx] = True
    return weight[~inside]


def check(args, hyper):
    """One step of the kernel on ``args``, in place, held to float64 by the tolerance rule."""
    truth = subnet_adamw_ref(
        *(arg.cpu() for arg in args), **{k: v for k, v in hyper.items() if k != "seed"}
    )
    before, expected = clones(args), clones(args)
    eager.subnet_adamw_(*expected, **hyper)
    launch(*args, **hyper)
    for name, kernel, plain, exact in zip(
        ("weight", "subnet", "exp_avg", "exp_avg_sq"),
        (args[0], args[1], args[3], args[4]),
        (expected[0], expected[1], expected[3], expected[4]),
        truth,
        strict=True,
    ):
        try:
            assert_within(kernel, plain, exact)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    assert torch.equal(outside(args[0], *args[5:]), outside(before[0], *args[5:]))
    assert all(torch.equal(args[i], before[i]) for i in (2, 5, 6))


@pytest.mark.parametrize("size, k, splits", SHAPES)
@pytest.mark.parametrize(
    "dtype, subnet",
    [
        (torch.float32, MASTER),
        (torch.bfloat16, MASTER),
        (torch.float16, MASTER),
        (torch.bfloat16, NEAREST),
        (torch.float16, NEAREST),
        (torch.bfloat16, STOCHASTIC),
        (torch.float16, STOCHASTIC),
    ],
)
def test_one_step(device, dtype, subnet, size, k, splits):
    hyper = {**HYPER, "seed": 5 if subnet == STOCHASTIC else None}
    check(
        make_args(size, k, splits, dtype, torch.float32 if subnet == MASTER else dtype, device),
        hyper,
    )


@pytest.mark.parametrize(
    "hyper", [{"step": 1}, {"beta1": 0.3}, {"eps": 0.1}, {"weight_decay": 0.0}, {"lr": 0.0}]
)
def test_other_hyperparameters(device, hyper):
    check(
        make_args((31, 37), (5, 11), 2, torch.bfloat16, torch.float32, device), {**HYPER, **hyper}
    )


def test_any_strides(device):
    args = make_args((31, 37), (5, 11), 2, torch.bfloat16, torch.float32, device)
    frame = torch.full((37, 70), 7.0, dtype=torch.bfloat16, device=device)
    frame[:, 1:63:2] = args[0].T
    args[0] = frame[:, 1:63:2].T  # [out, in], stride (2, 70)
    args[1] = args[1].T.contiguous().T
    args[2] = args[2].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    args[3] = torch.stack([args[3], args[3]], dim=-1)[..., 0]
    args[4] = args[4].T.contiguous().T
    args[5], args[6] = (torch.stack([idx, idx - 1], dim=-1)[:, 0] for idx in args[5:])
    check(args, HYPER)
    frame[:, 1:63:2] = 7.0
    assert (frame == 7.0).all()


def test_broadcast_gradient(device):
    args = make_args((31, 37), (5, 11), 0, torch.float32, torch.float32, device)
    args[2] = torch.randn(5, 1, device=device).expand(5, 11)
    check(args, HYPER)


@pytest.mark.parametrize("k", [(0, 4), (4, 0)])
def test_empty_subnet_changes_nothing(device, k):
    args = make_args((8, 8), k, 1, torch.bfloat16, torch.float32, device)
    before = clones(args)
    launch(*args, **HYPER)
    assert all(torch.equal(after, old) for after, old in zip(args, before, strict=True))


def test_follows_torch_adamw(device):
    """Eight steps of changing learning rate from zero moments, the whole weight being the
    subnet."""
    torch.manual_seed(0)
    start, grads = torch.randn(11, 19), torch.randn(8, 11, 19)

    def torch_adamw(dtype):
        param = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer = torch.optim.AdamW(
            [param], lr=1.0, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1
        )
        for step, grad in enumerate(grads, 1):
            optimizer.param_groups[0]["lr"] = 0.01 / step
            param.grad = grad.to(dtype)
            optimizer.step()
        return param.detach()

    weight, subnet = (start.to(device, copy=True) for _ in range(2))
    moments = [torch.zeros(11, 19, device=device) for _ in range(2)]
    everything = torch.arange(11, device=device), torch.arange(19, device=device)
    for step, grad in enumerate(grads, 1):
        launch(
            weight,
            subnet,
            grad.to(device),
            *moments,
            *everything,
            lr=0.01 / step,
            beta1=0.9,
            beta2=0.99,
            eps=1e-6,
            weight_decay=0.1,
            step=step,
            seed=None,
        )
    assert_within(subnet.cpu(), torch_adamw(torch.float32), torch_adamw(torch.float64))
    assert torch.equal(weight, subnet)


@pytest.mark.parametrize("subnet_dtype, seed", [(torch.float32, None), (torch.bfloat16, 3)])
def test_deterministic(device, subnet_dtype, seed):
    args = make_args((31, 37), (5, 11), 4, torch.bfloat16, subnet_dtype, device)
    runs = [clones(args) for _ in range(2)]
    for run in runs:
        launch(*run, **{**HYPER, "seed": seed})
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40 + 3, -1])
def test_stochastic_bits_are_those_of_eager(device, dtype, seed):
    """With gradients that are powers of two the arithmetic is exact, so that only the random bits
    could differ."""
    args = make_args((31, 301), (7, 293), 0, dtype, dtype, device)
    args[2] = args[2].sign() * 2.0 ** torch.randint(-3, 4, (7, 293), device=device)
    args[3].zero_()
    expected = clones(args)
    launch(*args, lr=0.0123, seed=seed, **PLAIN_STEP)
    eager.subnet_adamw_(*expected, lr=0.0123, seed=seed, **PLAIN_STEP)
    assert all(torch.equal(kernel, plain) for kernel, plain in zip(args, expected, strict=True))


def constant_step(dtype, share, seed, device):
    """A subnet of ones after one step of ``share`` of the spacing of ``dtype`` above 1, in units of
    the spacing."""
    k = (16, 251)
    weight = torch.ones(k, dtype=dtype, device=device)
    subnet, moments = weight.clone(), [torch.zeros(k, device=device) for _ in range(2)]
    everything = torch.arange(k[0], device=device), torch.arange(k[1], device=device)
    spacing = torch.finfo(dtype).eps
    launch(
        weight,
        subnet,
        -torch.ones(k, device=device),
        *moments,
        *everything,
        lr=share * spacing,
        seed=seed,
        **PLAIN_STEP,
    )
    assert torch.equal(weight, subnet)
    return (subnet.double() - 1) / spacing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.03, 0.3, 0.75])
def test_stochastic_rounding_is_unbiased(device, dtype, share):
    """Steps below half a spacing are all lost by rounding to nearest; on average none by stochastic
    rounding."""
    draws = torch.stack([constant_step(dtype, share, seed, device) for seed in range(4)])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    sigma = (share * (1 - share) / draws.numel()) ** 0.5  # of the mean of independent draws
    assert abs(draws.mean().item() - share) < 4 * sigma
    per_seed = draws.flatten(1).mean(1)
    assert ((per_seed - share).abs() < 4 * sigma * len(draws) ** 0.5).all() and len(
        per_seed.unique()
    ) > 1
    assert (constant_step(dtype, share, None, device) == round(share)).all()


def test_non_finite_gradient_shows(device):
    args = make_args((8, 8), (3, 3), 1, torch.bfloat16, torch.bfloat16, device)
    args[2][0, 1, 1] = torch.nan
    launch(*args, **{**HYPER, "seed": 1})
    assert args[1].isnan().sum() == 1 and args[0].isnan().sum() == 1
    assert args[1][1, 1].isnan() and args[0][args[5][1], args[6][1]].isnan()


@pytest.mark.slow
def test_new_hyperparameters_need_no_compilation():
    """Learning rate, step and seed change in every step of a run; 1 and 16 are the values triton
    likes to bake in."""
    script = """
from tests.kernels.compile_cases import subnet_adamw, torch
from bench.harness.machine_code import launches

SCALARS = (1e-3, 1, 0), (1.0, 2, 1), (5e-4, 16, 16), (0.0, 99, 2**31), (1e-3, 1, 2**40), (1e-3, 1, -1)
run = lambda: [subnet_adamw(torch.bfloat16, False, *scalars) for scalars in SCALARS]
kernels = launches("sm_90", run)
print(len(kernels), len({kernel.hash for kernel in kernels}))
"""
    assert run_offline(script) == "6 1"
