"""attach with optimizers from outside torch, whose state and options are of other kinds: the method
stays the same."""

import importlib
import io

import pytest
import torch

from losia_kernels import LoSiAAdamW, apply_losia, attach
from losia_kernels.layers.module import losia_layers
from tests.tiny import make_batches, paper, places, same_tensors, take_step, tiny_lm

ADAFACTOR = {"relative_step": False, "scale_parameter": False, "warmup_init": False}
OPTIMIZERS = {  # module, name, options
    "Lion": ("lion_pytorch", "Lion", {}),
    "transformers Adafactor": ("transformers.optimization", "Adafactor", ADAFACTOR),
    "bitsandbytes AdamW8bit": ("bitsandbytes.optim", "AdamW8bit", {"min_8bit_size": 1}),
    "bitsandbytes Lion8bit": ("bitsandbytes.optim", "Lion8bit", {"min_8bit_size": 1}),
    "torchao AdamW8bit": ("torchao.optim", "AdamW8bit", {}),
}
QUANTIZED = ["bitsandbytes AdamW8bit", "torchao AdamW8bit"]


def make(kind: str, lr: float = 0.01, **config):
    module, name, options = OPTIMIZERS[kind]
    pytest.importorskip(module.partition(".")[0], exc_type=ImportError)
    model = apply_losia(tiny_lm(), paper(**{"rank_factor": 0.5, "period": 2} | config))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, getattr(importlib.import_module(module), name)(parameters, lr=lr, **options)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_subnets_move_when_losia_adamws_do_and_the_weights_follow(kind):
    model, optimizer = make(kind, output_dim_factor=0.5)
    twin = apply_losia(tiny_lm(), paper(rank_factor=0.5, period=2, output_dim_factor=0.5))
    reference = LoSiAAdamW(twin, lr=0.01)
    timeline = attach(optimizer, model)
    assert optimizer.timeline is timeline
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for batch in make_batches(2 * timeline.schedule.cycle):
        before = [places(m) for m in (model, twin)]
        weights = {name: layer.weight.clone() for name, layer in losia_layers(model)}
        moving = {
            layer.name
            for group in timeline.schedule.moving(timeline.step)
            for layer in timeline.groups[group]
        }
        take_step(model, optimizer, batch)
        take_step(twin, reference, batch)
        for name, layer in losia_layers(model):
            assert torch.equal(layer.current_subnet.gather(layer.weight), layer.subnet)
            assert not torch.equal(layer.weight, weights[name]), "it did not train"
            assert bool(optimizer.state.get(layer.subnet)) != (name in moving)
        for was, now in zip(before, (places(model), places(twin)), strict=True):
            assert {name for name in now if now[name] != was[name]} <= moving
        assert timeline.observing == reference.timeline.observing
        scheduler.step()
    lr = 0.01 * 0.5 ** (2 * timeline.schedule.cycle)
    # or float32
    assert all(
        float(group["lr"]) == pytest.approx(lr, rel=1e-6) for group in optimizer.param_groups
    )


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if "Lion8bit" not in kind])
def test_stopped_across_a_relocalization_it_resumes_bit_identically(kind):
    batches = make_batches(6)
    whole, optimizer = make(kind)
    attach(optimizer, whole)
    for batch in batches:
        take_step(whole, optimizer, batch)
    for stop in (1, 2, 3):
        first, optimizer = make(kind)
        attach(optimizer, first)
        for batch in batches[:stop]:
            take_step(first, optimizer, batch)
        file = io.BytesIO()
        torch.save([first.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        second, optimizer = make(kind, seed=1)
        timeline = attach(optimizer, second)
        second.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        assert timeline.step == stop
        for batch in batches[stop:]:
            take_step(second, optimizer, batch)
        assert same_tensors(second.state_dict(), whole.state_dict()), stop


def test_a_checkpoint_of_another_config_is_refused_where_the_optimizer_runs_no_hooks():
    model, optimizer = make("bitsandbytes AdamW8bit")
    timeline = attach(optimizer, model)
    _, other = make("bitsandbytes AdamW8bit")
    with pytest.raises(ValueError, match="no losia_step"):
        optimizer.load_state_dict(other.state_dict())
    timeline.detach()
    optimizer.load_state_dict(
        other.state_dict() | {"param_groups": optimizer.state_dict()["param_groups"]}
    )


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_moments_cannot_be_kept(kind):
    """They could only be dropped as a whole; zeros of the codes would not be zeros."""
    module, name, _ = OPTIMIZERS[kind]
    pytest.importorskip(module.partition(".")[0], exc_type=ImportError)
    config = paper(rank_factor=0.5, period=1, reset_step=False)
    # smaller subnets are not quantized
    model = apply_losia(torch.nn.Sequential(torch.nn.Linear(128, 128)), config)
    optimizer = getattr(importlib.import_module(module), name)([model[0].subnet], lr=0.01)
    attach(optimizer, model)
    model(torch.randn(3, 128)).square().sum().backward()
    with pytest.raises(
        ValueError, match="AdamW8bit keeps .* quantized.*reset_step=False needs another optimizer"
    ):
        optimizer.step()


def test_a_learning_rate_of_the_optimizers_own_is_refused():
    transformers = pytest.importorskip("transformers")
    model = apply_losia(tiny_lm(), paper(rank_factor=0.5))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = transformers.optimization.Adafactor(parameters)
    with pytest.raises(
        ValueError, match="Adafactor sets its own learning rate.*relative_step=False"
    ):
        attach(optimizer, model)
    assert not any(layer.observe_callback for _, layer in losia_layers(model))


def test_learning_rates_that_are_tensors_are_one_for_each_group():
    model = apply_losia(tiny_lm(), paper(rank_factor=0.5))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=torch.tensor(0.01), foreach=False)
    attach(optimizer, model)
    optimizer.param_groups[0]["lr"].fill_(0.5)
    assert [round(float(group["lr"]), 2) for group in optimizer.param_groups] == [0.5, 0.01]


def test_a_step_that_a_grad_scaler_makes_a_fused_optimizer_skip_is_no_step_of_the_clock():
    model = apply_losia(tiny_lm(), paper(rank_factor=0.5, period=1))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, fused=True)
    timeline = attach(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    first, second = make_batches(2)
    places_before, taken = places(model), []
    for batch, factor in ((first, float("inf")), (second, 1.0)):
        timeline.loss_divisor = 1 / scaler.get_scale()
        scaler.scale(model(**batch).loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        taken.append(timeline.step)
    assert taken == [0, 1] and places(model) != places_before
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
