"""calibrate places every subnet where dense gradients of a plain model say, and leaves nothing else
behind."""

import gc
import warnings

import pytest
import torch
from torch import nn

from csrc_ref.importance import importance_ref
from csrc_ref.selection import select_marginal_ref
from losia_kernels import (
    LoSiAAdamW,
    LoSiAConfig,
    LoSiALinear,
    NonFiniteScoreError,
    apply_losia,
    attach,
    calibrate,
)
from losia_kernels.layers.module import losia_layers
from tests.tiny import make_batches, paper, places, same_tensors, snapshot, take_step, tiny_lm


def make_model(dtype=torch.float64, dropout=0.0, **options) -> nn.Module:
    config = paper(**{"rank_factor": 0.5, "period": 2} | options)
    return apply_losia(tiny_lm(dropout=dropout).to(dtype), config)


def top_marginals(
    batches: list[dict], sizes: dict[str, tuple[int, int]]
) -> dict[str, tuple[list[int], list[int]]]:
    """The choice by the smoothed sums of Eq. 3, from autograd's gradients of the untouched
    model."""
    plain = tiny_lm().double()
    sums = {name: (0.0, 0.0) for name in sizes}
    for batch in batches:
        plain.zero_grad()
        plain(**batch).loss.backward()
        for name, (out_sums, in_sums) in sums.items():
            weight = plain.get_parameter(f"{name}.weight")
            now = importance_ref(weight.detach(), weight.grad)
            sums[name] = 0.85 * out_sums + 0.15 * now.sum(1), 0.85 * in_sums + 0.15 * now.sum(0)
    return {name: select_marginal_ref(*sums[name], *sizes[name]) for name in sizes}


@pytest.mark.parametrize("options", [{}, {"output_dim_factor": 0.5}, {"output_dim_factor": 1.0}])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_neurons_of_largest_marginals_of_the_first_batches(options, steps):
    model, batches = make_model(**options), make_batches(5)
    before, weights = (
        places(model),
        {name: layer.weight.clone() for name, layer in losia_layers(model)},
    )
    sizes = {name: tuple(layer.subnet.shape) for name, layer in losia_layers(model)}
    assert calibrate(model, batches, steps=steps) is model
    chosen = places(model)
    assert chosen == top_marginals(batches[:steps], sizes) and chosen != before
    # the other batches would have said something else
    assert chosen != top_marginals(batches, sizes)
    for name, layer in losia_layers(model):
        assert torch.equal(layer.weight, weights[name])
        assert torch.equal(layer.subnet, layer.current_subnet.gather(layer.weight))


def test_a_scaled_loss_is_scaled_back():
    """2^20 is exact, and large enough that the importance's second order would rule."""
    plain, scaled, untold = make_model(), make_model(), make_model()
    calibrate(plain, make_batches(2))
    calibrate(
        scaled,
        make_batches(2),
        loss_fn=lambda model, batch: 2**20 * model(**batch).loss,
        loss_divisor=2**-20,
    )
    calibrate(untold, make_batches(2), loss_fn=lambda model, batch: 2**20 * model(**batch).loss)
    assert places(plain) == places(scaled) != places(untold)


def test_the_batches_are_as_many_as_there_are_at_most_steps_and_no_more_is_drawn():
    drawn = []
    stream = (drawn.append(1) or batch for batch in make_batches(9))
    calibrate(make_model(), stream, steps=3)
    assert len(drawn) == 3
    short = make_model()
    calibrate(short, make_batches(2), steps=4)
    sizes = {name: tuple(layer.subnet.shape) for name, layer in losia_layers(short)}
    assert places(short) == top_marginals(make_batches(2), sizes)


def test_another_loss():
    def halved(model, batch):
        return 0.5 * model(**batch).loss

    one, other, batches = make_model(), make_model(), make_batches(3)
    with torch.no_grad():
        for model in (one, other):
            model.lm_head.weight.mul_(50)  # large gradients: the second-order term of Eq. 3 decides
    calibrate(one, batches)
    calibrate(other, batches, loss_fn=halved)
    assert places(one) != places(other)


def living_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left(training):
    model = make_model(modules_to_save=["embed_tokens"]).train(training)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    random_state = torch.get_rng_state()
    tensors = living_tensors()
    calibrate(model, make_batches(3))
    assert living_tensors() <= tensors
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(
        layer._probe is None and layer.observe_callback is None for _, layer in losia_layers(model)
    )


def test_a_layer_no_batch_reaches_stays():
    model = make_model()
    unused = model.model.layers[0]
    model.model.layers[0] = nn.Identity()
    model.spare = unused
    before = snapshot(unused)
    calibrate(model, make_batches(2))
    assert same_tensors(unused.state_dict(), before)


# Errors -------------------------------------------------------------------------------------------


def infinite_loss(model, batch):
    return model(**batch).loss * float("inf")


def poisoned(model, batch):
    """A NaN that reaches the last block only."""
    x = model.model.layers[0](model.model.embed_tokens(batch["input_ids"]))
    y = model.model.layers[1](x.detach())
    return (y * float("nan")).sum() + x.sum()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batches": []}, ValueError, "no batch to calibrate with"),
        ({"batches": iter(())}, ValueError, "no batch to calibrate with"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"loss_fn": infinite_loss}, NonFiniteScoreError, "importance is not finite"),
        (
            {"loss_fn": poisoned},
            NonFiniteScoreError,
            r"model\.layers\.1\.\w+_proj: importance is not finite",
        ),
        (
            {"batches": [{"input_ids": torch.zeros(1, 2, dtype=torch.long), "oops": 1}]},
            TypeError,
            "oops",
        ),
        (
            {"batches": [{"input_ids": torch.zeros(1, 2, dtype=torch.long)}]},
            ValueError,
            "returned no loss for a batch of input_ids: put labels into it",
        ),
        (
            {"batches": [torch.zeros(1, 2, dtype=torch.long)]},
            TypeError,
            "a batch must be a dict .*, got Tensor",
        ),
    ],
)
def test_an_error_leaves_the_subnets_where_they_were(options, error, message):
    model = make_model()
    optimizer = LoSiAAdamW(model)
    before, callbacks = (
        snapshot(model),
        [layer.observe_callback for _, layer in losia_layers(model)],
    )
    with pytest.raises(error, match=message):
        calibrate(model, **{"batches": make_batches(2)} | options)
    assert same_tensors(model.state_dict(), before) and optimizer.timeline.step == 0
    assert [layer.observe_callback for _, layer in losia_layers(model)] == callbacks
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("model", [nn.Linear(4, 4), tiny_lm()])
def test_a_model_without_subnets_is_refused(model):
    with pytest.raises(ValueError, match="call apply_losia first"):
        calibrate(model, make_batches(1))


def test_a_model_that_is_only_trained_densely_has_nothing_to_place():
    model = apply_losia(nn.Sequential(nn.Linear(4, 4)), paper(rank_factor=1.0))
    with pytest.raises(ValueError, match="no LoSiALinear with a subnet to place"):
        calibrate(model, [torch.ones(2, 4)], loss_fn=lambda model, x: model(x).sum())


# With an optimizer --------------------------------------------------------------------------------


def attached(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01
    )
    attach(optimizer, model)
    return optimizer


@pytest.mark.parametrize(
    "drive", [lambda model: LoSiAAdamW(model, lr=0.01), attached], ids=["LoSiAAdamW", "attach"]
)
def test_an_optimizer_made_before_goes_on_observing(drive):
    """Calibrating before or after the optimizer is made gives the same run."""
    before, after = make_model(), make_model()
    runs = []
    for model, calibrate_first in ((before, True), (after, False)):
        if calibrate_first:
            calibrate(model, make_batches(2))
        optimizer = drive(model)
        if not calibrate_first:
            calibrate(model, make_batches(2))
        for batch in make_batches(5, seed=1):
            take_step(model, optimizer, batch)
        runs.append(places(model))
    assert same_tensors(before.state_dict(), after.state_dict()) and runs[0] == runs[1]


def placed_by_hand(rank_factor: float = 0.5) -> nn.Module:
    model = tiny_lm().requires_grad_(False)
    for block in model.model.layers:
        block.up_proj = LoSiALinear.from_linear(block.up_proj, rank_factor)
    return model


def told_in_the_first_step(model: nn.Module, **options) -> list[str]:
    optimizer = LoSiAAdamW(model, lr=0.01, **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for batch in make_batches(2):
            take_step(model, optimizer, batch)
    return [str(one.message) for one in told]


@pytest.mark.parametrize("scaled", [True, False])
def test_rates_for_places_at_random_of_calibrated_layers_placed_by_hand_are_said(scaled):
    model = calibrate(placed_by_hand(), make_batches(2))
    config = LoSiAConfig(init_subnet="random" if scaled else "calibrated")
    told = told_in_the_first_step(model, config=config)
    assert ["far too much there" in message for message in told] == [True] * scaled
    assert told_in_the_first_step(placed_by_hand(), config=LoSiAConfig()) == []


@pytest.mark.parametrize("options", [{"moves": "random"}, {"moves": "none"}])
def test_a_calibration_that_was_forgotten_is_said(options):
    """Rates are then those of calibrated subnets, at places drawn at random."""
    config = paper(rank_factor=0.5, **options)
    (told,) = told_in_the_first_step(apply_losia(tiny_lm(), config))
    assert "model.layers.0.up_proj's a 4th of what is right there; call calibrate" in told
    calibrated = calibrate(apply_losia(tiny_lm(), config), make_batches(2))
    loaded = apply_losia(tiny_lm(), config)
    loaded.load_state_dict(calibrated.state_dict())
    for model in (calibrated, loaded, apply_losia(tiny_lm(), paper(rank_factor=0.5, lr_of="full"))):
        assert told_in_the_first_step(model) == []
