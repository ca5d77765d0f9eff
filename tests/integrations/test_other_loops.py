"""Loops of other libraries around the same model and optimizer: the bits of one written out by
hand."""

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from losia_kernels import LoSiAAdamW, apply_losia
from tests.integrations.tiny_llama import make_model
from tests.tiny import paper, same_tensors

CONFIG = paper(rank_factor=1 / 4, period=2, init_subnet="random")
LR, STEPS, ACCUMULATION = 3e-3, 6, 2


def batches():
    ids = torch.randint(0, 256, (2 * STEPS * ACCUMULATION, 7), generator=torch.Generator())
    return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=2)


def converted():
    model = apply_losia(make_model(), CONFIG)
    optimizer = LoSiAAdamW(model, lr=LR)
    optimizer.timeline.loss_divisor = ACCUMULATION
    return model.train(), optimizer


@pytest.fixture(scope="module")
def by_hand():
    model, optimizer = converted()
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    for number, batch in enumerate(batches(), start=1):
        (model(**batch).loss / ACCUMULATION).backward()
        if number % ACCUMULATION == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return model


def test_accelerate(by_hand):
    model, optimizer = converted()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    wrapped, stepped, data, schedule = accelerator.prepare(model, optimizer, batches(), scheduler)
    for batch in data:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
            stepped.step()
            schedule.step()
            stepped.zero_grad()
    assert optimizer.timeline.step == STEPS
    assert same_tensors(accelerator.unwrap_model(wrapped).state_dict(), by_hand.state_dict())


def test_lightning(by_hand, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.optimizer = converted()

        def training_step(self, batch, number):
            return self.model(**batch).loss

        def configure_optimizers(self):
            schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, STEPS)
            return [self.optimizer], [{"scheduler": schedule, "interval": "step"}]

    module = Module()
    lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=ACCUMULATION,
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    ).fit(module, batches())
    assert module.optimizer.timeline.step == STEPS
    assert same_tensors(module.model.state_dict(), by_hand.state_dict())
