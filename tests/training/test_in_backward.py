"""Updates inside the backward: the same run, with no gradient left."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from losia_kernels import calibrate
from losia_kernels.layers.module import losia_layers
from tests.tiny import make_batches, same_tensors, snapshot, take_step
from tests.training.test_adam_state import FORMS, gradients, make_run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tied": True},
        {"update_type": "sync"},
        {"importance": "marginal"},
        {"output_dim_factor": 1.0},
        {"modules_to_save": ["norm"], "fused_loss": False},
        {"dtype": torch.float32},
    ],
)
def test_in_the_backward_it_is_the_same_run(options):
    plain, inside = make_run(**options), make_run({"in_backward": True}, **options)
    for batch in make_batches(2 * plain[1].timeline.schedule.cycle):
        losses = [take_step(*run, batch) for run in (plain, inside)]
        assert losses[0] == losses[1] and same_tensors(
            plain[0].state_dict(), inside[0].state_dict()
        )


@pytest.mark.parametrize("form, master", FORMS.values(), ids=FORMS.keys())
def test_in_the_backward_with_every_form(form, master):
    plain, inside = make_run(form, master), make_run(form | {"in_backward": True}, master)
    for batch in make_batches(7):
        take_step(*plain, batch)
        take_step(*inside, batch)
    assert same_tensors(plain[0].state_dict(), inside[0].state_dict())


def test_no_gradient_is_left_but_of_the_group_that_observes():
    model, optimizer = make_run({"in_backward": True}, output_dim_factor=0.0)
    alive = []
    for block in model.model.layers:
        for name in ("up_proj", "down_proj"):
            subnet = getattr(block, name).subnet
            subnet.register_hook(lambda grad: alive.append(len(gradients(model))))
    model(**make_batches(1)[0]).loss.backward()
    assert gradients(model) == ["model.layers.0.up_proj", "model.layers.0.down_proj"]
    assert max(alive) <= 1 and len(alive) == 4
    optimizer.step()
    assert all(optimizer.state[layer.subnet]["step"] == 1 for _, layer in losia_layers(model))


class Twice(nn.Module):
    """One block used twice, the second time under reentrant or plain checkpointing."""

    def __init__(self, block, reentrant=None):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x):
        if self.reentrant is None:
            return self.block(self.block(x))
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return x


def used_twice(reentrant=None, **options):
    model, optimizer = make_run(
        {"in_backward": True} if options.pop("inside", True) else {}, output_dim_factor=0.0
    )
    model.model.layers[1] = Twice(model.model.layers[1], reentrant)
    # reentrant checkpointing needs an input with a gradient
    model.model.embed_tokens.weight.requires_grad_(True)
    return model, optimizer


@pytest.mark.parametrize("reentrant", [None, False])
def test_a_layer_used_twice_waits_for_both(reentrant):
    plain, inside = used_twice(reentrant, inside=False), used_twice(reentrant)
    for batch in make_batches(6):
        take_step(*plain, batch)
        take_step(*inside, batch)
    assert same_tensors(plain[0].state_dict(), inside[0].state_dict())


def test_reentrant_checkpointing_of_a_layer_used_twice_is_refused():
    model, _ = used_twice(reentrant=True)
    with pytest.raises(RuntimeError, match="layers.1.down_proj: a second gradient before step"):
        model(**make_batches(1)[0]).loss.backward()


def test_a_weight_that_somebody_else_still_needs_is_an_error_and_not_a_wrong_gradient():
    model, _ = make_run({"in_backward": True}, output_dim_factor=0.0)
    block = model.model.layers[1]
    before = nn.Linear(8, 12, bias=False)
    before.weight = block.up_proj.weight  # a plain user of the same weight, earlier in the model
    lower = model.model.layers[0]
    lower.register_forward_hook(lambda module, args, out: out + before(out) @ before.weight)
    model.model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(**make_batches(1)[0]).loss.backward()


def test_accumulation_scaling_and_float16_are_refused():
    model, optimizer = make_run({"in_backward": True})
    first, second = make_batches(2)
    model(**first).loss.backward()
    with pytest.raises(
        RuntimeError, match="a second gradient before step.*no gradient accumulation"
    ):
        model(**second).loss.backward()
    model, optimizer = make_run({"in_backward": True})
    optimizer.timeline.loss_divisor = 2.0
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="loss_divisor is 2.0"):
        model(**first).loss.backward()
    assert same_tensors(model.state_dict(), before)
    with pytest.raises(ValueError, match="layers.0.up_proj is float16, whose loss must be scaled"):
        make_run({"in_backward": True}, dtype=torch.float16)


def test_calibration_and_detached_optimizers_update_nothing():
    model, optimizer = make_run({"in_backward": True})
    weights = {name: layer.weight.clone() for name, layer in losia_layers(model)}
    calibrate(model, make_batches(3), steps=3)
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in losia_layers(model))
    optimizer.timeline.detach()
    model(**make_batches(1)[0]).loss.backward()
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in losia_layers(model))
    assert len(gradients(model)) == 5


@pytest.mark.parametrize("drop", [True, False])
def test_a_backward_that_ran_out_of_memory_is_tried_again(drop):
    """The upper block was updated, the lower one never got its gradient."""
    model, optimizer = make_run({"in_backward": True}, output_dim_factor=0.0)
    batches = make_batches(4)
    take_step(model, optimizer, batches[0])

    def run_out(grad):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for tries in (1, 2):
        handle = model.model.layers[0].up_proj._probe.register_hook(run_out)
        with pytest.raises(torch.OutOfMemoryError):
            model(**batches[tries]).loss.backward()
        handle.remove()
        if drop:
            optimizer.zero_grad()
    for batch in batches[1:]:
        take_step(model, optimizer, batch)
    assert optimizer.timeline.step == 4
    with pytest.raises(RuntimeError, match="a second gradient before step"):
        for batch in batches[:2]:
            model(**batch).loss.backward()


def test_a_rate_that_is_set_after_the_updates_is_told():
    (batch,) = make_batches(1)
    for late in (False, True):
        model, optimizer = make_run({"in_backward": True}, output_dim_factor=0.0)
        for when in ("before", "after"):
            if when == "after":
                model(**batch).loss.backward()
            if late == (when == "after"):
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            optimizer.step()
        said = [str(each.message) for each in told]
        assert any("changed between backward and step()" in each for each in said) == late
