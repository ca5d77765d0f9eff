"""A run that is dropped gives its memory back: several models may be tuned in one process."""

import gc
import weakref

import pytest
import torch

from losia_kernels import LoSiAAdamW, apply_losia, attach, calibrate, remove_losia
from tests.tiny import make_batches, paper, take_step, tiny_lm


def attached(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    attach(optimizer, model)
    return optimizer


OPTIMIZERS = {
    "LoSiAAdamW": lambda model: LoSiAAdamW(model, lr=0.01),
    "in_backward": lambda model: LoSiAAdamW(model, lr=0.01, in_backward=True),
    "attached": attached,
}


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(
    "config", [{}, {"output_dim_factor": 0.5}, {"update_type": "sync"}], ids=str
)
@pytest.mark.parametrize("removed", [False, True])
def test_model_optimizer_and_importance_are_freed(make_optimizer, config, removed):
    model = apply_losia(tiny_lm(), paper(rank_factor=0.5, period=2, **config))
    batches = make_batches(5)
    calibrate(model, batches, steps=1)
    optimizer = make_optimizer(model)
    for batch in batches:  # ends within a slot
        take_step(model, optimizer, batch)
    held = [weakref.ref(parameter) for parameter in model.parameters()]
    held += [
        weakref.ref(t)
        for observer in optimizer.timeline.observers.values()
        for t in observer.tensors.values()
    ]
    held += [weakref.ref(value) for state in optimizer.state.values() for value in state.values()]
    if removed:
        remove_losia(model)
    del model, optimizer, batch
    gc.collect()
    assert len(held) > 20 and not any(ref() is not None for ref in held)
