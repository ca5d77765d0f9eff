"""Random moves and none; whose learning rate an optimizer is given."""

import copy

import pytest
import torch
from torch import nn

from losia_kernels import (
    LoSiAAdamW,
    LoSiAConfig,
    apply_losia,
    attach,
    calibrate,
    losia_layers,
)
from tests.tiny import make_batches, same_tensors, snapshot, take_step, tiny_lm


def make_run(driven: str = "LoSiAAdamW", lr: float = 0.01, **options):
    model = apply_losia(tiny_lm(), LoSiAConfig(**{"rank_factor": 0.5, "period": 2} | options))
    if driven != "attach":
        return model, LoSiAAdamW(model, lr=lr, in_backward=driven == "in_backward")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    attach(optimizer, model)
    return model, optimizer


def places(model: nn.Module) -> dict[str, tuple]:
    named = losia_layers(model)
    return {n: (tuple(x.out_idx.tolist()), tuple(x.in_idx.tolist())) for n, x in named}


@pytest.mark.parametrize("driven", ["LoSiAAdamW", "in_backward", "attach"])
def test_random_moves_take_turns_and_nothing_observes(driven):
    model, optimizer = make_run(driven, moves="random")
    moved = []
    for step, batch in enumerate(make_batches(8)):
        assert not optimizer.timeline.observers
        assert all(layer.observe_callback is None for _, layer in losia_layers(model))
        before = places(model)
        take_step(model, optimizer, batch)
        after = places(model)
        moved.append({name.split(".")[2] for name in after if after[name] != before[name]})
        for _, layer in losia_layers(model):
            block = layer.current_subnet.gather(layer.weight)
            assert torch.equal(block, layer.subnet), f"{layer.name} after step {step}"
    assert moved == [set(), {"0"}, set(), {"1"}, set(), {"0"}, set(), {"1"}]
    held = {key for entries in optimizer.state.values() for key in entries}
    assert held == {"step", "exp_avg", "exp_avg_sq"}


def test_the_places_follow_from_the_seed_the_layer_and_the_step():
    runs = {}
    for name, seed, noise in (("first", 0, 0), ("again", 0, 1), ("other", 1, 0)):
        model, optimizer = make_run(moves="random", seed=seed)
        torch.manual_seed(noise)  # nobody's generator but the run's own
        seen = []
        for batch in make_batches(8):
            take_step(model, optimizer, batch)
            seen.append(places(model))
        runs[name] = seen
    assert runs["first"] == runs["again"]
    assert runs["first"][7] != runs["other"][7]
    assert runs["first"][3]["model.layers.0.up_proj"] != runs["first"][7]["model.layers.0.up_proj"]
    here, there = (runs["first"][3][f"model.layers.{i}.up_proj"] for i in (0, 1))
    assert here != there


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_run_with_random_moves_resumes_bit_for_bit(stop):
    batches = make_batches(7)
    model, optimizer = make_run(moves="random")
    for batch in batches[:stop]:
        take_step(model, optimizer, batch)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for batch in batches[stop:]:
        take_step(model, optimizer, batch)
    resumed, second = make_run(moves="random")
    resumed.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    for batch in batches[stop:]:
        take_step(resumed, second, batch)
    assert same_tensors(snapshot(model), snapshot(resumed))


def test_a_random_move_starts_the_moments_anew_and_is_rewarmed():
    model, optimizer = make_run(moves="random", period=3)
    first = dict(losia_layers(model))["model.layers.0.up_proj"]
    for batch in make_batches(3):
        take_step(model, optimizer, batch)
    assert first.subnet not in optimizer.state
    assert optimizer.timeline.lr_factor(0) == pytest.approx(1 / 3)
    assert optimizer.timeline.lr_factor(1) == 1.0


@pytest.mark.parametrize("period", [1, "auto"])
def test_without_moves_every_subnet_stays_and_no_period_is_needed(period):
    model, optimizer = make_run(moves="none", period=period)
    before = places(model)
    for batch in make_batches(6):
        take_step(model, optimizer, batch)
        assert not optimizer.timeline.observers
    assert places(model) == before
    assert optimizer.timeline.step == 6
    assert all(optimizer.timeline.lr_factor(group) == 1.0 for group in (0, 1))
    optimizer.timeline.plan(1)  # too short for no turn


def test_a_run_without_moves_is_torchs_adamw_on_the_subnets():
    model, optimizer = make_run(moves="none")
    plain, stock = make_run("attach", moves="none")
    for batch in make_batches(5):
        take_step(model, optimizer, batch)
        take_step(plain, stock, batch)
    assert same_tensors(snapshot(model), snapshot(plain))


def test_random_moves_in_a_run_that_is_too_short_for_them_are_told():
    model, _ = make_run(moves="random")
    with pytest.warns(UserWarning, match="never leave their first subnet"):
        LoSiAAdamW(model, lr=0.01, total_steps=2)


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"moves": "random", "init_subnet": "random", "importance": "marginal"}, "importance"),
        ({"moves": "none", "init_subnet": "random", "importance_beta1": 0.5}, "importance_beta1"),
        ({"moves": "none", "update_type": "sync"}, "update_type"),
        ({"moves": "none", "rewarm": False}, "rewarm"),
        ({"output_init": "frequency"}, "output_init"),
    ],
)
def test_a_field_that_cannot_act_is_named(options, idle):
    with pytest.warns(UserWarning, match=rf"LoSiAConfig\.{idle} cannot act"):
        apply_losia(tiny_lm(), LoSiAConfig(rank_factor=0.5, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"moves": "importance", "importance": "marginal"},
        {"moves": "random", "init_subnet": "random", "rewarm": False},
        {"output_init": "frequency", "output_dim_factor": 0.5},
    ],
)
def test_a_field_that_acts_is_not(options, recwarn):
    apply_losia(tiny_lm(), LoSiAConfig(rank_factor=0.5, **options))
    assert not [w for w in recwarn if "cannot act" in str(w.message)]


def test_an_adapter_moves_at_random_and_comes_out_again():
    """What it has left behind stays trained, and leaving it restores the base bit for bit."""
    peft = pytest.importorskip("peft")
    from losia_kernels.integrations.peft import LoSiAPeftConfig
    from tests.integrations.tiny_llama import make_model

    model = make_model()
    base = snapshot(model)
    config = LoSiAPeftConfig(rank_factor=0.25, shape="wide", moves="random", period=1)
    adapted = peft.get_peft_model(model, config)
    optimizer = LoSiAAdamW(adapted, lr=0.01)
    tokens = torch.arange(12).view(2, 6)
    for _ in range(5):
        before = places(adapted)
        take_step(adapted, optimizer, {"input_ids": tokens, "labels": tokens})
        assert places(adapted) != before and not optimizer.timeline.observers
    trained = adapted(input_ids=tokens).logits
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert torch.equal(merged(input_ids=tokens).logits, trained)
    assert same_tensors(snapshot(adapted.unload()), base)


# whose learning rate it is -------------------------------------------------------------------------

RANDOM = {"init_subnet": "random", "moves": "none"}


@pytest.mark.parametrize("driven", ["LoSiAAdamW", "in_backward", "attach"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_full_fine_tunings_rate_is_divided_by_the_share_that_is_trained(driven, share):
    """One step of AdamW moves every value by the rate, whatever its gradient."""
    pattern = {"layers.1.up_proj": (0.25, 1.0)}
    options = {"output_dim_factor": share, "rank_pattern": pattern, "shape": "square"}
    model, optimizer = make_run(driven, **RANDOM, **options)
    layers = dict(losia_layers(model))
    before = {name: layer.subnet.detach().clone() for name, layer in layers.items()}
    take_step(model, optimizer, make_batches(1)[0])
    for name, layer in layers.items():
        moved = (layer.subnet - before[name]).abs().amax().item()
        assert moved == pytest.approx(0.01 * layer.weight.numel() / layer.subnet.numel(), rel=1e-3)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    factors = {layer.weight.numel() / layer.subnet.numel() for layer in layers.values()}
    assert len(factors) >= 2


@pytest.mark.parametrize(
    ("options", "scaled"),
    [
        ({}, True),
        ({"init_subnet": "random", "moves": "none"}, True),
        ({"init_subnet": "calibrated"}, False),
        ({"moves": "importance"}, False),
        ({"moves": "importance", "lr_of": "full"}, True),
        ({"lr_of": "subnet"}, False),
    ],
)
def test_auto_means_full_fine_tunings_where_places_are_at_random(options, scaled):
    config = LoSiAConfig(**options)
    assert config.scales_lr is scaled and not LoSiAConfig.paper().scales_lr
    model = apply_losia(tiny_lm(), LoSiAConfig(**{"rank_factor": 0.5} | options))
    optimizer = LoSiAAdamW(model, lr=0.01)
    layer = dict(losia_layers(model))["model.layers.0.up_proj"]
    before = layer.subnet.detach().clone()
    take_step(model, optimizer, make_batches(1)[0])
    moved = (layer.subnet - before).abs().amax().item()
    assert moved == pytest.approx(0.04 if scaled else 0.01, rel=1e-3)


def test_attach_keeps_the_scale_through_a_scheduler_and_detach():
    pattern = {"layers.1.up_proj": (0.25, 1.0)}
    model, optimizer = make_run("attach", moves="none", rank_pattern=pattern, shape="square")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for batch in make_batches(2):
        take_step(model, optimizer, batch)
        scheduler.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.0025}
    scales = sorted({group["subnet_lr_scale"] for group in optimizer.param_groups})
    assert scales == [4.0]
    optimizer.timeline.detach()
    assert not any("subnet_lr_scale" in group for group in optimizer.param_groups)


@pytest.mark.parametrize("driven", ["LoSiAAdamW", "in_backward", "attach"])
def test_a_value_decays_as_fast_as_in_full_fine_tuning(driven):
    model = apply_losia(tiny_lm(), LoSiAConfig(rank_factor=0.5, moves="none"))
    if driven == "attach":
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.5)
        attach(optimizer, model)
    else:
        options = {"weight_decay": 0.5, "in_backward": driven == "in_backward"}
        optimizer = LoSiAAdamW(model, lr=0.01, **options)
    layers = [layer for _, layer in losia_layers(model)]
    before = [layer.subnet.detach().clone() for layer in layers]
    loss = sum((layer.subnet * 0).sum() for layer in layers)
    loss.backward()
    optimizer.step()
    for layer, subnet in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.subnet.detach(), subnet * (1 - 0.01 * 0.5))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5}


def test_attach_leaves_other_peoples_scales_of_the_rate_alone():
    model = apply_losia(tiny_lm(), LoSiAConfig(rank_factor=0.5, moves="none"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained, "lr_scale": 0.1}], lr=0.01)
    attach(optimizer, model)
    assert {group["lr_scale"] for group in optimizer.param_groups} == {0.1}


def test_calibrating_places_whose_rates_are_scaled_is_told():
    model = apply_losia(tiny_lm(), LoSiAConfig(rank_factor=0.5))
    with pytest.warns(UserWarning, match="init_subnet='calibrated'"):
        calibrate(model, make_batches(1), steps=1)


def test_a_resume_that_would_change_whose_rate_it_is_is_refused():
    def run(init_subnet):
        config = LoSiAConfig(rank_factor=0.5, moves="none", init_subnet=init_subnet)
        model = apply_losia(tiny_lm(), config)
        optimizer = LoSiAAdamW(model, lr=0.01)
        take_step(model, optimizer, make_batches(1)[0])
        return optimizer

    saved = run("random").state_dict()
    with pytest.raises(ValueError, match="init_subnet was 'random', now 'calibrated'"):
        run("calibrated").load_state_dict(saved)
    run("random").load_state_dict(saved)


def test_an_adapter_added_beside_a_trained_one_begins_at_the_base():
    peft = pytest.importorskip("peft")
    from losia_kernels.integrations.peft import LoSiAPeftConfig
    from tests.integrations.tiny_llama import make_model

    config = LoSiAPeftConfig(rank_factor=0.25)
    tokens = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}
    adapted = peft.get_peft_model(make_model(), config)
    base = make_model()(**tokens).logits
    optimizer = LoSiAAdamW(adapted, lr=0.01)
    for _ in range(3):
        take_step(adapted, optimizer, tokens)
    trained = adapted(**tokens).logits
    adapted.add_adapter("second", config)
    assert torch.equal(adapted(**tokens).logits, trained)
    adapted.set_adapter("second")
    assert torch.equal(adapted(**tokens).logits, base) and not torch.equal(trained, base)


def test_the_optimizer_of_an_adapter_that_is_not_active_takes_no_step(recwarn):
    peft = pytest.importorskip("peft")
    from losia_kernels.integrations.peft import LoSiAPeftConfig
    from tests.integrations.tiny_llama import make_model

    config = LoSiAPeftConfig(rank_factor=0.25, period=1)
    tokens = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}
    adapted = peft.get_peft_model(make_model(), config)
    first = LoSiAAdamW(adapted, lr=0.01)
    adapted.add_adapter("second", config)
    adapted.set_adapter("second")
    second = LoSiAAdamW(adapted, lr=0.01)
    recwarn.clear()
    for _ in range(3):
        adapted(**tokens).loss.backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    assert (first.timeline.step, second.timeline.step) == (0, 3)
    assert not [w for w in recwarn if "LoSiA" in str(w.message)]


def test_updates_in_the_backward_know_a_recomputed_block_from_a_second_backward():
    """A block that is recomputed runs its backward inside of that of the output layer."""
    pytest.importorskip("transformers")
    from tests.integrations.tiny_llama import make_model

    tokens = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}
    model = apply_losia(make_model(), LoSiAConfig(rank_factor=0.25, output_dim_factor=0.25))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    model.train()
    optimizer = LoSiAAdamW(model, lr=0.001, in_backward=True)
    for _ in range(2):
        model(**tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model(**tokens).loss.backward()
    with pytest.raises(RuntimeError, match="a second gradient before step"):
        model(**tokens).loss.backward()
    optimizer.zero_grad()
    model.load_state_dict(saved[0])  # back to before the step that was not taken
    optimizer.load_state_dict(saved[1])
    model(**tokens).loss.backward()
    optimizer.step()
