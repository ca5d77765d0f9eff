"""attach: any torch optimizer gets the timeline; with torch's AdamW it is LoSiAAdamW."""

import io
import sys
from unittest import mock

import pytest
import torch
from torch import nn

from losia_kernels import LoSiAAdamW, apply_losia, attach
from losia_kernels.layers.module import losia_layers
from tests.tiny import (
    make_batches,
    paper,
    places,
    same_tensors,
    snapshot,
    take_step,
    tiny_lm,
    trainable,
)


def make_model(dtype=torch.float32, **options) -> nn.Module:
    return apply_losia(tiny_lm().to(dtype), paper(**{"rank_factor": 0.5, "period": 2} | options))


FAMILY = {
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "Adam": (torch.optim.Adam, {}),
    "SGD momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD": (torch.optim.SGD, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
}


@pytest.mark.parametrize(("kind", "options"), FAMILY.values(), ids=FAMILY.keys())
@pytest.mark.parametrize(
    "config",
    [
        {"output_dim_factor": 0.5, "modules_to_save": ["norm"]},
        {"update_type": "sync", "reset_step": False},
    ],
    ids=["async", "sync, step kept"],
)
def test_any_optimizer_gets_the_timeline_and_the_write_back(kind, options, config):
    model = make_model(**config)
    optimizer = kind(trainable(model), lr=0.01, **options)
    timeline = attach(optimizer, model)
    for batch in make_batches(2 * timeline.schedule.cycle):
        before, trained = (
            places(model),
            {name: layer.subnet.clone() for name, layer in losia_layers(model)},
        )
        moving = {
            layer.name
            for group in timeline.schedule.moving(timeline.step)
            for layer in timeline.groups[group]
        }
        take_step(model, optimizer, batch)
        for name, layer in losia_layers(model):
            assert torch.equal(layer.current_subnet.gather(layer.weight), layer.subnet)
            if name in moving and not config.get("reset_step", True):
                state = optimizer.state[layer.subnet]
                assert all(
                    not value.any()
                    for key, value in state.items()
                    if isinstance(value, torch.Tensor) and key != "step"
                )
                assert state.get("step", 8) > 1
            elif name in moving:
                assert not optimizer.state.get(layer.subnet)
            else:
                assert places(model)[name] == before[name] and not torch.equal(
                    layer.subnet, trained[name]
                )
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"output_dim_factor": 0.5, "importance": "marginal"},
        {"update_type": "sync", "reset_step": False},
        {
            "output_dim_factor": 1.0,
            "modules_to_save": ["norm"],
            "importance": "gradient",
            "warmup_steps": 3,
        },
    ],
)
def test_attached_to_adamw_it_is_losia_adamw(dtype, config):
    hyper = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    ours, theirs = make_model(dtype, **config), make_model(dtype, **config)
    one, other = LoSiAAdamW(ours, **hyper), torch.optim.AdamW(trainable(theirs), **hyper)
    attach(other, theirs)
    schedulers = [
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95) for optimizer in (one, other)
    ]
    start = places(ours)
    tolerance = (
        {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    )
    for batch in make_batches(2 * one.timeline.schedule.cycle + 1):
        take_step(ours, one, batch)
        take_step(theirs, other, batch)
        for scheduler in schedulers:
            scheduler.step()
        assert places(ours) == places(theirs)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **tolerance)
    assert places(ours) != start


def test_the_users_parameter_groups_keep_their_options():
    model = make_model(modules_to_save=["norm"])
    first = [layer.subnet for name, layer in losia_layers(model) if name.endswith("up_proj")]
    rest = [
        p
        for p in model.parameters()
        if p.requires_grad and not any(p is subnet for subnet in first)
    ]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": first, "lr": 0.1}, {"params": rest + frozen, "weight_decay": 0.5}], lr=1
    )
    attach(optimizer, model)
    found = [
        (g["lr"], g["weight_decay"], g["layer_group"], len(g["params"]))
        for g in optimizer.param_groups
    ]
    left = len(rest) - 2 + len(frozen)
    assert found == [
        (0.1, 0.01, 0, 1),
        (0.1, 0.01, 1, 1),
        (1, 0.5, 0, 1),
        (1, 0.5, 1, 1),
        (1, 0.5, None, left),
    ]


def test_a_closure():
    model, other = make_model(), make_model()
    optimizer, reference = (
        torch.optim.AdamW(trainable(model), lr=0.01),
        torch.optim.AdamW(trainable(other), lr=0.01),
    )
    attach(optimizer, model)
    attach(reference, other)
    for batch in make_batches(5):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            return loss

        optimizer.step(closure)
        take_step(other, reference, batch)
    assert same_tensors(model.state_dict(), other.state_dict())


def lacks_a_subnet(model):
    return torch.optim.AdamW(trainable(model)[1:])


def has_a_scheduler(model):
    optimizer = torch.optim.AdamW(trainable(model))
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    return optimizer


def has_stepped(model):
    optimizer = torch.optim.AdamW(trainable(model))
    take_step(model, optimizer, *make_batches(1))
    return optimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lacks_a_subnet, "does not hold the subnet of model.layers.0.up_proj"),
        (has_a_scheduler, "scheduler already; attach first"),
        (has_stepped, "has taken steps already"),
    ],
)
def test_too_late_or_too_little_is_an_error_that_changes_nothing(make, message):
    model = make_model()
    optimizer = make(model)
    before, groups = snapshot(model), [list(group["params"]) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        attach(optimizer, model)
    assert all(layer.observe_callback is None for _, layer in losia_layers(model))
    assert same_tensors(model.state_dict(), before)
    assert all(
        a is b
        for g, h in zip(groups, optimizer.param_groups, strict=True)
        for a, b in zip(g, h["params"], strict=False)
    )
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_an_optimizer_is_not_driven_twice():
    model = make_model()
    optimizer = torch.optim.AdamW(trainable(model))
    attach(optimizer, model)
    with pytest.raises(ValueError, match="drives the subnets already"):
        attach(optimizer, model)
    with pytest.raises(ValueError, match="drives the subnets already"):
        attach(LoSiAAdamW(model), model)


def test_model_and_optimizer_in_the_other_order_are_told_apart():
    model = make_model()
    with pytest.raises(TypeError, match="expected the optimizer, then the model; got TinyLM first"):
        attach(model, torch.optim.SGD(trainable(model), lr=0.01))  # type: ignore[arg-type]


def test_a_step_that_raises_leaves_no_rewarmed_rate_behind():
    """Out of memory in a closure, say, which the user catches: the next step's rate is the
    scheduled one."""
    model = make_model(period=1)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    timeline = attach(optimizer, model)
    batches = make_batches(4)
    for batch in batches[:3]:
        take_step(model, optimizer, batch)
    plain = [group["lr"] for group in optimizer.param_groups]
    timeline.lr_factor = lambda group: 0.5

    def fails():
        raise MemoryError

    with pytest.raises(MemoryError):
        optimizer.step(fails)
    assert [group["lr"] for group in optimizer.param_groups] == plain
    take_step(model, optimizer, batches[3])
    assert [group["lr"] for group in optimizer.param_groups] == plain


def test_a_model_without_subnets_is_refused():
    model = tiny_lm()
    with pytest.raises(ValueError, match="call apply_losia"):
        attach(torch.optim.AdamW(model.parameters()), model)


def test_a_run_shorter_than_a_cycle_warns():
    model = make_model(period=5)
    with pytest.warns(UserWarning, match="the largest period that gives every group a turn is 4"):
        attach(torch.optim.AdamW(trainable(model)), model, total_steps=9)


def test_detached_it_is_the_plain_optimizer_again():
    model = make_model()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    timeline = attach(optimizer, model)
    take_step(model, optimizer, *make_batches(1))
    timeline.detach()
    assert all(layer.observe_callback is None for _, layer in losia_layers(model))
    weight, before = model.model.layers[0].up_proj.weight.clone(), places(model)
    first, second = make_batches(2)
    take_step(model, optimizer, first)
    assert timeline.step == 1 and places(model) == before
    assert torch.equal(model.model.layers[0].up_proj.weight, weight)  # nobody writes back
    with pytest.raises(RuntimeError, match="layers.0.up_proj: an optimizer has stepped the subnet"):
        model(**second)
    assert "losia_step" not in optimizer.state_dict()["param_groups"][0]


@pytest.mark.parametrize("kind", ["AdamW", "SGD momentum", "Adafactor"])
@pytest.mark.parametrize("importance", ["sensitivity", "gradient", "marginal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stopped_at_any_step_it_resumes_bit_identically(kind, importance, dtype):
    build, options = FAMILY[kind]

    def start(seed):
        model = make_model(dtype, importance=importance, seed=seed)
        optimizer = build(trainable(model), lr=0.01, **options)
        attach(optimizer, model)
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)

    def run(model, optimizer, scheduler, batches):
        for batch in batches:
            take_step(model, optimizer, batch)
            scheduler.step()

    batches = make_batches(6)
    whole = start(seed=0)
    run(*whole, batches)
    for stop in range(6):
        first, second = start(seed=0), start(seed=1)
        run(*first, batches[:stop])
        file = io.BytesIO()
        torch.save([part.state_dict() for part in first], file)
        file.seek(0)
        for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        run(*second, batches[stop:])
        assert same_tensors(second[0].state_dict(), whole[0].state_dict()), stop


def test_named_parameters_keep_their_names():
    model = make_model()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(named, lr=0.01)
    attach(optimizer, model)
    names = {id(parameter): name for name, parameter in named}
    assert len(optimizer.param_groups) > 1
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(parameter)] for parameter in group["params"]]


@pytest.mark.parametrize("broken", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_step_that_is_broken_off_leaves_rates_and_decay_as_they_were(broken):
    """A scheduler's, a checkpoint's and the log's; rates of places at random are scaled in a step."""
    model = make_model(moves="random", init_subnet="random")
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01, weight_decay=0.1)
    attach(optimizer, model)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    take_step(model, optimizer, make_batches(1)[0])
    model(**make_batches(1)[0]).loss.backward()
    with mock.patch.object(sys.modules["torch.optim.adam"], "adam", side_effect=broken):
        with pytest.raises(broken):
            optimizer.step()
    saved = optimizer.state_dict()["param_groups"]
    assert {(group["lr"], group["weight_decay"]) for group in saved} == {(0.01, 0.1)}
    assert not [key for group in saved for key in group if key.startswith(("scheduled", "plain"))]
    scheduler.step(1.0)
    scheduler.step(1.0)
    take_step(model, optimizer, make_batches(1)[0])
    assert {group["lr"] for group in optimizer.param_groups} == {0.005}
