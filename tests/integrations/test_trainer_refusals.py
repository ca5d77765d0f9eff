"""What a Trainer run is refused or told, and in which words."""

import pytest
import torch
from transformers import (
    Trainer,
)

from losia_kernels import apply_losia
from losia_kernels.integrations.transformers import LoSiACallback
from tests.integrations.collate import Collator
from tests.integrations.test_trainer import LR, samples
from tests.integrations.test_trainer_features import (
    ACCUMULATED,
    CONFIG,
    Watch,
    arguments,
    make_trainer,
)
from tests.integrations.tiny_llama import make_model


def test_an_optimizer_with_a_schedule_of_its_own_is_refused(tmp_path):
    """Its parameter groups cannot be split any more, by which subnets are rewarmed."""
    model = apply_losia(make_model(), CONFIG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = Trainer(
        model,
        arguments(tmp_path),
        data_collator=Collator(256),
        train_dataset=samples(),
        optimizers=(optimizer, schedule),
    )
    trainer.add_callback(LoSiACallback(trainer))
    with pytest.raises(ValueError, match="has a learning-rate scheduler already; attach first"):
        trainer.train()


def test_an_optimizer_made_behind_the_callbacks_back_is_refused(tmp_path):
    """Its steps would move no subnet."""
    trainer = make_trainer(tmp_path)
    model = trainer.model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    trainer.create_optimizer = lambda: setattr(trainer, "optimizer", optimizer)
    with pytest.raises(ValueError, match="optimizer is SGD.*add_callback.LoSiACallback.trainer"):
        trainer.train()


def test_a_loss_that_goes_round_the_output_layer_is_found_in_the_first_step(tmp_path):
    """As fused losses do that take the weight and leave the layer uncalled."""
    trainer = make_trainer(tmp_path)

    def fused(model, inputs, **kwargs):
        hidden = model.model(inputs["input_ids"]).last_hidden_state
        logits = hidden @ model.lm_head.weight.T
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        )

    trainer.compute_loss = fused
    with pytest.raises(
        RuntimeError, match="lm_head: the loss gave .* no gradient.*output_dim_factor=0"
    ):
        trainer.train()


def test_the_last_step_of_an_epoch_has_fewer_micro_batches(tmp_path):
    """For a model that takes no count of tokens, the Trainer divides by the micro-batches that
    there are."""
    divisors = Watch(lambda optimizer, model: optimizer.optimizer.timeline.loss_divisor)
    trainer = make_trainer(
        tmp_path, callbacks=[divisors], train=samples(10), max_steps=6, **ACCUMULATED
    )
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    assert divisors.seen == [2, 2, 1] * 2


def test_updates_inside_the_backward_and_clipping_exclude_each_other(tmp_path):
    trainer = make_trainer(tmp_path, max_grad_norm=1.0, gradient_accumulation_steps=1)
    trainer.add_callback(LoSiACallback(trainer, in_backward=True))
    with pytest.raises(ValueError, match="max_grad_norm=1.0 would find nothing to clip"):
        trainer.train()


def test_updates_inside_the_backward_and_accumulation_exclude_each_other(tmp_path):
    trainer = make_trainer(tmp_path, max_grad_norm=0.0, gradient_accumulation_steps=2)
    trainer.add_callback(LoSiACallback(trainer, in_backward=True))
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2.*set it to 1"):
        trainer.train()


def test_deepspeed_is_refused_where_the_callback_is_added(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="does not train under DeepSpeed.*FSDP2.*or DDP"):
        LoSiACallback(trainer)


def test_several_gpus_in_one_process_are_refused(tmp_path):
    """DataParallel's copies of a layer are on other devices than what it observes with."""
    trainer = make_trainer(tmp_path)
    trainer.args._n_gpu = 2  # what the Trainer finds on a machine with two
    with pytest.raises(ValueError, match="2 GPUs by DataParallel.*torchrun"):
        trainer.train()


def test_only_the_first_process_writes_the_history(tmp_path, monkeypatch):
    """On another node the folder may not even exist."""
    monkeypatch.setattr(Trainer, "is_world_process_zero", lambda self: False)
    trainer = make_trainer(tmp_path)
    trainer.callback_handler.callbacks[-1].history = tmp_path / "elsewhere" / "subnets.jsonl"
    trainer.train()
    assert not (tmp_path / "elsewhere").exists()
