import pytest
import torch

from csrc_ref.adamw import subnet_adamw_ref
from losia_kernels import ops
from losia_kernels.ops import adamw
from losia_kernels.ops.adamw import Update, subnets_adamw_plain_
from tests.kernels.offline import run_offline
from tests.kernels.updates import (
    ALIGNED,
    BF16,
    ODD,
    OPTIONS,
    WRITTEN,
    assert_same,
    copy,
    launch,
    make,
    make_update,
    outside,
)
from tests.tolerance import assert_within

# subnet -= lr * sign(grad)
PLAIN_STEP = {"beta1": 0.0, "beta2": 0.0, "eps": 0.0, "weight_decay": 0.0}
SHAPES = [  # (out, in), (k_out, k_in)
    ((1, 1), (1, 1)),
    ((7, 13), (1, 1)),
    ((7, 13), (7, 13)),
    ((31, 37), (5, 11)),
    ((9, 600), (3, 509)),
    ((40, 24), (40, 3)),
]
MASTER, NEAREST, STOCHASTIC = "master", "nearest", "stochastic"


def check(update: Update, run=launch, **options) -> None:
    """One step of the kernel, in place, held to float64 by the tolerance rule."""
    options = OPTIONS | options
    truth = subnet_adamw_ref(
        *(tensor.cpu() for tensor in update[:7]), lr=update.lr, step=update.step, **options
    )
    before, expected = copy([update]), copy([update])
    subnets_adamw_plain_(expected, **options)
    run([update], **options)
    for name, exact in zip(WRITTEN, truth, strict=True):
        try:
            assert_within(getattr(update, name), getattr(expected[0], name), exact)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    assert torch.equal(outside(update), outside(before[0]))
    assert_same([update], before, ("grad", "out_idx", "in_idx"))


@pytest.mark.parametrize("size, k", SHAPES)
@pytest.mark.parametrize(
    "dtype, subnet",
    [
        (torch.float32, MASTER),
        (BF16, MASTER),
        (torch.float16, MASTER),
        (BF16, NEAREST),
        (torch.float16, NEAREST),
        (BF16, STOCHASTIC),
        (torch.float16, STOCHASTIC),
    ],
)
def test_one_step(device, dtype, subnet, size, k):
    subnet_dtype = torch.float32 if subnet == MASTER else dtype
    seed = 5 if subnet == STOCHASTIC else None
    check(make_update(size, k, dtype, subnet_dtype, device, seed=seed))


@pytest.mark.parametrize(
    "scalars, options",
    [
        ({"step": 1}, {}),
        ({"lr": 0.0}, {}),
        ({}, {"beta1": 0.3}),
        ({}, {"eps": 0.1}),
        ({}, {"weight_decay": 0.0}),
    ],
)
def test_other_hyperparameters(device, scalars, options):
    check(make_update((31, 37), (5, 11), BF16, torch.float32, device, **scalars), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, BF16])
def test_gradients_of_any_dtype(device, dtype):
    check(make_update((31, 37), (5, 11), BF16, torch.float32, device, dtype))


def strided_weight(update: Update, frame: torch.Tensor) -> Update:
    frame[:, 1:63:2] = update.weight.T
    return update._replace(weight=frame[:, 1:63:2].T)  # [out, in], stride (2, 70)


def test_any_strides_of_the_weight(device):
    frame = torch.full((37, 70), 7.0, dtype=BF16, device=device)
    update = make_update((31, 37), (5, 11), BF16, torch.float32, device)
    check(strided_weight(update, frame))
    frame[:, 1:63:2] = 7.0
    assert (frame == 7.0).all()


def launch_positional(updates, *options):
    launch(updates, **dict(zip(OPTIONS, options, strict=True)))


def op_on_the_kernel(updates: list[Update], **options) -> None:
    """``ops.subnet_adamw_``; the kernel takes all but the weight contiguous."""
    (update,) = updates
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adamw, "_form_for", lambda weight: launch_positional)
        ops.subnet_adamw_(
            *update[:8],
            options["beta1"],
            options["beta2"],
            options["eps"],
            options["weight_decay"],
            update.step,
            update.seed,
        )


def test_any_strides_of_an_op_on_one_matrix(device):
    frame = torch.full((37, 70), 7.0, dtype=BF16, device=device)
    update = make_update((31, 37), (5, 11), BF16, torch.float32, device)
    update = strided_weight(update, frame)._replace(
        subnet=update.subnet.T.contiguous().T,
        grad=update.grad.T.contiguous().T,
        exp_avg=torch.stack([update.exp_avg] * 2, dim=-1)[..., 0],
        exp_avg_sq=update.exp_avg_sq.T.contiguous().T,
        out_idx=torch.stack([update.out_idx, update.out_idx - 1], dim=-1)[:, 0],
        in_idx=torch.stack([update.in_idx, update.in_idx - 1], dim=-1)[:, 0],
    )
    check(update, run=op_on_the_kernel)


def test_broadcast_gradient(device):
    update = make_update((31, 37), (5, 11), torch.float32, torch.float32, device)
    grad = torch.randn(5, 1, device=device).expand(5, 11)
    check(update._replace(grad=grad), run=op_on_the_kernel)


@pytest.mark.parametrize("k", [(0, 4), (4, 0)])
def test_empty_subnet_changes_nothing(device, k):
    updates = [make_update((8, 8), k, BF16, torch.float32, device)]
    before = copy(updates)
    launch(updates)
    assert_same(updates, before)


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
        update = Update(weight, subnet, grad.to(device), *moments, *everything, 0.01 / step, step)
        launch([update], beta2=0.99, eps=1e-6)
    assert_within(subnet.cpu(), torch_adamw(torch.float32), torch_adamw(torch.float64))
    assert torch.equal(weight, subnet)


@pytest.mark.parametrize("subnet_dtype, seed", [(torch.float32, None), (BF16, 3)])
def test_deterministic(device, subnet_dtype, seed):
    update = make_update((31, 37), (5, 11), BF16, subnet_dtype, device, seed=seed)
    runs = [copy([update]) for _ in range(2)]
    for run in runs:
        launch(run)
    assert_same(*runs)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40 + 3, -1])
def test_stochastic_bits_are_those_of_plain_torch(device, dtype, seed):
    """With gradients that are powers of two the arithmetic is exact, so that only the random bits
    could differ."""
    update = make_update((31, 301), (7, 293), dtype, dtype, device, lr=0.0123, step=1, seed=seed)
    powers = 2.0 ** torch.randint(-3, 4, (7, 293), device=device)
    ours = [update._replace(grad=update.grad.sign() * powers)]
    update.exp_avg.zero_()
    theirs = copy(ours)
    launch(ours, **PLAIN_STEP)
    subnets_adamw_plain_(theirs, **PLAIN_STEP)
    assert_same(ours, theirs)


def constant_step(dtype, share, seed, device):
    """A subnet of ones after one step of ``share`` of the spacing of ``dtype`` above 1, in units of
    the spacing."""
    k = (16, 251)
    weight = torch.ones(k, dtype=dtype, device=device)
    subnet, moments = weight.clone(), [torch.zeros(k, device=device) for _ in range(2)]
    everything = torch.arange(k[0], device=device), torch.arange(k[1], device=device)
    spacing = torch.finfo(dtype).eps
    grad = -torch.ones(k, device=device)
    update = Update(weight, subnet, grad, *moments, *everything, share * spacing, 1, seed)
    launch([update], **PLAIN_STEP)
    assert torch.equal(weight, subnet)
    return (subnet.double() - 1) / spacing


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
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
    update = make_update((8, 8), (3, 3), BF16, BF16, device, seed=1)
    update.grad[1, 1] = torch.nan
    launch([update])
    assert update.subnet.isnan().sum() == 1 and update.weight.isnan().sum() == 1
    assert update.subnet[1, 1].isnan()
    assert update.weight[update.out_idx[1], update.in_idx[1]].isnan()


@pytest.mark.slow
def test_new_hyperparameters_need_no_compilation():
    """Learning rate, step and seed change in every step of a run; 1 and 16 are the values triton
    likes to bake in."""
    script = """
from tests.kernels.compile_cases import subnets_adamw, torch
from bench.harness.machine_code import launches

SCALARS = (1e-3, 1, 0), (1.0, 2, 1), (5e-4, 16, 16), (0.0, 99, 2**31), (1e-3, 1, 2**40), (1e-3, 1, -1)
run = lambda: [subnets_adamw(torch.bfloat16, master="none", scalars=scalars) for scalars in SCALARS]
kernels = launches("sm_90", run)
print(len(kernels), len({kernel.hash for kernel in kernels}))
"""
    assert run_offline("-c", script) == "6 1"


# Many in one launch -------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [ODD, ALIGNED], ids=["odd", "aligned"])
@pytest.mark.parametrize(
    "dtype, subnet, stochastic",
    [
        (torch.float32, torch.float32, False),
        (BF16, torch.float32, False),
        (torch.float16, torch.float32, False),
        (BF16, BF16, False),
        (BF16, BF16, True),
        (torch.float16, torch.float16, True),
    ],
)
def test_the_bits_of_one_launch_each(device, sizes, dtype, subnet, stochastic):
    ours = make(sizes, dtype, subnet, device, seeded=stochastic)
    theirs, before = copy(ours), copy(ours)
    launch(ours)
    for update in theirs:
        launch([update])
    assert_same(ours, theirs)
    assert_same(ours, before, ("grad", "out_idx", "in_idx"))
    for now, then in zip(ours, before, strict=True):
        assert torch.equal(outside(now), outside(then))
        assert not torch.equal(now.exp_avg, then.exp_avg)


def test_matrices_of_several_dtypes_and_layouts_in_one_call(device):
    kinds = [
        make(ODD, *dtypes, device, grad)
        for *dtypes, grad in (
            (torch.float32, torch.float32, torch.float32),
            (BF16, BF16, BF16),
            (torch.float16, torch.float32, torch.float32),
        )
    ]
    mixed = copy([update for row in zip(*kinds, strict=True) for update in row])
    mixed = [update._replace(weight=update.weight.T.contiguous().T) for update in mixed]
    for kind in kinds:
        launch(kind)
    launch(mixed)
    for i, kind in enumerate(kinds):
        assert_same(mixed[i::3], kind)


def test_all_that_changes_with_the_step_is_read_from_the_table(device, monkeypatch):
    """The second launch has the first one's arguments, only the table's contents are new."""
    from losia_kernels.kernels import adamw as kernels

    kernel, recorded = kernels.subnets_adamw_kernel, []

    class Recorder:
        def __getitem__(self, grid):
            def run(*args, **constants):
                recorded.append((grid, args, constants))
                kernel[grid](*args, **constants)

            return run

    def at_another_step(updates):
        scalars = zip((0.3, 0.02, 0.01), (9, 8, 7), (3, 2, 1), strict=True)
        return [
            update._replace(lr=lr, step=step, seed=seed, grad=grad)
            for update, (lr, step, seed), grad in zip(updates, scalars, grads, strict=True)
        ]

    ours = make(ODD, BF16, BF16, device)
    theirs = copy(ours)
    monkeypatch.setattr(kernels, "subnets_adamw_kernel", Recorder())
    launch(ours)
    grads = [update.grad + 1 for update in ours]  # at other addresses
    launch(at_another_step(copy(ours)))
    addresses = recorded[0][1][0].clone()
    (grid, args, constants), (_, (table, *_), _) = recorded
    changing = [
        field.value
        for field in (
            kernels.GRAD,
            kernels.SEED,
            kernels.DECAY,
            kernels.STEP_SIZE,
            kernels.ROOT_CORRECTION,
        )
    ]
    args[0].copy_(addresses)
    args[0][:, changing] = table[:, changing]
    kernel[grid](*args, **constants)
    launch(theirs)
    launch(at_another_step(theirs))
    assert_same(ours, theirs)


def test_the_compiler_is_promised_16_bytes_only_where_all_is_aligned():
    from losia_kernels.kernels.adamw import make_table

    def aligned(k_in: int, first: int = 0) -> bool:
        update = make_update((8, 64), (4, k_in), torch.float32, torch.float32, "cpu")
        subnet = torch.empty(4 * k_in + first)[first:].view(4, k_in)
        return make_table([update._replace(subnet=subnet)], [0], 0.9, 0.99, 0.0)[1]

    assert aligned(32) and not aligned(33) and not aligned(8) and not aligned(32, first=1)


@pytest.mark.gpu
def test_a_captured_update_is_refused():
    ours = make(ODD, BF16, BF16, "cuda")
    launch(ours)
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="capture forward and backward"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        launch(ours)
