"""What backwards show of a layer is summed before it is judged, and held until the step."""

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from losia_kernels import calibrate
from losia_kernels.config import IMPORTANCES
from losia_kernels.layers.module import losia_layers
from tests.tiny import make_batches, same_tensors, take_step
from tests.training.test_skipped_steps import backward, everything, make_run

# Several contributions to one layer ---------------------------------------------------------------


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_second_loss_that_reads_the_logits(importance):
    """The fused loss brings one part of the head's gradient, the logits another: I is of the sum."""
    states = []
    for fused in (True, False):
        model, optimizer = make_run(importance=importance, period=1, fused_loss=fused)
        with torch.no_grad():
            model.lm_head.weight.mul_(20)  # the second-order term of Eq. 3 counts
        head = optimizer.timeline.observers[model.lm_head]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of logits that are computed after all
            out = model(**make_batches(1)[0])
            (out.loss + out.logits.square().mean()).backward()
        optimizer.step()
        states.append(head.tensors)
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-4, atol=1e-6)


class Twice(nn.Module):
    """A block used twice, checkpointed or not, and in one segment or two."""

    def __init__(self, block, reentrant=None, segments=2):
        super().__init__()
        self.block, self.reentrant, self.segments = block, reentrant, segments

    def forward(self, x):
        if self.reentrant is None:
            return self.block(self.block(x))
        if self.segments == 1:
            return checkpoint(lambda x: self.block(self.block(x)), x, use_reentrant=self.reentrant)
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2, 7])
@pytest.mark.parametrize("importance", ["sensitivity", "gradient", "marginal"])
def test_a_block_used_twice_under_checkpointing(importance, micro_batches, reentrant, segments):
    runs = []
    for how in ((None, 1), (reentrant, segments)):
        model, optimizer = make_run(
            importance=importance, output_dim_factor=0.0, period=1, blocks=1, lr=0.0
        )
        model.model.layers[0] = Twice(model.model.layers[0], *how)
        model.model.embed_tokens.weight.requires_grad_(True)  # reentrant checkpointing needs it
        with torch.no_grad():
            model.lm_head.weight.mul_(50)
        seen = optimizer.timeline.observers[model.model.layers[0].block.up_proj]
        backward(model, *make_batches(micro_batches))
        while not optimizer.timeline.step:
            kept = optimizer.timeline._pending._ahead.get(model.model.layers[0].block.up_proj, seen)
            optimizer.step()
        runs.append(kept.tensors)
    for name, tensor in runs[0].items():
        torch.testing.assert_close(tensor, runs[1][name], rtol=1e-4, atol=1e-7)


# What else happens between a backward and a step --------------------------------------------------


def test_accumulating_is_the_same_however_many_gradients_are_held():
    """Micro-batch after micro-batch with a step in between, at rate 0, is the same importance."""
    (many, its), (single, other) = (make_run(lr=0.0, period=12) for _ in "ab")
    for batch in make_batches(12):
        (many(**batch).loss).backward()
        take_step(single, other, batch)
    its.step()
    ours, theirs = its.timeline.observers, other.timeline.observers
    head = ours[many.lm_head].tensors
    assert not theirs.get(single.lm_head)  # twelve steps: its turn is over
    fresh, third = make_run(lr=0.0, period=13)
    for batch in make_batches(12):
        take_step(fresh, third, batch)
    assert same_tensors(head, third.timeline.observers[fresh.lm_head].tensors)


def test_an_expert_that_one_micro_batch_leaves_out_keeps_what_another_has_shown():
    runs = make_run(output_dim_factor=0.0, blocks=1), make_run(output_dim_factor=0.0, blocks=1)
    batches = make_batches(2)
    for model, optimizer in runs:
        block = model.model.layers[0]
        up = block.up_proj
        shown = optimizer.timeline.observers[up]
        backward(model, batches[0])
        if model is runs[1][0]:  # a micro-batch that does not come by the layer
            x = block.down_proj(torch.randn(3, 12))
            x.sum().backward()
        optimizer.step()
        assert shown.seen
    first, second = (run[1].timeline.observers[run[0].model.layers[0].up_proj] for run in runs)
    assert same_tensors(first.tensors, second.tensors)


def test_two_optimizers_each_drop_their_own():
    """The head's is torch's: it zeroes its gradients where ours goes on accumulating."""
    runs = []
    for twice in (False, True):
        model, optimizer = make_run(output_dim_factor=0.0)
        model.model.norm.requires_grad_(True)
        other = torch.optim.SGD(model.model.norm.parameters(), lr=0.0)
        for first, second in pairwise(make_batches(9)):
            (model(**first).loss / 2).backward()
            if twice:
                other.step()
                other.zero_grad()
            (model(**second).loss / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            other.zero_grad()
        runs.append(everything(model, optimizer))
    assert same_tensors(*runs)


def test_calibrating_between_backward_and_step_leaves_no_trace():
    runs = make_run(output_dim_factor=0.0), make_run(output_dim_factor=0.0)
    for model, optimizer in runs:
        if model is runs[1][0]:
            backward(model, *make_batches(2, seed=4))
        calibrate(model, make_batches(2, seed=3), steps=2)
        for batch in make_batches(5):
            take_step(model, optimizer, batch)
    assert same_tensors(everything(*runs[0]), everything(*runs[1]))


def test_a_closure_that_makes_the_gradients():
    """As Lightning calls every optimizer."""
    for kind in ("losia", "torch"):
        runs = make_run(kind), make_run(kind)
        for batch in make_batches(8):
            take_step(*runs[0], batch)
            model, optimizer = runs[1]

            def closure(model=model, optimizer=optimizer, batch=batch):
                optimizer.zero_grad()
                loss = model(**batch).loss
                loss.backward()
                return loss

            optimizer.step(closure)
        assert same_tensors(everything(*runs[0]), everything(*runs[1]))


def test_what_is_pending_is_freed_with_the_gradients():
    model, optimizer = make_run()
    pending = optimizer.timeline._pending
    for drop in (optimizer.zero_grad, optimizer.step, optimizer.timeline.detach):
        backward(model, *make_batches(2))
        assert pending._shown
        drop()
        assert not pending._shown and not pending._ahead
    assert not pending._watched
    assert not any(layer.subnet._backward_hooks for _, layer in losia_layers(model))


def test_a_copy_of_the_model_is_not_watched():
    model, optimizer = make_run()
    backward(model, *make_batches(1))
    twin = copy.deepcopy(model)
    backward(twin, *make_batches(1, seed=1))
    plain, other = make_run()
    backward(plain, *make_batches(1))
    optimizer.step(), other.step()
    assert same_tensors(everything(model, optimizer), everything(plain, other))
