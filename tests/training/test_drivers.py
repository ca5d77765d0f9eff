"""Which optimizer drives a model's subnets, and what of the model it trains beside them."""

import copy

import pytest
import torch
from torch import nn

from losia_kernels import LoSiAAdamW, apply_losia, attach
from losia_kernels.layers.module import losia_layers
from tests.tiny import make_batches, paper, same_tensors, snapshot, take_step, tiny_lm, trainable


def make_model(blocks=2, **options) -> nn.Module:
    return apply_losia(tiny_lm(blocks=blocks), paper(**{"rank_factor": 0.5} | options))


def observers(model: nn.Module) -> list[str]:
    return [name for name, layer in losia_layers(model) if layer.observe_callback is not None]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_a_new_optimizer_takes_over(first, second):
    """A notebook's cell is run again: the model trains as with the new one alone."""
    model, alone, batches = (
        make_model(period=2, blocks=3),
        make_model(period=2, blocks=3),
        make_batches(9),
    )
    old = LoSiAAdamW(model, lr=0.05, in_backward=first)
    for batch in batches[:3]:
        take_step(model, old, batch)
    alone.load_state_dict(model.state_dict())
    new, expected = LoSiAAdamW(model, lr=0.05, in_backward=second), LoSiAAdamW(alone, lr=0.05)
    assert observers(model) == observers(alone)
    for batch in batches[3:]:
        assert take_step(model, new, batch) == take_step(alone, expected, batch)
    assert same_tensors(model.state_dict(), alone.state_dict())
    with pytest.raises(RuntimeError, match="LoSiAAdamW no longer drives the subnets"):
        old.step()


@pytest.mark.parametrize("output_dim_factor", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("attached", [False, True])
def test_a_parameter_group_added_later_is_trained_beside_what_was(attached, output_dim_factor):
    """Gradual unfreezing."""
    model = make_model(period=50, output_dim_factor=output_dim_factor, modules_to_save=["norm"])
    optimizer = torch.optim.AdamW(trainable(model)) if attached else LoSiAAdamW(model)
    if attached:
        attach(optimizer, model)
    first, second = make_batches(2)
    take_step(model, optimizer, first)
    optimizer.add_param_group({"params": [model.model.embed_tokens.weight.requires_grad_(True)]})
    before = snapshot(model)
    take_step(model, optimizer, second)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    changed = {
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    assert (
        trained <= changed
        and "model.embed_tokens.weight" in trained
        and "model.norm.weight" in trained
    )


def test_subnets_that_are_unfrozen_later_have_the_rate_of_the_others():
    """Scaled, rewarmed, and in parameter groups that go their ways when they are detached."""

    def make(unfrozen: bool):
        model = make_model(period=3, moves="random", init_subnet="random")
        late = model.model.layers[1].requires_grad_(False)
        for name in ("up_proj", "down_proj"):
            getattr(late, name).subnet.requires_grad_(unfrozen)
        optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
        timeline = attach(optimizer, model)
        return model, optimizer, timeline, [late.up_proj.subnet, late.down_proj.subnet]

    with pytest.warns(UserWarning, match="frozen, for 2 of 4"):
        model, optimizer, timeline, late = make(unfrozen=False)
    expected, control, _, others = make(unfrozen=True)
    for number, batch in enumerate(make_batches(8)):
        if number == 1:
            for subnet in late:
                subnet.requires_grad_(True)
            optimizer.add_param_group({"params": late})
        for run in ((model, optimizer), (expected, control)):
            run[0](**batch).loss.backward()
        for subnet in others if number == 0 else ():
            subnet.grad = None
        for each in (optimizer, control):
            each.step()
            each.zero_grad()
    assert same_tensors(model.state_dict(), expected.state_dict())
    timeline.detach()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert not any("layer_group" in group for group in optimizer.param_groups)


@pytest.mark.parametrize("attached", [False, True])
def test_an_edit_of_a_layer_that_a_step_leaves_out_stays(attached):
    model, batches = make_model(period=100), make_batches(3)
    optimizer = torch.optim.AdamW(trainable(model)) if attached else LoSiAAdamW(model)
    if attached:
        attach(optimizer, model)
    take_step(model, optimizer, batches[0])
    block = model.model.layers[1]
    with torch.no_grad():
        block.up_proj.weight.fill_(0.25)
    model.model.layers = nn.ModuleList([model.model.layers[0]])
    take_step(model, optimizer, batches[1])
    assert (block.up_proj.weight == 0.25).all()


def test_layers_of_two_configs_are_refused():
    model = nn.ModuleDict({name: nn.ModuleList([nn.Linear(8, 8)]) for name in ("vision", "text")})
    apply_losia(model["vision"], paper(rank_factor=0.5))
    apply_losia(model["text"], paper(rank_factor=0.25))
    with pytest.raises(ValueError, match="0: 2 layers .* converting parts of the model apart"):
        LoSiAAdamW(model)


@pytest.mark.parametrize(
    "refused",
    [
        lambda model: LoSiAAdamW(model, moments="fp8"),
        lambda model: LoSiAAdamW(model, total_steps=0),
        lambda model: attach(torch.optim.AdamW(trainable(model)), model, total_steps=0),
    ],
)
def test_an_optimizer_that_is_refused_takes_nothing_over(refused):
    model, batches = make_model(period=1), make_batches(3)
    optimizer = LoSiAAdamW(model)
    take_step(model, optimizer, batches[0])
    with pytest.raises(ValueError):
        refused(model)
    for batch in batches[1:]:
        take_step(model, optimizer, batch)


def test_after_detach_it_can_be_attached_again():
    model = make_model()
    optimizer = torch.optim.AdamW(trainable(model))
    attach(optimizer, model).detach()
    attach(optimizer, model)
    assert [group["layer_group"] for group in optimizer.param_groups] == [0, 1]


def test_a_copied_optimizer_says_that_it_drives_no_model():
    optimizer = LoSiAAdamW(apply_losia(tiny_lm(), paper(rank_factor=0.5)))
    with pytest.raises(RuntimeError, match="a copy of a LoSiAAdamW .* drives no model"):
        copy.deepcopy(optimizer).step()
