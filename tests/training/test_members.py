"""What an optimizer finds in a model: layers placed by hand, and flags set after a conversion."""

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from losia_kernels import (
    LoSiAAdamW,
    LoSiALinear,
    apply_losia,
    attach,
    calibrate,
    export_state_dict,
    losia_layers,
    remove_losia,
)
from tests.tiny import paper, same_tensors


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


CONFIG = paper(period=3, seed=1)


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
    model = apply_losia(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), paper(rank_factor=0.5))
    model.append(LoSiALinear(16, 16))
    with pytest.raises(ValueError, match="2: a LoSiALinear placed by hand beside those"):
        LoSiAAdamW(model)


def test_a_config_beside_that_of_apply_losia_is_refused():
    model = apply_losia(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), paper(rank_factor=0.5))
    with pytest.raises(ValueError, match="apply_losia .or PEFT. has been given one already"):
        LoSiAAdamW(model, config=CONFIG)
    LoSiAAdamW(model, config=paper(rank_factor=0.5))  # the same


# requires_grad_ after the conversion --------------------------------------------------------------


def converted() -> nn.Module:
    plain = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    return apply_losia(plain, paper(rank_factor=0.5))


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
    model = apply_losia(plain, paper(rank_factor=0.5, modules_to_save=["1"]))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert flags["1.weight"] and not flags["0.weight"]
    after = remove_losia(model).named_parameters()
    assert {name: parameter.requires_grad for name, parameter in after} == before


def test_flags_set_since_the_conversion_stay():
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    compiled = torch.compile(model, backend="eager")
    apply_losia(compiled, paper(rank_factor=0.5, modules_to_save=["1"]))
    model[1].weight.requires_grad_(False)
    remove_losia(compiled)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"1.weight"}


def test_flags_are_those_that_were_found_when_a_conversion_fails():
    plain = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1))
    with pytest.raises(ValueError, match="selects none of 1"):
        apply_losia(plain, paper(rank_factor=0.5, rank_pattern={"1": 0.5}))
    assert all(parameter.requires_grad for parameter in plain.parameters())


# what was found by trying -------------------------------------------------------------------------


def test_places_are_found_anew_for_each_model():
    """Also of layers that another optimizer had in another order."""
    first, second = LoSiALinear(8, 8, rank_factor=0.5), LoSiALinear(8, 8, rank_factor=0.5)
    LoSiAAdamW(nn.Sequential(first, second), config=CONFIG)
    timeline = LoSiAAdamW(nn.Sequential(second, first)).timeline
    assert timeline.groups == [[second], [first]] and timeline.config.period == 3
    model = make(Blocks)
    for block in model.blocks:
        LoSiAAdamW(block, config=CONFIG)
    assert LoSiAAdamW(model).timeline.group_names == ["blocks.0", "blocks.1", "head"]


def test_names_and_order_are_those_inside_of_ddp_and_compile():
    model = make(Blocks)
    model.get_output_embeddings = lambda: model.head
    expected = LoSiAAdamW(model).timeline
    names = [layer.name for layer in expected.layers]
    compiled = LoSiAAdamW(torch.compile(model, backend="eager")).timeline
    assert compiled.group_names == expected.group_names == ["head", "blocks.0", "blocks.1"]
    assert [layer.name for layer in compiled.layers] == names


def test_a_shared_weight_is_refused():
    model = make(Blocks)
    model.blocks[1].fc1.weight = model.blocks[0].fc1.weight
    with pytest.raises(ValueError, match="'blocks.0.fc1' and 'blocks.1.fc1' share one weight"):
        LoSiAAdamW(model)


def test_indices_that_nobody_drew_are_refused():
    model = make()
    model.fc2.out_idx[:2] = 7
    with pytest.raises(ValueError, match="fc2: out_idx must be .*made without its data"):
        LoSiAAdamW(model)


def test_a_computed_weight_is_refused():
    model = make()
    prune.random_unstructured(model.fc1, "weight", 0.5)
    with pytest.raises(ValueError, match="fc1: its weight is computed"):
        LoSiAAdamW(model)


def test_a_layer_trained_in_full_has_no_turn():
    model = make()
    model.fc2 = LoSiALinear(32, 8, rank_factor=1.0)
    optimizer = LoSiAAdamW(model, lr=0.03, config=CONFIG)
    assert optimizer.timeline.group_names == ["fc1"] and optimizer.timeline.dense == [model.fc2]
    train(model, optimizer, 7)
    assert int(optimizer.state[model.fc2.subnet]["step"]) == 7


@pytest.mark.parametrize("refused", ["attach", "moments", "in_backward"])
def test_a_refused_optimizer_leaves_the_one_before(refused):
    model = make().half() if refused == "in_backward" else make()
    before = LoSiAAdamW(model, config=CONFIG)
    with pytest.raises(ValueError):
        if refused == "attach":
            attach(torch.optim.SGD([torch.ones(1)], lr=0.1), model, config=paper(period=9))
        elif refused == "moments":
            LoSiAAdamW(model, moments="fp8", config=paper(period=9))
        else:
            LoSiAAdamW(model, in_backward=True, config=paper(period=9))
    assert before.timeline.drives and LoSiAAdamW(model).timeline.config.period == 3


def test_a_config_in_the_place_of_the_rate():
    with pytest.raises(TypeError, match="lr must be a number, got LoSiAConfig.*config="):
        LoSiAAdamW(make(), CONFIG)


def test_partly_frozen_models_are_attached():
    model = converted()
    model[0].subnet.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.warns(UserWarning, match="0: frozen"):
        attach(optimizer, model)
    with pytest.warns(UserWarning, match="got no gradient|no subnet"):
        optimizer.step()


def test_attached_16_bit_subnets_are_warned_of():
    model = apply_losia(nn.Sequential(nn.Linear(16, 16)).bfloat16(), paper(master="none"))
    with pytest.warns(UserWarning, match="rounds subnets that are kept in 16 bits to nearest"):
        attach(torch.optim.SGD([model[0].subnet], lr=0.1), model)


def test_a_half_that_no_timeline_drives_is_not_left_behind_in_silence():
    halves = nn.ModuleList([make(), make()])
    subnets = [layer.subnet for _, layer in losia_layers(halves)]
    optimizer = torch.optim.AdamW(subnets, lr=0.01, fused=True)
    attach(optimizer, halves[0], config=CONFIG)
    (loss_of(halves[0]) + loss_of(halves[1])).backward()
    optimizer.step()
    halves[0](X)
    with pytest.raises(RuntimeError, match="stepped the subnet, but its values are not in the"):
        halves[1](X)


def test_layers_are_made_while_others_step():
    stop = threading.Event()

    def convert() -> None:
        while not stop.is_set():
            LoSiALinear(4, 4, rank_factor=0.5)

    other = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(other.parameters(), fused=True)
    thread = threading.Thread(target=convert)
    thread.start()
    try:
        for _ in range(200):
            other(torch.ones(1, 4)).sum().backward()
            optimizer.step()
    finally:
        stop.set()
        thread.join()
