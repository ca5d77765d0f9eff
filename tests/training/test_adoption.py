"""Layers placed by hand: an optimizer gives them their turns, and all else is as after
``apply_losia``."""

import io
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from losia_kernels import (
    LoSiAAdamW,
    LoSiALinear,
    apply_losia,
    attach,
    export_state_dict,
    losia_layers,
    remove_losia,
)
from tests.tiny import paper

CONFIG = paper(period=2)
X = torch.linspace(-1, 1, 48).view(6, 8).sin()


class Block(nn.Module):
    def __init__(self, linear=LoSiALinear):
        super().__init__()
        self.up, self.down = linear(8, 16), linear(16, 8)

    def forward(self, x):
        return x + self.down(F.silu(self.up(x)))


class Deep(nn.Module):
    def __init__(self, linear=LoSiALinear):
        super().__init__()
        self.blocks = nn.ModuleList(Block(linear) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = LoSiALinear(8, 16), LoSiALinear(16, 8)

    def forward(self, x):
        return self.fc2(F.silu(self.fc1(x)))


class Surrounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = LoSiALinear(8, 8), LoSiALinear(8, 8)
        self.net = nn.Sequential(Block(), nn.SiLU(), Block())

    def forward(self, x):
        return self.last(self.net(self.first(x)))


def train(model, optimizer, steps):
    for _ in range(steps):
        (model(X).float() - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def start(make=Deep, optimizer="LoSiAAdamW", config=CONFIG, seed=0):
    """A model and what drives it."""
    torch.manual_seed(seed)
    model = make()
    if optimizer == "LoSiAAdamW":
        return model, LoSiAAdamW(model, lr=1e-2, config=config)
    attached = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    attach(attached, model, config=config)
    return model, attached


def same(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


# groups -------------------------------------------------------------------------------------------

MODELS = {
    "a ModuleList's children": (Deep, ["blocks.0", "blocks.1", "blocks.2"]),
    "one after the other": (Flat, ["fc1", "fc2"]),
    "a Sequential's children, and those outside": (Surrounded, ["first", "last", "net.0", "net.2"]),
    "one layer in a Sequential": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), LoSiALinear(8, 8)),
        ["2"],
    ),
}


@pytest.mark.parametrize("optimizer", ["LoSiAAdamW", "attach"])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_take_turns(name, optimizer):
    make, groups = MODELS[name]
    model, optimizer = start(make, optimizer)
    timeline = optimizer.timeline
    assert sorted(timeline.group_names) == groups
    moves = []
    timeline.listeners.append(lambda layer, subnet: moves.append((timeline.step, layer.name)))
    train(model, optimizer, 2 * len(groups))
    expected = [
        (2 * turn + 1, layer.name)
        for turn, layers in enumerate(timeline.groups)
        for layer in layers
    ]
    assert moves == expected


def test_a_compiled_model_has_the_same_groups():
    model = torch.compile(Deep(), backend="eager")
    timeline = LoSiAAdamW(model, config=CONFIG).timeline
    assert timeline.group_names == ["blocks.0", "blocks.1", "blocks.2"]


def test_it_is_the_training_of_apply_losia():
    torch.manual_seed(0)
    converted = apply_losia(Deep(nn.Linear), CONFIG)
    for parameter in converted.head.parameters():
        parameter.requires_grad_(True)
    placed = Deep()
    placed.load_state_dict(converted.state_dict())
    both = [
        LoSiAAdamW(converted, lr=1e-2),
        LoSiAAdamW(placed, lr=1e-2, config=CONFIG),
    ]
    for model, optimizer in zip((converted, placed), both, strict=True):
        train(model, optimizer, 7)
    assert same(converted, placed)


# configs ------------------------------------------------------------------------------------------


def test_what_a_config_says_of_sizes_cannot_act():
    with pytest.warns(UserWarning, match="rank_factor cannot act on layers that were placed by"):
        start(config=paper(rank_factor=0.5, period=2))


def test_what_a_config_says_of_the_master_cannot_act():
    with pytest.warns(UserWarning, match="master"):
        start(config=paper(period=2, master="none"))


def test_the_newest_config_counts_and_stays():
    model, _ = start()
    assert LoSiAAdamW(model).timeline.config.period == 2
    assert LoSiAAdamW(model, config=paper(period=5)).timeline.config.period == 5
    model.blocks[0].up = LoSiALinear(8, 16)
    assert LoSiAAdamW(model).timeline.config.period == 5


def test_auto_is_settled_by_the_steps():
    model = Deep()
    optimizer = LoSiAAdamW(model, config=paper(period="auto"), total_steps=24)
    assert optimizer.timeline.config.period == 4


def test_they_are_not_converted_once_more():
    with pytest.raises(ValueError, match="blocks.0.up is a LoSiALinear that was placed by hand"):
        apply_losia(Deep())


# resuming and leaving -----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["LoSiAAdamW", "attach"])
@pytest.mark.parametrize("model_first", [True, False])
def test_a_run_resumes_to_the_bit(optimizer, model_first):
    model, running = start(optimizer=optimizer)
    train(model, running, 5)  # in the middle of a slot
    file = io.BytesIO()
    torch.save((model.state_dict(), running.state_dict()), file)
    train(model, running, 6)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    pair = start(optimizer=optimizer, seed=1)
    for loader, state in list(zip(pair, states, strict=True))[:: 1 if model_first else -1]:
        loader.load_state_dict(state)
    train(*pair, 6)
    assert same(model, pair[0])


def test_a_state_of_another_config_is_named():
    model, optimizer = start()
    train(model, optimizer, 3)
    other = LoSiAAdamW(Deep(), config=paper(period=3))
    with pytest.raises(ValueError, match="LoSiAConfig.period=2, this run has 3"):
        other.load_state_dict(optimizer.state_dict())


def test_what_is_left_is_a_plain_model():
    model, optimizer = start()
    train(model, optimizer, 5)
    before, exported = model(X), export_state_dict(model)
    assert remove_losia(model) is model
    assert not list(losia_layers(model)) and type(model.blocks[0].up) is nn.Linear
    assert torch.equal(model(X), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    plain = Deep(nn.Linear)
    plain.load_state_dict(exported)
    assert torch.equal(plain(X), before)


def test_a_named_child_of_a_sequential():
    model = nn.Sequential(OrderedDict(body=Block(), tail=Block()))
    assert LoSiAAdamW(model, config=CONFIG).timeline.group_names == ["body", "tail"]


def test_a_model_that_is_one_layer_trains():
    model, optimizer = start(lambda: LoSiALinear(8, 4, rank_factor=0.5))
    before = model.weight.clone()
    train(model, optimizer, 3)
    assert not torch.equal(model.weight, before)


def test_a_model_that_is_one_layer_is_exported():
    assert list(export_state_dict(LoSiALinear(8, 8))) == ["weight", "bias"]


def test_a_model_that_is_one_layer_becomes_plain():
    assert type(remove_losia(LoSiALinear(8, 8))) is nn.Linear
