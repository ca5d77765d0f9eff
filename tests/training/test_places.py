"""What an optimizer keeps of a subnet belongs to a place: moved by others, it starts anew."""

import copy
import warnings

import pytest
import torch
from torch import nn

from losia_kernels import (
    LoSiAAdamW,
    apply_losia,
    attach,
    calibrate,
    export_state_dict,
    losia_layers,
)
from losia_kernels.training import timeline
from tests.tiny import make_batches, paper, same_tensors, take_step, tiny_lm

NEVER = 10**6


def make_run(driven: str, period: int = 2):
    model = apply_losia(tiny_lm(), paper(rank_factor=0.5, period=period))
    if driven == "LoSiAAdamW":
        return model, LoSiAAdamW(model, lr=0.01)
    if driven == "in_backward":
        return model, LoSiAAdamW(model, lr=0.01, in_backward=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    attach(optimizer, model)
    return model, optimizer


def start_anew(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _, layer in losia_layers(model):
        optimizer.state.pop(layer.subnet, None)


def elsewhere(layer) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(
        torch.tensor([i for i in range(size) if i not in set(idx.tolist())][: len(idx)])
        for size, idx in zip(layer.weight.shape, (layer.out_idx, layer.in_idx), strict=True)
    )


def load_back(model, saved):
    model.load_state_dict(saved)


def set_elsewhere(model, saved):
    for _, layer in losia_layers(model):
        layer.set_subnet_(*elsewhere(layer))


def calibrate_late(model, saved):
    calibrate(model, make_batches(2, seed=5), steps=2)


def copy_indices(model, saved):
    for _, layer in losia_layers(model):
        for name, idx in zip(("out_idx", "in_idx"), elsewhere(layer), strict=True):
            getattr(layer, name).copy_(idx)


def assign_indices(model, saved):
    for _, layer in losia_layers(model):
        layer.out_idx, layer.in_idx = elsewhere(layer)


@pytest.mark.parametrize("driven", ["LoSiAAdamW", "in_backward", "attach"])
@pytest.mark.parametrize(
    "move", [load_back, set_elsewhere, calibrate_late, copy_indices, assign_indices]
)
@pytest.mark.parametrize("steps", [6, 7])  # each group is once the one that observes
def test_moved_by_others_it_starts_anew(driven, move, steps):
    first, *batches, last = make_batches(steps)
    model, optimizer = make_run(driven)
    take_step(model, optimizer, first)
    saved = copy.deepcopy(model.state_dict())
    for batch in batches:
        take_step(model, optimizer, batch)
    twin, control = make_run(driven)
    twin.load_state_dict(model.state_dict())
    control.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (model, twin):
        move(each, copy.deepcopy(saved))
    start_anew(twin, control)
    for each, driver in ((model, optimizer), (twin, control)):
        take_step(each, driver, last)
    assert same_tensors(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("driven", ["LoSiAAdamW", "attach"])
@pytest.mark.parametrize("move", [set_elsewhere, copy_indices, assign_indices])
def test_a_gradient_is_of_the_place_that_it_came_from(driven, move):
    """Moved between backward and step, a subnet takes no step with it, and the next is its first."""
    model, optimizer = make_run(driven, NEVER)
    first, second, third = make_batches(3)
    take_step(model, optimizer, first)
    model(**second).loss.backward()
    move(model, None)
    before = {name: layer.weight.clone() for name, layer in losia_layers(model)}
    optimizer.step()
    optimizer.zero_grad()
    assert all(torch.equal(layer.weight, before[name]) for name, layer in losia_layers(model))
    take_step(model, optimizer, third)
    assert all(optimizer.state[layer.subnet]["step"] == 1 for _, layer in losia_layers(model))


def test_indices_that_are_none_are_refused_before_they_are_used():
    model, optimizer = make_run("LoSiAAdamW", NEVER)
    (first,) = make_batches(1)
    take_step(model, optimizer, first)
    layer = model.model.layers[0].up_proj
    layer.in_idx.copy_(layer.in_idx.flip(0))
    with pytest.raises(ValueError, match="layers.0.up_proj: in_idx must be sorted"):
        model(**first)


@pytest.mark.parametrize("driven", ["LoSiAAdamW", "attach"])
def test_the_same_places_keep_their_state(driven):
    """Also written anew: a checkpoint of now is loaded, an average is swapped in and out."""
    batches = make_batches(4)
    model, optimizer = make_run(driven, NEVER)
    plain, control = make_run(driven, NEVER)
    for batch in batches:
        take_step(model, optimizer, batch)
        take_step(plain, control, batch)
        now = copy.deepcopy(model.state_dict())
        model.load_state_dict(make_run(driven, NEVER)[0].state_dict())
        model.load_state_dict(now)
    assert same_tensors(model.state_dict(), plain.state_dict())
    layer = next(layer for _, layer in losia_layers(model))
    assert int(optimizer.state[layer.subnet]["step"]) == len(batches)


def test_buffers_that_are_sent_round_are_not_compared(monkeypatch):
    """As DistributedDataParallel does at every forward: it would make each step wait for the
    GPU."""
    model, optimizer = make_run("LoSiAAdamW", NEVER)
    first, second = make_batches(2)
    take_step(model, optimizer, first)
    for _, layer in losia_layers(model):
        layer.out_idx.copy_(layer.out_idx.clone())
        layer.in_idx.copy_(layer.in_idx.clone())
    monkeypatch.setattr(timeline, "_same", None)
    take_step(model, optimizer, second)


@pytest.mark.parametrize("driven", ["LoSiAAdamW", "in_backward", "attach"])
def test_an_optimizers_state_without_the_places_that_it_is_of_starts_anew(driven):
    """Resumed with the weights and the optimizer's state alone, as from a plain model folder."""
    model, optimizer = make_run(driven)
    for batch in make_batches(5):  # both groups have moved
        take_step(model, optimizer, batch)
    weights, state = export_state_dict(model), optimizer.state_dict()
    (batch,) = make_batches(1, seed=3)

    def resume(*, forget: bool):
        torch.manual_seed(0)
        model, optimizer = make_run(driven)
        model.load_state_dict(weights, strict=False)
        optimizer.load_state_dict(copy.deepcopy(state))
        if forget:
            start_anew(model, optimizer)
            optimizer.timeline.unplaced.clear()
        return model, optimizer

    expected = resume(forget=True)
    take_step(*expected, batch)
    resumed = resume(forget=False)
    with pytest.warns(UserWarning, match="was loaded, but not where the subnets were") as told:
        take_step(*resumed, batch)
        take_step(*resumed, batch)
    take_step(*expected, batch)
    assert len([one for one in told if "not where" in str(one.message)]) == 1
    assert same_tensors(resumed[0].state_dict(), expected[0].state_dict())


def written_in_place(model, state):
    """As from files, without torch's load_state_dict."""
    for name, layer in losia_layers(model):
        for key in ("out_idx", "in_idx", "weight", "subnet"):
            getattr(layer, key).detach().copy_(state[f"{name}.{key}"])


@pytest.mark.parametrize("load_model", [nn.Module.load_state_dict, written_in_place])
@pytest.mark.parametrize("first", ["model", "optimizer"])
@pytest.mark.parametrize("driven", ["LoSiAAdamW", "in_backward", "attach"])
@pytest.mark.filterwarnings("error:LoSiA.*the optimizer's state was loaded")
def test_in_either_order_they_are_loaded_as_they_were(driven, first, load_model):
    model, optimizer = make_run(driven)
    for batch in make_batches(5):
        take_step(model, optimizer, batch)
    other, of_other = make_run(driven)
    loads = [
        lambda: load_model(other, copy.deepcopy(model.state_dict())),
        lambda: of_other.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    ]
    for load in loads if first == "model" else reversed(loads):
        load()
    for batch in make_batches(3, seed=3):
        take_step(model, optimizer, batch)
        take_step(other, of_other, batch)
    assert same_tensors(model.state_dict(), other.state_dict())


class Branching(nn.Module):
    """Two blocks, each with a linear that only some batches use."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"always": nn.Linear(16, 16), "sometimes": nn.Linear(16, 16)})
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor, whole: bool) -> torch.Tensor:
        for layer in self.layers:
            for name in ("always", "sometimes") if whole else ("always",):
                x = x + layer[name](x).tanh()
        return x.square().mean()


@pytest.mark.filterwarnings("ignore:.*got no gradient in the first step")
@pytest.mark.parametrize("driven", ["LoSiAAdamW", "attach"])
@pytest.mark.parametrize("stays", ["not used in its slots", "all of the weight"])
def test_state_of_a_place_that_was_never_left_is_kept(driven, stays):
    """The places were loaded, and are those that were drawn: of an expert that got no token whenever
    it observed, and of a subnet that has but one."""
    config = paper(rank_factor=1.0 if stays == "all of the weight" else 0.5, period=2)

    def start():
        torch.manual_seed(0)
        model = apply_losia(Branching(), config)
        if driven == "LoSiAAdamW":
            return model, LoSiAAdamW(model, lr=0.01)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        attach(optimizer, model)
        return model, optimizer

    def step(model, optimizer, x):
        model(x, whole=0 not in optimizer.timeline.observing).backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = start()
    *batches, last = torch.randn(10, 4, 16)
    for batch in batches:
        step(model, optimizer, batch)
    twin, resumed = start()
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the optimizer's state was loaded")
        for run in ((model, optimizer), (twin, resumed)):
            step(*run, last)
    assert same_tensors(model.state_dict(), twin.state_dict())
