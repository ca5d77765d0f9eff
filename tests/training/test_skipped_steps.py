"""A step that does not happen leaves no trace: not in the weights, the moments, nor the importance."""

import io
from itertools import pairwise

import pytest
import torch
from torch import nn

from losia_kernels import LoSiAAdamW, apply_losia, attach
from losia_kernels.config import IMPORTANCES
from losia_kernels.layers.module import losia_layers
from tests.tiny import make_batches, paper, same_tensors, take_step, tiny_lm


def make_run(kind="losia", blocks=2, dropout=0.0, seed=0, lr=0.01, **options):
    """A run with a trained output layer, whose loss needs no logits."""
    options = {"rank_factor": 0.5, "output_dim_factor": 0.5, "period": 2} | options
    model = apply_losia(tiny_lm(seed, blocks=blocks, dropout=dropout), paper(**options))
    if kind == "losia":
        return model, LoSiAAdamW(model, lr=lr)
    trained = (p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=lr, fused=kind == "fused")
    attach(optimizer, model)
    return model, optimizer


def everything(model, optimizer) -> dict[str, torch.Tensor]:
    """Weights, places, moments, step counts and importance."""
    found = dict(model.state_dict())
    for i, state in optimizer.state_dict()["state"].items():
        found |= {f"{i}.{key}": value for key, value in state.items()}
    return {key: value.clone() for key, value in found.items()}


def set_none(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = None


def set_zero(model, optimizer):
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()


DROPS = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer_zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "model_zeros": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "by_hand": set_none,
    "by_hand_zeros": set_zero,
}


def backward(model, *batches):
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()


@pytest.mark.parametrize("micro_batches", [1, 2, 6])
@pytest.mark.parametrize("kind", ["losia", "torch", "fused"])
@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS)
def test_a_skipped_step_leaves_no_trace(drop, kind, micro_batches):
    """As after a loss spike: the gradients are dropped, and the loop goes on."""
    runs = make_run(kind), make_run(kind)
    batches, spikes = make_batches(8 * micro_batches), make_batches(8 * micro_batches, seed=1)
    for step in range(8):
        here = slice(step * micro_batches, (step + 1) * micro_batches)
        for skips, (model, optimizer) in enumerate(runs):
            if skips:
                backward(model, *spikes[here])
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                drop(model, optimizer)
            backward(model, *batches[here])
            optimizer.step()
            optimizer.zero_grad()
        assert same_tensors(everything(*runs[0]), everything(*runs[1])), step


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("drop", ["model", "model_zeros"])
def test_with_every_importance(importance, drop):
    runs = [make_run(importance=importance) for _ in "ab"]
    batches, spikes = make_batches(16), make_batches(16, seed=1)
    for step, pair in enumerate(pairwise(batches[::2] + batches[:1])):
        backward(runs[1][0], *spikes[step : step + 3])
        DROPS[drop](*runs[1])
        for model, optimizer in runs:
            backward(model, *pair)
            optimizer.step()
            optimizer.zero_grad()
        assert same_tensors(everything(*runs[0]), everything(*runs[1])), step


def test_gradients_are_dropped_between_a_forward_and_its_backward():
    """As older tutorials write their loops."""
    runs = make_run(), make_run()
    for skips, (model, optimizer) in enumerate(runs):
        for step, batch in enumerate(make_batches(8)):
            if skips:
                backward(model, make_batches(1, seed=5 + step)[0])
            loss = model(**batch).loss
            model.zero_grad()
            loss.backward()
            optimizer.step()
    assert same_tensors(everything(*runs[0]), everything(*runs[1]))


def test_the_rest_of_an_epoch_that_fills_no_accumulation():
    """Its last micro-batches are dropped when the next epoch begins."""
    runs = make_run(), make_run()
    for rest, (model, optimizer) in zip((0, 1), runs, strict=True):
        for epoch in range(4):
            batches = make_batches(4 + rest, seed=epoch)
            for first, second in zip(batches[0:4:2], batches[1:4:2], strict=True):
                take_step(model, optimizer, first, second)
            backward(model, *batches[4:])
            model.zero_grad()
    assert same_tensors(everything(*runs[0]), everything(*runs[1]))


# Gradients that are not finite --------------------------------------------------------------------


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_guard_that_skips_steps_trains_on(importance, bad):
    """torchtitan's: the norm is looked at, and a step whose gradients are not finite is skipped."""
    runs = [make_run(importance=importance) for _ in "ab"]
    for model, optimizer in runs:
        guarded = model is runs[1][0]
        for step, batch in enumerate(make_batches(8)):
            if guarded and step % 3 != 1:
                (model(**make_batches(1, seed=9)[0]).loss * bad).backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                assert not norm.isfinite()
                optimizer.zero_grad()
            take_step(model, optimizer, batch)
    assert same_tensors(everything(*runs[0]), everything(*runs[1]))


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_gradient_that_is_not_finite_is_left_out_where_it_is_not(importance):
    """It overflows in one layer outside its subnet, so that nobody skips the step."""
    model, optimizer = make_run(importance=importance, output_dim_factor=0.0, period=1)
    layer, other = model.model.layers[0].down_proj, model.model.layers[0].up_proj
    seen, its = optimizer.timeline.observers[layer], optimizer.timeline.observers[other]
    handle = layer._probe.register_hook(lambda grad: grad.fill_(torch.inf))
    first, second = make_batches(2)
    backward(model, first)
    handle.remove()
    backward(model, second)
    ahead = optimizer.timeline._pending._ahead  # of "marginal", which holds one gradient at most
    seen, its = ahead.get(layer, seen), ahead.get(other, its)
    optimizer.step()
    assert all(tensor.isfinite().all() for tensor in seen.tensors.values())
    control, its_optimizer = make_run(importance=importance, output_dim_factor=0.0, period=1)
    controls = its_optimizer.timeline.observers
    found = [controls[getattr(control.model.layers[0], x)] for x in ("down_proj", "up_proj")]
    backward(control, second)
    its_optimizer.step()
    assert same_tensors(seen.tensors, found[0].tensors)  # of the second alone
    assert not same_tensors(its.tensors, found[1].tensors)  # which has seen both


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_slot_without_a_finite_gradient_keeps_the_subnet_and_says_so(importance):
    """Nobody guards the steps: the run is as lost as with plain AdamW, which trains on."""
    model, optimizer = make_run(importance=importance, output_dim_factor=0.0)
    before = {name: layer.out_idx.clone() for name, layer in losia_layers(model)}
    first, second, third = make_batches(3)
    (model(**first).loss * torch.nan).backward()
    optimizer.step()
    with pytest.warns(
        UserWarning,
        match=r"layers\.0\.up_proj, model\.layers\.0\.down_proj: no gradient of the slot was finite",
    ):
        take_step(model, optimizer, second)
    take_step(model, optimizer, third)
    assert optimizer.timeline.step == 3
    assert all(torch.equal(layer.out_idx, before[name]) for name, layer in losia_layers(model))


# Saved within an accumulation ---------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [2, 7])
@pytest.mark.parametrize("kind", ["losia", "torch"])
def test_saved_within_an_accumulation_that_is_run_again_from_its_start(kind, micro_batches):
    batches = [make_batches(micro_batches, seed=seed) for seed in range(8)]
    whole, first = make_run(kind), make_run(kind)
    for step in range(3):
        for run in (whole, first):
            take_step(*run, *batches[step])
    file = io.BytesIO()
    backward(first[0], *batches[3][:-1])
    torch.save([part.state_dict() for part in first], file)
    resumed = make_run(kind, seed=3)
    file.seek(0)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    backward(first[0], batches[3][-1])  # and saving has changed nothing for who goes on
    # the divisor of each micro-batch is the accumulation's
    for batch in batches[3]:
        (whole[0](**batch).loss).backward()
    for step in range(3, 8):
        if step > 3:
            take_step(*whole, *batches[step])
        else:
            whole[1].zero_grad()
            take_step(*whole, *batches[step])
        take_step(*resumed, *batches[step])
    assert same_tensors(everything(*whole), everything(*resumed))


def test_saving_within_an_accumulation_changes_nothing():
    runs = make_run(), make_run()
    for first, second in zip(make_batches(8), make_batches(8, seed=1), strict=True):
        for model, optimizer in runs:
            (model(**first).loss / 2).backward()
            if model is runs[1][0]:
                model.state_dict(), optimizer.state_dict()
            (model(**second).loss / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same_tensors(everything(*runs[0]), everything(*runs[1]))


@pytest.mark.parametrize("drop", ["optimizer", "model", "model_zeros"])
def test_compiled_models(drop):
    runs = [make_run(output_dim_factor=0.0) for _ in "ab"]
    for model, _ in runs:
        for block in model.model.layers:
            block.compile(backend="aot_eager", fullgraph=True)
    for step, batch in enumerate(make_batches(6)):
        for skips, (model, optimizer) in enumerate(runs):
            if skips:
                backward(model, *make_batches(2, seed=step + 1))
                DROPS[drop](model, optimizer)
            take_step(model, optimizer, batch)
    assert same_tensors(everything(*runs[0]), everything(*runs[1]))
