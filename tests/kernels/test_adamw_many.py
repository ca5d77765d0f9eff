"""All subnets in one launch: the bits of one launch each, whatever form the moments and the master
have."""

import pytest
import torch

from csrc_ref.kernels import subnet_adamw_ref
from losia_kernels import ops
from losia_kernels.kernels.codes import FIRST_MOMENT, SECOND_MOMENT, dynamic_map
from losia_kernels.ops import rounding
from losia_kernels.ops.adamw import subnets_adamw_plain_
from losia_kernels.ops.rounding import (
    decode,
    encode,
    join_float,
    split_float,
)
from tests.kernels.test_adamw import HYPER, choose, outside
from tests.tolerance import assert_within

BF16 = torch.bfloat16
ODD = [((7, 37), (3, 11), 2), ((1, 1), (1, 1), 0), ((5, 300), (2, 259), 0)]
ALIGNED = [((40, 64), (3, 32), 2), ((24, 300), (2, 272), 0)]
OPTIONS = (HYPER["beta1"], HYPER["beta2"], HYPER["eps"], HYPER["weight_decay"])
LISTS = (
    "weights",
    "subnets",
    "grads",
    "exp_avgs",
    "exp_avg_sqs",
    "out_idx",
    "in_idx",
    "lr",
    "step",
    "seeds",
    "exp_avg_scales",
    "exp_avg_sq_scales",
    "remainders",
)


def make(sizes, dtype, subnet_dtype, device, grad_dtype=torch.float32) -> dict[str, list]:
    """The lists of ``subnets_adamw_`` as after a few steps, each matrix at another rate, step and
    seed."""
    torch.manual_seed(0)
    lists = {name: [] for name in LISTS}
    for number, (size, k, splits) in enumerate(sizes):
        weight = torch.randn(size, device=device).to(dtype)
        out_idx, in_idx = choose(size[0], k[0], device), choose(size[1], k[1], device)
        grad = torch.randn((splits, *k) if splits else k, device=device).to(grad_dtype)
        moments = torch.randn(k, device=device) * 0.1, torch.rand(k, device=device) + 1e-3
        values = (
            weight,
            weight[out_idx][:, in_idx].to(subnet_dtype),
            grad,
            *moments,
            out_idx,
            in_idx,
            0.01 / (number + 1),
            number + 1,
            77 * number + 5,
        )
        for name, value in zip(LISTS, values, strict=False):
            lists[name].append(value)
    return lists


def copy(lists):
    return {
        name: [v.clone() if isinstance(v, torch.Tensor) else v for v in each]
        for name, each in lists.items()
    }


def in_bf16(lists):
    for name in ("exp_avgs", "exp_avg_sqs"):
        lists[name] = [moment.to(BF16) for moment in lists[name]]


def in_codes(lists):
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        pairs = [encode(moment, signed, seed=1) for moment in lists[f"{name}s"]]
        lists[f"{name}s"], lists[f"{name}_scales"] = ([pair[i] for pair in pairs] for i in (0, 1))


def launch(lists):
    from losia_kernels.kernels.adamw import launch_subnets_adamw_

    call(launch_subnets_adamw_, lists)


def call(function, lists):
    values = list(lists.values())
    function(*values[:10], *OPTIONS, *values[10:])


def launch_one_by_one(lists, stochastic):
    from losia_kernels.kernels.subnet_adamw import launch_subnet_adamw_

    for *tensors, lr, step, seed in zip(*(lists[name] for name in LISTS[:10]), strict=True):
        launch_subnet_adamw_(*tensors, lr, *OPTIONS, step, seed if stochastic else None)


def assert_same(ours, theirs, names):
    for name in names:
        assert all(torch.equal(a, b) for a, b in zip(ours[name], theirs[name], strict=True)), name


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
    ours = make(sizes, dtype, subnet, device)
    ours["seeds"] = ours["seeds"] if stochastic else []
    theirs, before = copy(ours), copy(ours)
    launch(ours)
    launch_one_by_one({**theirs, "seeds": theirs["seeds"] or [None] * len(sizes)}, stochastic)
    assert_same(ours, theirs, ("weights", "subnets", "exp_avgs", "exp_avg_sqs"))
    assert_same(ours, before, ("grads", "out_idx", "in_idx"))
    for i, weight in enumerate(ours["weights"]):
        idx = ours["out_idx"][i], ours["in_idx"][i]
        assert torch.equal(outside(weight, *idx), outside(before["weights"][i], *idx))
        assert not torch.equal(ours["exp_avgs"][i], before["exp_avgs"][i])


def test_matrices_of_several_dtypes_and_layouts_in_one_call(device):
    kinds = [
        make(ODD, *dtypes, device, grad)
        for *dtypes, grad in (
            (torch.float32, torch.float32, torch.float32),
            (BF16, BF16, BF16),
            (torch.float16, torch.float32, torch.float32),
        )
    ]
    mixed = {
        name: [v for row in zip(*(kind[name] for kind in kinds), strict=True) for v in row]
        for name in LISTS
    }
    mixed = copy(mixed)
    mixed["weights"] = [w.T.contiguous().T for w in mixed["weights"]]
    for kind in kinds:
        launch(kind)
    launch(mixed)
    for i, kind in enumerate(kinds):
        assert_same(
            {name: mixed[name][i::3] for name in ("weights", "subnets", "exp_avgs")},
            kind,
            ("weights", "subnets", "exp_avgs"),
        )


def test_moments_of_two_dtypes_in_one_call(device):
    exact, rounded = (make(ODD, BF16, torch.float32, device) for _ in "ab")
    in_bf16(rounded)
    both = copy({name: exact[name] + rounded[name] for name in LISTS})
    for lists in (exact, rounded, both):
        launch(lists)
    assert_same(
        both,
        {name: exact[name] + rounded[name] for name in LISTS},
        ("subnets", "exp_avgs", "exp_avg_sqs"),
    )


@pytest.mark.parametrize("sizes", [ODD, ALIGNED], ids=["odd", "aligned"])
def test_moments_are_rounded_as_rounding_py_does(device, sizes):
    """What float32 moments would be after the step, rounded with the seed of their matrix."""
    for store in (in_bf16, in_codes):
        ours = make(sizes, BF16, torch.float32, device)
        for grad in ours["grads"]:
            grad[..., :1], grad[..., 1:2] = (
                0.0,
                1e3,
            )  # beside a large second moment the first one falls below all codes
        store(ours)
        plain = copy(ours)
        if store is in_codes:
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                plain[f"{name}s"] = [
                    decode(*pair, signed)
                    for pair in zip(plain[f"{name}s"], plain[f"{name}_scales"], strict=True)
                ]
                plain[f"{name}_scales"] = []
        else:
            plain |= {
                name: [moment.float() for moment in plain[name]]
                for name in ("exp_avgs", "exp_avg_sqs")
            }
        launch(ours)
        launch(plain)
        assert_same(ours, plain, ("weights", "subnets"))
        for name, signed, tag in (
            ("exp_avg", True, FIRST_MOMENT),
            ("exp_avg_sq", False, SECOND_MOMENT),
        ):
            for i, exact in enumerate(plain[f"{name}s"]):
                seed = plain["seeds"][i] ^ tag
                if store is in_bf16:
                    assert torch.equal(
                        ours[f"{name}s"][i], rounding.stochastic_round(exact, BF16, seed)
                    )
                else:
                    codes, scale = encode(exact, signed, seed)
                    assert torch.equal(ours[f"{name}s"][i], codes)
                    assert torch.equal(ours[f"{name}_scales"][i], scale)
                    assert signed or (codes > 0).all()


def test_codes_are_held_to_float64(device):
    ours = make(ODD, BF16, torch.float32, device)
    in_codes(ours)
    plain = copy(ours)
    exact = [
        [
            decode(*pair, signed)
            for pair in zip(ours[f"{name}s"], ours[f"{name}_scales"], strict=True)
        ]
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False))
    ]
    truth = [
        subnet_adamw_ref(
            *(ours[name][i].cpu() for name in LISTS[:3]),
            exact[0][i].cpu(),
            exact[1][i].cpu(),
            ours["out_idx"][i].cpu(),
            ours["in_idx"][i].cpu(),
            ours["lr"][i],
            *OPTIONS,
            ours["step"][i],
        )
        for i in range(len(ODD))
    ]
    launch(ours)
    call(subnets_adamw_plain_, plain)
    for i in range(len(ODD)):
        assert_within(ours["subnets"][i], plain["subnets"][i], truth[i][1])
        assert_within(ours["weights"][i], plain["weights"][i], truth[i][0])


@pytest.mark.parametrize("sizes", [ODD, ALIGNED], ids=["odd", "aligned"])
def test_a_remainder_is_the_float32_master_exactly(device, sizes):
    master = make(sizes, BF16, torch.float32, device, BF16)
    split = make(sizes, BF16, BF16, device, BF16)
    split["remainders"] = [
        torch.zeros(s.shape, dtype=torch.int16, device=device) for s in split["subnets"]
    ]
    for _ in range(2):
        launch(master)
        launch(split)
    for i, value in enumerate(master["subnets"]):
        assert torch.equal(join_float(split["subnets"][i], split["remainders"][i]), value)
        ties = value.view(torch.int32) & 0xFFFF == 0x8000
        inside = master["out_idx"][i][:, None], master["in_idx"][i]
        for weights, rounded in ((split, split_float(value)[0]), (master, value.to(BF16))):
            assert torch.equal(weights["weights"][i][inside], rounded)
        assert torch.equal(rounded[~ties], split["subnets"][i][~ties])
        assert split["remainders"][i].any()
    assert_same(split, master, ("exp_avgs", "exp_avg_sqs"))


def test_non_finite_gradients_show(device):
    for store in (lambda lists: None, in_codes, in_bf16):
        ours = make([((8, 8), (3, 3), 0)], BF16, BF16, device)
        ours["remainders"] = [torch.zeros(3, 3, dtype=torch.int16, device=device)]
        store(ours)
        ours["grads"][0][1, 1] = torch.nan
        launch(ours)
        assert ours["subnets"][0].isnan().sum() == 1 and ours["subnets"][0][1, 1].isnan()
        assert ours["weights"][0].isnan().sum() == 1


def test_all_that_changes_with_the_step_is_read_from_the_table(device, monkeypatch):
    """The second launch has the first one's arguments, only the table's contents are new."""
    from losia_kernels.kernels import adamw as subnets_adamw

    kernel, recorded = subnets_adamw.subnets_adamw_kernel, []

    class Recorder:
        def __getitem__(self, grid):
            def run(*args, **constants):
                recorded.append((grid, args, constants))
                kernel[grid](*args, **constants)

            return run

    later = {"lr": [0.3, 0.02, 0.01], "step": [9, 8, 7], "seeds": [3, 2, 1]}
    ours = make(ODD, BF16, BF16, device)
    theirs = copy(ours)
    monkeypatch.setattr(subnets_adamw, "subnets_adamw_kernel", Recorder())
    launch(ours)
    grads = [grad + 1 for grad in ours["grads"]]  # at other addresses
    launch({**copy(ours), **later, "grads": grads})
    addresses = recorded[0][1][0].clone()
    (grid, args, constants), (_, (table, *_), _) = recorded
    changing = [
        field.value
        for field in (
            subnets_adamw.GRAD,
            subnets_adamw.SEED,
            subnets_adamw.DECAY,
            subnets_adamw.STEP_SIZE,
            subnets_adamw.ROOT_CORRECTION,
        )
    ]
    args[0].copy_(addresses)
    args[0][:, changing] = table[:, changing]
    kernel[grid](*args, **constants)
    launch(theirs)
    launch({**theirs, **later, "grads": grads})
    assert_same(ours, theirs, ("weights", "subnets", "exp_avgs", "exp_avg_sqs"))


def test_the_compiler_is_promised_16_bytes_only_where_all_is_aligned():
    from losia_kernels.kernels.adamw import make_table

    def aligned(k_in: int, first: int = 0) -> bool:
        subnet = torch.empty(4 * k_in + first)[first:].view(4, k_in)
        columns = [[torch.empty(8, 64)], [subnet], [torch.empty(4, k_in)], *[[]] * 7]
        return make_table(columns, [(4, k_in)], *[[0]] * 5)[1]

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


def test_the_same_call_gives_the_same_bits(device):
    results = []
    for _ in range(2):
        ours = make(ODD, BF16, BF16, device)
        in_codes(ours)
        launch(ours)
        results.append(ours)
    assert_same(
        *results,
        ("weights", "subnets", "exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales"),
    )


# The formats --------------------------------------------------------------------------------------


def test_codes_are_those_of_bitsandbytes():
    """Seven decades, the top one in 64 cells (unsigned 128): spot values of its published map."""
    signed, unsigned = (dynamic_map(sign, torch.device("cpu")) for sign in (True, False))
    assert len(signed.unique()) == len(unsigned.unique()) == 256 and (signed.diff() > 0).all()
    assert signed[127] == 0 and signed[255] == 1 and unsigned[0] == 0 and unsigned[255] == 1
    torch.testing.assert_close(signed[128:].flip(0)[1:], -signed[:127], rtol=1e-6, atol=0)
    torch.testing.assert_close(signed[[0, 126, 128]], torch.tensor([-0.99296875, -5.5e-7, 5.5e-7]))
    torch.testing.assert_close(unsigned[[1, 2, 254]], torch.tensor([3.25e-7, 7.75e-7, 0.996484375]))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_unbiased_within_their_spacing_and_exact_on_the_map(signed):
    value = torch.rand(3, 300) ** 4 + 1e-3
    value = value * torch.randn(3, 300).sign() if signed else value
    decoded = torch.stack([decode(*encode(value, signed, seed), signed) for seed in range(100)])
    map_ = dynamic_map(signed, value.device)
    scale = encode(value, signed, 0)[1].repeat_interleave(256, 1)[:, :300]
    place = torch.searchsorted(map_, value / scale, right=True).clamp(1, 255)
    spacing = (map_[place] - map_[place - 1]) * scale
    assert ((decoded - value).abs() <= spacing * 1.001).all()
    inside = value / scale > map_[0]  # below the smallest code there is nothing to go down to
    assert ((decoded.mean(0) - value).abs() <= 0.25 * spacing)[
        inside
    ].all()  # 5 sigma of a coin, 100 times
    exact = decode(*encode(value, signed, 1), signed)
    again = decode(*encode(exact, signed, 2), signed)
    torch.testing.assert_close(
        again[scale == exact.abs().max(1, keepdim=True)[0]],
        exact[scale == exact.abs().max(1, keepdim=True)[0]],
        rtol=1e-2,
        atol=1e-9,
    )


def test_second_moments_decay_and_stay_above_zero():
    """To nearest, neither bfloat16 nor codes would move at all: 0.1 % is less than half a
    spacing."""
    start = torch.full((4, 256), 0.5)
    start[:, 0] = 1.0  # the block's scale, kept up
    for dtype in (BF16, torch.uint8):
        value = start.clone()
        for seed in range(100):
            value = value * 0.999
            value[:, 0] = 1.0
            if dtype is BF16:
                value = rounding.stochastic_round(value, BF16, seed).float()
            else:
                value = decode(*encode(value, False, seed), False)
        assert value[:, 1:].mean().item() == pytest.approx(0.5 * 0.999**100, rel=0.02)
    tiny = torch.tensor([[1.0, 1e-12, 0.0]])
    assert (decode(*encode(tiny, False, 0), False) > 0).tolist() == [[True, True, False]]


def test_every_float_is_split_and_joined():
    bits = torch.cat(
        [
            torch.arange(0x7F7F0000, 0x7F820000, 7),
            torch.arange(0x3F7F0000, 0x3F820000, 3),
            torch.arange(-(2**31), -(2**31) + 70000, 11),
            torch.tensor([0x7FFFFFFF, -1]),
        ]
    )
    value = bits.to(torch.int32).view(torch.float32)
    high, low = split_float(value)
    nan = value.isnan()
    assert nan.any() and high[nan].isnan().all()
    assert torch.equal(join_float(high, low)[~nan].view(torch.int32), value[~nan].view(torch.int32))
    ties = value.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(high[~nan & ~ties], value[~nan & ~ties].to(BF16))


# What does not fit --------------------------------------------------------------------------------


def change(lists, name, i, value):
    lists[name] = [*lists[name][:i], value, *lists[name][i + 1 :]]


@pytest.mark.parametrize(
    "spoil, problem",
    [
        (lambda a: a["grads"].pop(), "one entry for each of the 3 weights"),
        (
            lambda a: change(a, "grads", 1, torch.ones(2, 2)),
            r"grad must be \(1, 1\) .*, \(2, 2\)\]",
        ),
        (
            lambda a: change(a, "exp_avgs", 0, a["exp_avgs"][0].half()),
            "moments must both be .*, got torch.float16",
        ),
        (lambda a: (in_bf16(a), a.update(seeds=[])), "torch.bfloat16 moments need seeds"),
        (
            lambda a: (in_codes(a), a.update(exp_avg_scales=[])),
            r"uint8 moments need float32 scales of shape \(3, 1\)",
        ),
        (
            lambda a: a.update(exp_avg_scales=[torch.ones(3, 1)] * 3),
            "scales belong to uint8 moments",
        ),
        (lambda a: a.update(remainders=a["exp_avgs"]), "a remainder belongs to a bfloat16 subnet"),
        (
            lambda a: change(a, "exp_avg_sqs", 0, a["exp_avg_sqs"][0].T.contiguous().T),
            "must be contiguous, got strides",
        ),
        (
            lambda a: change(a, "in_idx", 0, a["in_idx"][0].repeat_interleave(2)[::2]),
            "indices must be contiguous",
        ),
        (lambda a: change(a, "step", 2, 0), "step counts from 1, got 0"),
    ],
)
def test_refused_before_anything_changes(spoil, problem):
    lists = make(ODD, BF16, torch.float32, "cpu")
    spoil(lists)
    before = copy(lists)
    with pytest.raises(ValueError, match=f"subnets_adamw_: .*{problem}"):
        call(ops.subnets_adamw_, lists)
    assert_same(lists, before, ("weights", "subnets", "exp_avgs", "exp_avg_sqs"))
