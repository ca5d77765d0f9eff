"""Where a subnet's inputs are runs of neighbours, their new values are stored together: the bits of
one by one, and nothing beside them."""

import pytest
import torch

from losia_kernels import ops
from losia_kernels.kernels.adamw import stores_runs
from losia_kernels.ops.adamw import Update, subnets_adamw_plain_
from tests.kernels.updates import (
    BF16,
    OPTIONS,
    WRITTEN,
    assert_same,
    copy,
    in_bf16,
    in_codes,
    launch,
    make_update,
)

WHOLE = 0  # all inputs


def runs(size: int, k: int, alignment: int, device: str) -> torch.Tensor:
    if alignment == WHOLE:
        return torch.arange(size, device=device)
    starts = torch.randperm(size // alignment)[: k // alignment].sort().values * alignment
    return (starts[:, None] + torch.arange(alignment)).flatten().to(device)


def update_of_runs(size, k, alignment, device, dtype=BF16, subnet=torch.float32, **more) -> Update:
    """All of the weight is NaN but the subnet: a value that is read or moved by mistake shows."""
    update = make_update(size, k, dtype, subnet, device, **more)
    in_idx = runs(size[1], k[1], alignment, device)
    weight = torch.full(size, torch.nan, device=device, dtype=dtype)
    weight[update.out_idx[:, None], in_idx] = update.subnet.to(dtype)
    return update._replace(weight=weight, in_idx=in_idx, alignment=alignment or size[1])


def assert_as_one_by_one(updates: list[Update]) -> None:
    singly = [update._replace(alignment=1) for update in copy(updates)]
    assert not any(map(stores_runs, singly))
    launch(updates)
    launch(singly)
    names = ["subnet", "exp_avg", "exp_avg_sq"]
    names += [
        name for name in ("remainder", "exp_avg_scale") if getattr(updates[0], name) is not None
    ]
    assert_same(updates, singly, names)
    for ours, theirs in zip(updates, singly, strict=True):
        inside = ours.out_idx[:, None], ours.in_idx
        assert torch.equal(ours.weight[inside], theirs.weight[inside])
        assert torch.equal(ours.weight[inside], ours.subnet.to(ours.weight.dtype))
        ours.weight[inside] = torch.nan
        assert ours.weight.isnan().all()


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "size, k, alignment",
    [
        ((7, 64), (3, 16), 4),
        ((9, 640), (5, 288), 16),
        ((5, 320), (2, 256), 64),
        ((4, 260), (4, 260), WHOLE),
        ((6, 20), (1, 20), WHOLE),
    ],
)
def test_runs_are_stored_as_one_by_one(device, dtype, size, k, alignment):
    update = update_of_runs(size, k, alignment, device, dtype)
    assert stores_runs(update)
    assert_as_one_by_one([update])


@pytest.mark.parametrize("subnet, seed", [(torch.float32, None), (BF16, 3)])
@pytest.mark.parametrize("store", [list, in_bf16, in_codes])
def test_in_every_form(device, subnet, seed, store):
    update = update_of_runs((9, 640), (5, 288), 16, device, subnet=subnet, seed=seed or 7)
    assert_as_one_by_one(store([update]))


def test_matrices_with_and_without_runs_in_one_launch(device):
    """Also where k of another lets nothing be known of sizes."""
    sizes = (((7, 64), (3, 16), 4), ((5, 300), (2, 300), WHOLE), ((9, 640), (5, 288), 16))
    updates = [update_of_runs(*size, device) for size in sizes]
    single = make_update((7, 37), (3, 11), BF16, torch.float32, device)
    expected = copy([single])
    assert_as_one_by_one([*updates])
    updates = [update_of_runs(*size, device) for size in sizes]
    launch([updates[0], single, *updates[1:]])
    launch(expected)
    assert_same([single], expected)
    for update in updates:
        inside = update.out_idx[:, None], update.in_idx
        assert torch.equal(update.weight[inside], update.subnet.to(BF16))


def test_only_the_starts_of_runs_are_read(device):
    """The caller answers for the rest, so that no launch has to look: the wide form it is."""
    update = update_of_runs((7, 64), (3, 16), 4, device)
    (starts,) = copy([update])
    starts.in_idx[torch.arange(16, device=device) % 4 > 0] = 0
    launch([update])
    launch([starts])
    assert torch.equal(update.weight.nan_to_num(), starts.weight.nan_to_num())


def elsewhere(weight: torch.Tensor, place: str) -> torch.Tensor:
    """The same values, where four neighbours of a row are not one vector."""
    out, inner = weight.shape
    frame = weight.new_full((out * (inner + 1),), torch.nan)
    moved = {
        "transposed": frame[: out * inner].view(inner, out).T,
        "odd rows": frame.view(out, inner + 1)[:, :inner],
        "odd start": frame[1 : out * inner + 1].view(out, inner),
    }[place]
    return moved.copy_(weight)


@pytest.mark.parametrize("place", ["transposed", "odd rows", "odd start"])
def test_a_weight_that_lies_otherwise_is_written_one_by_one(device, place):
    update = update_of_runs((6, 64), (3, 16), 4, device)
    (moved,) = copy([update])
    moved = moved._replace(weight=elsewhere(update.weight, place))
    assert stores_runs(update) and not stores_runs(moved)
    launch([update])
    launch([moved])
    assert torch.equal(update.weight.nan_to_num(), moved.weight.nan_to_num())


def test_the_op_takes_the_promise(device):
    """Where it runs in plain torch it changes nothing."""
    update = update_of_runs((7, 64), (3, 16), 4, "cpu")
    with_promise, without = copy([update]), copy([update])
    columns = [[each] for each in with_promise[0]]
    ops.subnets_adamw_(*columns[:9], [], *OPTIONS.values(), [], [], [], [4])
    subnets_adamw_plain_(without, **OPTIONS)
    assert torch.equal(with_promise[0].weight.nan_to_num(), without[0].weight.nan_to_num())
    with pytest.raises(ValueError, match="one entry for each of the 1 weights"):
        ops.subnets_adamw_(*columns[:9], [], *OPTIONS.values(), [], [], [], [4, 4])


@pytest.mark.parametrize("alignment", [0, -4, 8])
def test_what_cannot_be_runs_is_refused_and_nothing_has_changed(alignment):
    """On a device it would be taken at its word, and other places read and written."""
    update = update_of_runs((7, 64), (3, 12), 4, "cpu")
    (before,), columns = copy([update]), [[each] for each in update]
    refused = pytest.raises(ValueError, match=f"12 indices are no runs of {alignment}")
    with refused:
        ops.subnets_adamw_(*columns[:9], [], *OPTIONS.values(), [], [], [], [alignment])
    assert_same([update], [before], WRITTEN[1:])
    assert torch.equal(update.weight.nan_to_num(), before.weight.nan_to_num())
    x = torch.randn(5, 64)
    with refused:
        ops.gather_features(x, update.in_idx, alignment)
    with refused:
        ops.subnet_grad(x, x, update.in_idx, update.in_idx, alignment)
