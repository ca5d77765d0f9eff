"""Moving a subnet, checkpoints, copies and casts of a LoSiALinear: nothing half done, nothing
silently wrong."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from losia_kernels import LoSiALinear, apply_losia
from tests.tiny import paper, same_tensors, snapshot

OUT, IN = torch.tensor([0, 3, 5]), torch.tensor([1, 2, 4, 7, 9])


def make_layer(seed=0, **options) -> LoSiALinear:
    torch.manual_seed(seed)
    return LoSiALinear(10, 7, rank_factor=0.5, **options)


def test_from_linear_shares_the_weight_and_freezes_it():
    linear = nn.Linear(10, 7).eval()
    layer = LoSiALinear.from_linear(linear, 0.5)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert (
        not layer.weight.requires_grad
        and not layer.bias.requires_grad
        and layer.subnet.requires_grad
    )
    assert not layer.training and isinstance(layer, nn.Linear)
    back = layer.to_plain()
    assert type(back) is nn.Linear and back.weight is linear.weight and back.bias is linear.bias
    assert back.state_dict().keys() == {"weight", "bias"} and not back.training


def test_the_first_subnet_comes_from_the_generator_or_torchs_seed():
    linear = nn.Linear(40, 30)
    drawn = [
        LoSiALinear.from_linear(linear, 0.5, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert same_tensors(drawn[0].state_dict(), drawn[1].state_dict())
    assert not torch.equal(drawn[0].in_idx, drawn[2].in_idx)
    assert same_tensors(make_layer().state_dict(), make_layer().state_dict())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_weight_that_cannot_be_trained_is_refused_by_name(dtype):
    linear = nn.Linear(10, 7)
    linear.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"q_proj: cannot train a subnet of a torch\.\w+ weight; dequantize"
    ):
        LoSiALinear.from_linear(linear, 0.5, name="q_proj")


@pytest.mark.parametrize("rank_factor", [0, 1.5, (0.5, 0), 0.1])
def test_a_bad_rank_factor_is_refused(rank_factor):
    with pytest.raises(ValueError, match="rank factor"):
        LoSiALinear(10, 7, rank_factor=rank_factor)


# Values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_write_back_rounds_into_the_block_and_nowhere_else(dtype):
    layer = make_layer(dtype=dtype)
    before = layer.weight.clone()
    with torch.no_grad():
        layer.subnet.add_(1 / 3)
    layer.write_back_()
    inside = torch.zeros(7, 10, dtype=torch.bool)
    inside[layer.out_idx[:, None], layer.in_idx] = True
    assert torch.equal(layer.weight[inside].view(3, 5), layer.subnet.to(dtype))
    assert torch.equal(layer.weight[~inside], before[~inside])


def test_read_subnet_fills_it_from_the_weight():
    layer = make_layer()
    with torch.no_grad():
        layer.weight.copy_(torch.arange(70.0).view(7, 10))
    layer.read_subnet_()
    assert torch.equal(layer.subnet, layer.weight[layer.out_idx][:, layer.in_idx])


def test_it_trains_alone_with_any_optimizer():
    layer, x = make_layer(), torch.randn(20, 10)
    target = x @ torch.randn(10, 7)
    optimizer = torch.optim.SGD([layer.subnet], lr=0.1)
    losses = []
    for _ in range(20):
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        layer.write_back_()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] * 0.95


# Moving -------------------------------------------------------------------------------------------


def test_a_move_writes_the_old_subnet_back_and_reads_the_new_one():
    layer = make_layer(dtype=torch.bfloat16)
    start, old = layer.weight.clone(), layer.current_subnet
    old_out, old_in = old.out_idx.clone(), old.in_idx.clone()
    parameter, buffer = layer.subnet, layer.out_idx
    with torch.no_grad():
        layer.subnet.add_(0.25)
    trained = layer.subnet.detach().clone()
    layer.set_subnet_(OUT, IN)
    expected = start.clone()
    expected[old_out[:, None], old_in] = trained.bfloat16()
    assert torch.equal(layer.weight, expected)
    assert torch.equal(layer.out_idx, OUT) and torch.equal(layer.in_idx, IN)
    assert torch.equal(layer.subnet, expected[OUT][:, IN].float())
    # optimizers and compiled code go on
    assert layer.subnet is parameter and layer.out_idx is buffer


def test_the_callers_indices_are_copied():
    layer, out_idx = make_layer(), OUT.clone()
    layer.set_subnet_(out_idx, IN)
    out_idx.zero_()
    assert torch.equal(layer.out_idx, OUT)


BAD_MOVES = {
    "out of range": (torch.tensor([0, 3, 7]), IN, r"out_idx must be in \[0, 7\)"),
    "negative": (torch.tensor([-1, 3, 5]), IN, r"out_idx must be in \[0, 7\)"),
    "unsorted": (OUT, IN.flip(0), "in_idx must be sorted"),
    "repeated": (torch.tensor([3, 3, 5]), IN, "out_idx must be sorted"),
    "int32": (OUT.int(), IN, "out_idx must be a 1-D int64 tensor"),
    "a list": (OUT.tolist(), IN, "out_idx must be a 1-D int64 tensor, got a list"),
    "another size": (OUT, IN[:4], r"the subnet is \(3, 5\), the indices give \(3, 4\)"),
    "swapped sides": (IN, OUT, r"out_idx must be in \[0, 7\)"),
}


@pytest.mark.parametrize(("out_idx", "in_idx", "message"), BAD_MOVES.values(), ids=BAD_MOVES.keys())
def test_a_bad_move_names_the_layer_and_changes_nothing(out_idx, in_idx, message):
    layer = LoSiALinear.from_linear(nn.Linear(10, 7), 0.5, name="layers.2.q_proj")
    with torch.no_grad():
        layer.subnet.add_(1)  # not written back yet: not even that may happen
    before = snapshot(layer)
    with pytest.raises(ValueError, match=r"layers\.2\.q_proj: " + message):
        layer.set_subnet_(out_idx, in_idx)
    assert same_tensors(layer.state_dict(), before)


@pytest.mark.parametrize("change", ["move", "write_back"])
@pytest.mark.parametrize("rank_factor", [0.5, (0.5, 1.0)])
@pytest.mark.parametrize("observing", [False, True])
def test_a_change_between_forward_and_backward_is_an_error(change, rank_factor, observing):
    layer = LoSiALinear(10, 7, rank_factor=rank_factor)
    if observing:
        layer.observe_(lambda grad: None)
    loss = layer(torch.randn(2, 10)).sum()
    if change == "move":
        layer.set_subnet_(OUT, IN if rank_factor == 0.5 else torch.arange(10))
    else:
        layer.write_back_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Observing ----------------------------------------------------------------------------------------


def test_observing_ends_with_none_and_can_begin_again():
    layer, x, seen = make_layer(), torch.randn(3, 10), []
    for callback in (seen.append, None, seen.append):
        layer.observe_(callback)
        layer(x).sum().backward()
    assert len(seen) == 2 and torch.equal(*seen)


def test_a_backward_that_comes_after_the_end_of_observing_is_not_observed():
    layer, seen = make_layer(), []
    layer.observe_(seen.append)
    loss = layer(torch.randn(3, 10)).sum()
    layer.observe_(None)
    loss.backward()
    assert not seen and layer.subnet.grad is not None


def test_a_new_observer_takes_over():
    layer, first, second = make_layer(), [], []
    layer.observe_(first.append)
    layer.observe_(second.append)
    layer(torch.randn(3, 10)).sum().backward()
    assert (len(first), len(second)) == (0, 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_an_observing_layer_is_whole_and_observes_for_nobody(copied):
    layer, x, seen = make_layer(), torch.randn(3, 10), []
    layer.observe_(seen.append)
    twin = copied(layer)
    assert same_tensors(twin.state_dict(), layer.state_dict()) and twin.weight is not layer.weight
    assert twin._probe is None  # else it would keep all of its inputs
    twin(x).sum().backward()
    assert not seen
    layer(x).sum().backward()
    assert len(seen) == 1 and torch.equal(twin.subnet.grad, layer.subnet.grad)
    twin.observe_(seen.append)
    twin(x).sum().backward()
    assert len(seen) == 2


def test_a_whole_layer_survives_torch_save():
    layer, file = make_layer(), io.BytesIO()
    layer.observe_(lambda grad: None)
    torch.save(layer, file)
    file.seek(0)
    assert same_tensors(torch.load(file, weights_only=False).state_dict(), layer.state_dict())


# Casts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_keeps_the_master_and_goes_on_observing(dtype):
    layer, seen = make_layer(), []
    layer.observe_(seen.append)
    indices, master = layer.out_idx.clone(), layer.subnet.detach().clone()
    layer.to(dtype)
    assert (
        layer.weight.dtype == dtype
        and layer.out_idx.dtype == torch.int64
        and torch.equal(layer.out_idx, indices)
    )
    assert layer.subnet.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(layer.subnet, master.to(layer.subnet.dtype))
    assert torch.equal(layer.weight[layer.out_idx][:, layer.in_idx], layer.subnet.to(dtype))
    layer(torch.randn(3, 10, dtype=dtype)).sum().backward()
    assert seen[0].dtype == dtype and seen[0].shape == layer.weight.shape
    assert layer.subnet.grad.dtype == layer.subnet.dtype


def test_without_a_master_the_subnet_follows_the_weight():
    assert make_layer(master=False).to(torch.bfloat16).subnet.dtype == torch.bfloat16


def test_another_device_while_observing():
    layer = make_layer()
    layer.observe_(lambda grad: None)
    layer.to("meta")
    own = layer.state_dict(keep_vars=True).values()
    assert {t.device.type for t in [*own, layer._probe]} == {"meta"}


# Checkpoints --------------------------------------------------------------------------------------


def trained_layer(**options) -> LoSiALinear:
    """A subnet that is neither the first one nor exactly the weight's block."""
    layer = make_layer(seed=1, **options)
    layer.set_subnet_(OUT, IN)
    with torch.no_grad():
        layer.subnet.add_(torch.rand(3, 5) * 1e-3)
    layer.write_back_()
    return layer


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign):
    layer, other = trained_layer(dtype=torch.bfloat16), make_layer(dtype=torch.bfloat16)
    assert layer.state_dict().keys() == {"weight", "bias", "subnet", "out_idx", "in_idx"}
    other.load_state_dict(snapshot(layer), assign=assign)
    assert same_tensors(other.state_dict(), layer.state_dict())
    assert other.subnet.requires_grad and not other.weight.requires_grad
    x = torch.randn(3, 10).bfloat16()
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_fills_the_subnet_anew(assign):
    layer, plain = make_layer(), nn.Linear(10, 7)
    result = layer.load_state_dict(snapshot(plain), strict=False, assign=assign)
    assert set(result.missing_keys) == {"subnet", "out_idx", "in_idx"}
    assert torch.equal(layer.subnet, plain.weight[layer.out_idx][:, layer.in_idx])


def test_a_layer_without_storage_takes_a_plain_checkpoint():
    layer = make_layer().to("meta")
    assert (
        layer.load_state_dict(
            nn.Linear(10, 7).to("meta").state_dict(), strict=False
        ).unexpected_keys
        == []
    )


@pytest.mark.parametrize("first", ["weight", "subnet"])
def test_a_checkpoint_in_several_files_keeps_the_master(first):
    """transformers loads a model's files one after another, in any order; one may end between
    weight and subnet."""
    layer, other = trained_layer(dtype=torch.bfloat16), make_layer(dtype=torch.bfloat16)
    files = {"weight": {}, "subnet": {}}
    for key, value in snapshot(layer).items():
        files["weight" if key in ("weight", "bias") else "subnet"][key] = value
    for name in sorted(files, key=first.__ne__):
        other.load_state_dict(files[name], strict=False)
    assert same_tensors(other.state_dict(), layer.state_dict())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("out_idx", torch.tensor([0, 3, 7]), r"out_idx must be in \[0, 7\)"),
        ("in_idx", torch.tensor([2, 1, 4, 7, 9]), "in_idx must be sorted"),
        ("in_idx", IN.float(), "in_idx must be a 1-D int64 tensor"),
        ("in_idx", IN[:4], r"the checkpoint's subnet is \(3, 4\), ours \(3, 5\)"),
    ],
)
def test_a_checkpoint_with_bad_indices_names_the_layer_and_changes_nothing(key, value, message):
    model = nn.ModuleDict({"up": make_layer()})
    before = snapshot(model)
    bad = {f"up.{name}": tensor for name, tensor in trained_layer().state_dict().items()} | {
        f"up.{key}": value
    }
    with pytest.raises(ValueError, match="up: " + message):
        model.load_state_dict(bad)
    assert same_tensors(model.state_dict(), before)
    alone = LoSiALinear.from_linear(nn.Linear(10, 7), 0.5, name="head")
    with pytest.raises(ValueError, match="head: " + message):
        alone.load_state_dict({name.removeprefix("up."): tensor for name, tensor in bad.items()})


def test_repr_tells_the_share():
    assert "in_features=10, out_features=7, bias=True, subnet=(3, 5), trained=21.43%" in repr(
        make_layer()
    )


@pytest.mark.parametrize("converted", [False, True])
def test_made_on_meta_it_has_the_places_that_were_drawn(converted):
    if converted:
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(8, 8))
        model = apply_losia(model, paper(rank_factor=0.5, seed=3))
        expected = apply_losia(nn.Sequential(nn.Linear(8, 8)), paper(rank_factor=0.5, seed=3))
    else:
        torch.manual_seed(0)
        with torch.device("meta"):
            model = nn.Sequential(LoSiALinear(8, 8, rank_factor=0.5))
        expected = None
    model.to_empty(device="cpu")
    for parameter in (model[0].weight, model[0].bias):
        nn.init.uniform_(parameter)
    model[0].current_subnet.check((8, 8), "it")
    if expected is not None:
        assert torch.equal(model[0].in_idx, expected[0].in_idx)
    optimizer = torch.optim.SGD([model[0].subnet], lr=0.1)
    before = model[0].weight.clone()
    model(torch.ones(1, 8)).sum().backward()
    assert torch.equal(model[0].current_subnet.gather(before), model[0].subnet)
    optimizer.step()
    model[0].write_back_()
    assert not torch.equal(model[0].weight, before)
