"""What an optimizer finds in a model: layers placed by hand, and flags set after a conversion."""

import pytest
import torch
from torch import Tensor, nn

from losia_kernels import (
    LoSiAAdamW,
    LoSiAConfig,
    LoSiALinear,
    apply_losia,
    attach,
    calibrate,
    export_state_dict,
    losia_layers,
    remove_losia,
)
from tests.tiny import same_tensors


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = LoSiALinear(16, 32, rank_factor=0.25)
        self.fc2 = LoSiALinear(32, 8, rank_factor=0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MLP() for _ in range(2))
        self.head = LoSiALinear(8, 5, rank_factor=0.5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.cat([block(x), x[..., 8:]], -1)
        return self.head(x[..., :8])


X = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, x: Tensor = X) -> Tensor:
    return (model(x) - torch.sin(x[..., : model(x).shape[-1]])).square().mean()


def make(kind: type[nn.Module] = MLP, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def places(model: nn.Module) -> dict[str, list[int]]:
    return {name: layer.in_idx.tolist() for name, layer in losia_layers(model)}


CONFIG = LoSiAConfig(period=3, seed=1)


@pytest.mark.parametrize("driven", ["LoSiAAdamW", "attach"])
def test_it_learns_and_moves(driven):
    model = make()
    before = places(model)
    if driven == "attach":
        subnets = [layer.subnet for _, layer in losia_layers(model)]
        optimizer = torch.optim.AdamW(subnets, lr=0.03, weight_decay=0.0)
        timeline = attach(optimizer, model, config=CONFIG)
    else:
        optimizer = LoSiAAdamW(model, lr=0.03, config=CONFIG)
        timeline = optimizer.timeline
    assert timeline.group_names == ["fc1", "fc2"] and timeline.config.period == 3
    losses = train(model, optimizer, 12)
    assert losses[-1] < 0.8 * losses[0]
    assert all(places(model)[name] != idx for name, idx in before.items())


def test_groups_follow_blocks_and_what_is_outside_comes_after():
    timeline = LoSiAAdamW(make(Blocks)).timeline
    assert timeline.group_names == ["blocks.0", "blocks.1", "head"]
    assert [[layer.name for layer in group] for group in timeline.groups] == [
        ["blocks.0.fc1", "blocks.0.fc2"],
        ["blocks.1.fc1", "blocks.1.fc2"],
        ["head"],
    ]


def test_the_output_layer_comes_first():
    model = make(Blocks)
    model.get_output_embeddings = lambda: model.head
    timeline = LoSiAAdamW(model).timeline
    assert timeline.group_names == ["head", "blocks.0", "blocks.1"]
    assert timeline.groups[0][0].membership.is_output


def test_calibrated_exported_and_removed():
    model = make()
    before = places(model)
    calibrate(model, [X], loss_fn=loss_of)
    assert places(model) != before
    optimizer = LoSiAAdamW(model, lr=0.03, config=CONFIG)
    train(model, optimizer, 5)
    expected = model(X)
    exported = export_state_dict(model)
    assert list(exported) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    plain = remove_losia(model)
    assert type(plain.fc1) is nn.Linear and torch.equal(plain(X), expected)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert same_tensors(plain.state_dict(), exported)


def test_a_config_that_is_none():
    with pytest.raises(TypeError, match="config must be a LoSiAConfig, got dict"):
        LoSiAAdamW(make(), config={"period": 3})


def test_a_layer_placed_beside_converted_ones_is_named():
    model = apply_losia(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), LoSiAConfig(rank_factor=0.5))
    model.append(LoSiALinear(16, 16))
    with pytest.raises(ValueError, match="2: a LoSiALinear placed by hand beside those"):
        LoSiAAdamW(model)


def test_a_config_beside_that_of_apply_losia_is_refused():
    model = apply_losia(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), LoSiAConfig(rank_factor=0.5))
    with pytest.raises(ValueError, match="apply_losia has been given one already"):
        LoSiAAdamW(model, config=CONFIG)
    LoSiAAdamW(model, config=LoSiAConfig(rank_factor=0.5))  # the same


# requires_grad_ after the conversion --------------------------------------------------------------


def converted() -> nn.Module:
    plain = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    return apply_losia(plain, LoSiAConfig(rank_factor=0.5))


@pytest.mark.parametrize("model", [make(), converted()], ids=["by hand", "converted"])
def test_a_frozen_model_is_noticed(model):
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no subnet requires a gradient"):
        LoSiAAdamW(model)


@pytest.mark.parametrize("model", [make(), converted()], ids=["by hand", "converted"])
def test_an_unfrozen_model_is_noticed(model):
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="(fc1|0): its weight requires a gradient"):
        LoSiAAdamW(model)


def test_some_frozen_subnets_are_named():
    model = converted()
    model[0].subnet.requires_grad_(False)
    with pytest.warns(UserWarning, match="0: frozen, for 1 of 2 subnets require no gradient"):
        LoSiAAdamW(model)


def test_removed_the_flags_are_those_that_were_found():
    plain = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
    plain[1].requires_grad_(False)
    plain[2].bias.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
    model = apply_losia(plain, LoSiAConfig(rank_factor=0.5, modules_to_save=["1"]))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert flags["1.weight"] and not flags["0.weight"]
    after = remove_losia(model).named_parameters()
    assert {name: parameter.requires_grad for name, parameter in after} == before


def test_flags_are_those_that_were_found_when_a_conversion_fails():
    plain = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1))
    with pytest.raises(ValueError, match="selects none of 1"):
        apply_losia(plain, LoSiAConfig(rank_factor=0.5, rank_pattern={"1": 0.5}))
    assert all(parameter.requires_grad for parameter in plain.parameters())
