"""Real CUDA graphs: what a captured micro-batch trains is what a plain one does."""

import pytest
import torch

from losia_kernels import CapturedBackward
from tests.tiny import make_batches
from tests.training.test_capture import (
    AT_RANDOM,
    BY_IMPORTANCE,
    STEPS,
    check_same,
    make,
    plain_backward,
    train,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize(
    "config, captures", [(AT_RANDOM, 1), (BY_IMPORTANCE, 5)], ids=["random", "importance"]
)
def test_a_real_graph_trains_to_the_bits_of_a_plain_run(config, captures, micro):
    losses, models = [], []
    for captured in (True, False):
        model, optimizer = make(config)
        model.cuda()
        optimizer.timeline.loss_divisor = float(micro)

        def loss(batch, model=model):
            return model(**batch).loss / micro

        backward = CapturedBackward(loss, optimizer) if captured else plain_backward(loss)
        batches = make_batches(STEPS * micro)
        if not captured:
            batches = [{name: x.cuda() for name, x in batch.items()} for batch in batches]
        losses.append(torch.stack(train(model, optimizer, backward, batches, micro)))
        models.append(model)
        assert not captured or backward.captures == captures
    assert torch.equal(*losses)
    check_same(*models)


def test_a_real_graph_draws_the_random_numbers_of_a_plain_run():
    losses = []
    for captured in (True, False):
        model, optimizer = make(AT_RANDOM, dropout=0.5)
        model.cuda()

        def loss(ids, model=model):
            return model(ids, ids).loss

        backward = CapturedBackward(loss, optimizer) if captured else plain_backward(loss)
        batches = [batch["input_ids"].cuda() for batch in make_batches(STEPS)]
        losses.append(torch.stack(train(model, optimizer, backward, batches)))
    assert torch.equal(*losses)


def test_what_waits_for_a_real_gpu_is_refused_and_nothing_is_broken():
    model, optimizer = make()
    model.cuda()
    ids = torch.zeros(2, 3, dtype=torch.int64)
    waits = CapturedBackward(
        lambda ids: model(ids, ids).loss * model(ids, ids).loss.item(), optimizer
    )
    with pytest.raises(RuntimeError, match="no graph can hold what the loss does"):
        waits(ids)
    CapturedBackward(lambda ids: model(ids, ids).loss, optimizer)(ids)
