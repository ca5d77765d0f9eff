"""Runs as the Trainer offers them, of a model with subnets: batch sizes that are found, epochs that
end early, generation in evaluation, sequence-to-sequence, streams, callbacks that follow."""

import copy
import dataclasses

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from losia_kernels import LoSiAAdamW, apply_losia
from losia_kernels.integrations.following import sync_by_weights
from losia_kernels.integrations.transformers import LoSiACallback
from losia_kernels.layers.module import losia_layers
from tests.integrations.collate import Collator
from tests.integrations.test_trainer import LR, samples
from tests.integrations.test_trainer_features import (
    CONFIG,
    STEPS,
    Places,
    arguments,
    make_trainer,
    places_of,
    same_state,
)
from tests.integrations.tiny_llama import make_model, make_tokenizer
from tests.integrations.tiny_models import FAMILIES
from tests.tiny import paper


class Small(Trainer):
    """Has memory for batches of two."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, num_items_in_batch)


def test_a_batch_size_that_is_found_trains_as_one_that_was_given(tmp_path):
    """The first tries end in the calibration: nothing of them may stay."""
    models = []
    for size, find in ((16, True), (2, False)):
        models.append(apply_losia(make_model(), CONFIG))
        changes = {"per_device_train_batch_size": size, "auto_find_batch_size": find}
        trainer = Small(
            models[-1],
            arguments(tmp_path, **changes),
            data_collator=Collator(256),
            train_dataset=samples(),
        )
        trainer.add_callback(LoSiACallback(trainer))
        trainer.train()
        # it halves by halves, or by tenths
        assert trainer._train_batch_size <= 2 and trainer.state.global_step == STEPS
        if find:
            found = trainer._train_batch_size
    assert found in (1, 2) and (found == 1 or same_state(*models))


def test_fewer_batches_than_the_calibration_takes(tmp_path):
    """All of the first epoch is drawn before its first step, and trained on all the same."""
    changes = {"train": samples(5), "max_steps": 6, "gradient_accumulation_steps": 2}
    places, trainer = Places(), make_trainer(tmp_path, **changes)
    trainer.add_callback(places)
    trainer.train()
    assert trainer.state.global_step == 6 and trainer.state.epoch == 3
    config = dataclasses.replace(CONFIG, init_subnet="random")
    placed = make_trainer(tmp_path, config=config, **changes)
    for (_, layer), found in zip(losia_layers(placed.model), places.found, strict=True):
        layer.set_subnet_(*found)
    placed.train()
    assert same_state(trainer.model, placed.model)


def test_tokens_are_counted_in_what_a_collator_of_transformers_gives(tmp_path):
    config = dataclasses.replace(CONFIG, init_subnet="random", output_init="frequency")
    trainer = Trainer(
        apply_losia(make_model(), config),
        arguments(tmp_path),
        data_collator=DataCollatorForSeq2Seq(make_tokenizer()),
        train_dataset=samples(),
    )
    trainer.add_callback(LoSiACallback(trainer))
    head = trainer.model.lm_head.out_idx.clone()
    trainer.train()
    assert not torch.equal(head, trainer.model.lm_head.out_idx)


class StopsEpochs(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == 1
        control.should_training_stop = state.global_step == 3


def test_an_epoch_that_is_broken_off_while_batches_wait_leaves_none_behind(tmp_path):
    """Calibration has drawn four batches, the first epoch used one."""
    seen = []

    class Watching(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            seen.append((self.state.global_step, inputs["input_ids"].clone()))
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = Watching(
        apply_losia(make_model(), CONFIG),
        arguments(tmp_path, max_steps=-1, num_train_epochs=2),
        data_collator=Collator(256),
        train_dataset=samples(),
        callbacks=[StopsEpochs()],
    )
    trainer.add_callback(LoSiACallback(trainer))
    trainer.train()
    loader = trainer.get_train_dataloader()
    loader.set_epoch(1)
    second = [batch["input_ids"] for batch in loader]
    trained = [ids for _, ids in seen[4:]]  # after the calibration
    assert torch.equal(trained[1], second[0]) and torch.equal(trained[2], second[1])


def test_the_best_model_is_loaded_and_trained_on(tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=6,
        learning_rate=0.03,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        prediction_loss_only=True,
    )
    trainer.train()
    assert trainer.state.best_global_step
    best = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert not all(
        torch.equal(value, trainer.model.state_dict()[key]) for key, value in best.items()
    )
    for _, layer in losia_layers(trainer.model):
        assert torch.equal(layer.subnet, layer.weight[layer.out_idx][:, layer.in_idx])


@pytest.mark.parametrize("generate", [False, True])
def test_sequence_to_sequence(tmp_path, generate):
    model = apply_losia(FAMILIES["t5"].make(), paper(rank_factor=1 / 4, period=1))
    data = [
        {"input_ids": [3 + i % 7] * (2 + i % 3), "labels": [5 + i % 5] * (1 + i % 4)}
        for i in range(32)
    ]
    drawn = places_of(model)
    tokenizer = make_tokenizer()
    tokenizer.pad_token_id = 0
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=LR,
            predict_with_generate=generate,
            generation_max_length=5,
            eval_strategy="steps",
            eval_steps=3,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=data,
        eval_dataset=data[:4],
        compute_metrics=(lambda p: {"width": p.predictions.shape[1]}) if generate else None,
    )
    trainer.add_callback(LoSiACallback(trainer))
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, LoSiAAdamW) and optimizer.timeline.step == 6
    assert optimizer.param_groups[0]["initial_lr"] == LR
    for before, after in zip(drawn, places_of(model), strict=True):
        assert not torch.equal(before[0], after[0])
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    first, second = (entry["eval_loss"] for entry in evaluated)
    assert second < first
    assert all(("eval_width" in entry) == generate for entry in evaluated)


class Following:
    """As TRL's reference models and teachers follow: parameters in order."""

    @staticmethod
    def sync_target_model(model, target, alpha):
        pairs = zip(target.parameters(), model.parameters(), strict=True)
        for theirs, ours in pairs:
            theirs.data.mul_(1.0 - alpha).add_(ours.data, alpha=alpha)


@pytest.mark.parametrize("converted", [False, True])
def test_a_reference_model_follows_by_the_weights(tmp_path, converted):
    trainer, reference, callback = make_trainer(tmp_path, max_steps=3), make_model(), Following()
    if converted:
        reference = apply_losia(reference, CONFIG)
    sync_by_weights([callback])
    sync_by_weights([callback])  # a second train()
    trainer.train()
    callback.sync_target_model(trainer.model, reference, 1.0)
    weights = dict(reference.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        if not name.endswith(".subnet"):
            assert torch.equal(weights[name], parameter), name


def test_a_preference_run_with_a_reference_that_follows(tmp_path, model_folder):
    pytest.importorskip("trl")
    from tests.integrations.test_trl_trainers import make_trainer

    changes = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    trainer = make_trainer("DPO", tmp_path, model_folder, **changes)
    trainer.add_callback(LoSiACallback(trainer))
    trainer.train()
    reference = dict(trainer.ref_model.named_parameters())
    before = dict(AutoModelForCausalLM.from_pretrained(model_folder).named_parameters())
    for name, layer in losia_layers(trainer.model):
        assert torch.equal(reference[f"{name}.weight"], layer.weight)
        assert not torch.equal(reference[f"{name}.weight"], before[f"{name}.weight"])
