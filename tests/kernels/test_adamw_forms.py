"""AdamW with moments in fewer bits, and with a master in two parts."""

import pytest
import torch

from csrc_ref.adamw import subnet_adamw_ref
from losia_kernels.kernels.adamw import tile_map
from losia_kernels.kernels.codes import FIRST_MOMENT, SECOND_MOMENT
from losia_kernels.ops import rounding
from losia_kernels.ops.adamw import subnets_adamw_plain_
from losia_kernels.ops.rounding import decode, encode, join_float, split_float
from tests.kernels.updates import (
    ALIGNED,
    BF16,
    ODD,
    OPTIONS,
    WRITTEN,
    assert_same,
    copy,
    in_bf16,
    in_codes,
    launch,
    make,
)
from tests.tolerance import assert_within


def with_zero_remainders(updates):
    return [
        update._replace(remainder=torch.zeros_like(update.subnet, dtype=torch.int16))
        for update in updates
    ]


def decoded(updates):
    """The same in float32 moments."""
    return [
        update._replace(
            exp_avg=decode(update.exp_avg, update.exp_avg_scale, True),
            exp_avg_sq=decode(update.exp_avg_sq, update.exp_avg_sq_scale, False),
            exp_avg_scale=None,
            exp_avg_sq_scale=None,
        )
        for update in updates
    ]


def test_moments_of_two_dtypes_in_one_call(device):
    exact, rounded = (
        make(ODD, BF16, torch.float32, device),
        in_bf16(make(ODD, BF16, torch.float32, device)),
    )
    both = copy(exact + rounded)
    for updates in (exact, rounded, both):
        launch(updates)
    assert_same(both, exact + rounded)


@pytest.mark.parametrize("sizes", [ODD, ALIGNED], ids=["odd", "aligned"])
@pytest.mark.parametrize("store", [in_bf16, in_codes])
def test_moments_are_rounded_as_rounding_py_does(device, sizes, store):
    """What float32 moments would be after the step, rounded with the seed of their matrix."""
    ours = make(sizes, BF16, torch.float32, device)
    for update in ours:
        # beside a large second moment the first one falls below all codes
        update.grad[..., :1], update.grad[..., 1:2] = 0.0, 1e3
    ours = store(ours)
    plain = copy(ours)
    if store is in_codes:
        plain = decoded(plain)
    else:
        plain = [
            u._replace(exp_avg=u.exp_avg.float(), exp_avg_sq=u.exp_avg_sq.float()) for u in plain
        ]
    launch(ours)
    launch(plain)
    assert_same(ours, plain, ("weight", "subnet"))
    for update, exact in zip(ours, plain, strict=True):
        for name, signed, tag in (
            ("exp_avg", True, FIRST_MOMENT),
            ("exp_avg_sq", False, SECOND_MOMENT),
        ):
            value, seed = getattr(exact, name), update.seed ^ tag
            if store is in_bf16:
                rounded = rounding.stochastic_round(value, BF16, seed)
                assert torch.equal(getattr(update, name), rounded)
            else:
                codes, scale = encode(value, signed, seed)
                assert torch.equal(getattr(update, name), codes)
                assert torch.equal(getattr(update, f"{name}_scale"), scale)
                assert signed or (codes > 0).all()


def test_codes_are_held_to_float64(device):
    ours = in_codes(make(ODD, BF16, torch.float32, device))
    plain = copy(ours)
    truth = [
        subnet_adamw_ref(
            *(tensor.cpu() for tensor in update[:7]), lr=update.lr, step=update.step, **OPTIONS
        )
        for update in decoded(ours)
    ]
    launch(ours)
    subnets_adamw_plain_(plain, **OPTIONS)
    for update, expected, exact in zip(ours, plain, truth, strict=True):
        assert_within(update.subnet, expected.subnet, exact[1])
        assert_within(update.weight, expected.weight, exact[0])


@pytest.mark.parametrize("sizes", [ODD, ALIGNED], ids=["odd", "aligned"])
def test_a_remainder_is_the_float32_master_exactly(device, sizes):
    master = make(sizes, BF16, torch.float32, device, BF16)
    split = with_zero_remainders(make(sizes, BF16, BF16, device, BF16))
    for _ in range(2):
        launch(master)
        launch(split)
    for whole, parts in zip(master, split, strict=True):
        value = whole.subnet
        assert torch.equal(join_float(parts.subnet, parts.remainder), value)
        ties = value.view(torch.int32) & 0xFFFF == 0x8000
        inside = whole.out_idx[:, None], whole.in_idx
        for update, rounded in ((parts, split_float(value)[0]), (whole, value.to(BF16))):
            assert torch.equal(update.weight[inside], rounded)
        assert torch.equal(rounded[~ties], parts.subnet[~ties])
        assert parts.remainder.any()
    assert_same(split, master, ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("store", [lambda updates: updates, in_codes, in_bf16])
def test_non_finite_gradients_show(device, store):
    (update,) = store(with_zero_remainders(make([((8, 8), (3, 3))], BF16, BF16, device)))
    update.grad[1, 1] = torch.nan
    launch([update])
    assert update.subnet.isnan().sum() == 1 and update.subnet[1, 1].isnan()
    assert update.weight.isnan().sum() == 1


def test_the_same_call_gives_the_same_bits(device):
    runs = [in_codes(make(ODD, BF16, BF16, device)) for _ in range(2)]
    for run in runs:
        launch(run)
    assert_same(*runs, (*WRITTEN, "exp_avg_scale", "exp_avg_sq_scale"))


@pytest.mark.gpu
def test_another_stream_may_read_what_the_first_has_remembered():
    """The map of tiles is made once, on the stream of the first launch, which may be busy."""
    sizes = [((512, 512), (64, 64))] * 40
    expected = make(sizes, BF16, torch.float32, "cuda")
    found = copy(expected)
    launch(expected)
    torch.cuda.synchronize()
    tile_map.cache_clear()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        torch.cuda._sleep(10**8)
        launch(copy(found))
    with torch.cuda.stream(second):
        launch(found)
    torch.cuda.synchronize()
    assert_same(found, expected)


@pytest.mark.gpu
def test_the_same_bits_in_a_hundred_runs():
    start = make(ODD, BF16, torch.float32, "cuda")
    first = copy(start)
    launch(first)
    for _ in range(100):
        again = copy(start)
        launch(again)
        assert_same(again, first)
