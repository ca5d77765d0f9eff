"""The Trainer adapter against a loop written out by hand; calibration, length groups and packing in
the Trainer."""

import dataclasses

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from losia_kernels import LoSiAAdamW, apply_losia, attach, calibrate
from losia_kernels.finetune.model import check_packing
from losia_kernels.finetune.options import FinetuneOptions, InputError
from losia_kernels.finetune.trainer import FinetuneTrainer, sft_config
from losia_kernels.integrations.transformers import LoSiACallback, LoSiAOptimizerFactory
from tests.integrations.collate import IGNORE, Collator
from tests.integrations.tiny_llama import make_model, make_tokenizer
from tests.tiny import paper, same_tensors

CONFIG = paper(rank_factor=1 / 4, output_dim_factor=1 / 8, period=2)
STEPS, BATCH, ACCUMULATION = 9, 2, 2
LR = 3e-3


def samples(count=64):
    """Random tokens; sample i learns all but its first i % 5 + 1, so that micro-batches differ in
    learned tokens."""
    generator = np.random.default_rng(0)
    made = []
    for i in range(count):
        ids = generator.integers(0, 256, size=6 + i % 7).astype(np.int32)
        labels = np.where(np.arange(len(ids)) > i % 5, ids, np.int32(IGNORE))
        made.append({"input_ids": ids, "labels": labels})
    return made


def options(tmp_path, **changes):
    values = dict(
        model="",
        data="",
        output=str(tmp_path),
        lr=LR,
        lr_scheduler="constant",
        warmup_ratio=0.0,
        save_steps=0,
        batch_size=BATCH,
        gradient_accumulation=ACCUMULATION,
        max_grad_norm=0.0,
    )
    return FinetuneOptions(**{**values, **changes})


def data_of(kind):
    """The samples and what makes batches of them, as the Trainer takes them."""
    if issubclass(kind, FinetuneTrainer):
        rows = [{name: ids.tolist() for name, ids in sample.items()} for sample in samples()]
        return {"train_dataset": Dataset.from_list(rows), "processing_class": make_tokenizer()}
    return {"train_dataset": samples(), "data_collator": Collator(256)}


def make_trainer(model, tmp_path, kind=FinetuneTrainer, callbacks=(), **changes):
    trainer = kind(
        model,
        sft_config(options(tmp_path, **changes), STEPS),
        optimizer_cls_and_kwargs=(LoSiAOptimizerFactory, {"lr": LR}),
        **data_of(kind),
    )
    trainer.add_callback(LoSiACallback(trainer))
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def by_hand(model, batches):
    """The same run: mean losses weighted by learned tokens, and the timeline told what each was
    divided by."""
    model.train()
    calibrate(model, batches[:4], 4)
    optimizer = LoSiAAdamW(model, lr=LR)
    for step in range(STEPS):
        micro = batches[step * ACCUMULATION : (step + 1) * ACCUMULATION]
        learned = [int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in micro]
        for batch, count in zip(micro, learned, strict=True):
            optimizer.timeline.loss_divisor = sum(learned) / count
            model(**batch, num_items_in_batch=torch.tensor(sum(learned))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_an_attached_optimizer_takes_the_same_steps(tmp_path):
    """torch's AdamW, given to the Trainer after ``attach``: the same subnets, and weights to
    rounding."""
    ours = apply_losia(make_model(), CONFIG)
    make_trainer(ours, tmp_path).train()
    model = apply_losia(make_model(), CONFIG)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0
    )
    attach(optimizer, model)
    trainer = FinetuneTrainer(
        model,
        sft_config(options(tmp_path), STEPS),
        optimizers=(optimizer, None),
        **data_of(FinetuneTrainer),
    )
    callback = LoSiACallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    for (name, expected), seen in zip(
        ours.state_dict().items(), model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(seen, expected, rtol=0, atol=1e-6, msg=name)
    assert list(callback._rates) == [f"losia/lr/{name}" for name in optimizer.timeline.group_names]


def test_the_trainer_takes_the_steps_of_a_loop_written_out_by_hand(tmp_path):
    seen = apply_losia(make_model(), CONFIG)
    trainer = make_trainer(seen, tmp_path, kind=Trainer)
    trainer.train()
    batches = list(trainer.get_train_dataloader())
    model = apply_losia(make_model(), CONFIG)
    optimizer = by_hand(model, batches)
    assert trainer.optimizer.optimizer.timeline.step == optimizer.timeline.step == STEPS
    for (name, ours), theirs in zip(
        model.state_dict().items(), seen.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_the_importance_is_told_what_the_loss_was_divided_by(tmp_path, monkeypatch):
    divisors = []
    original = LoSiAAdamW.step
    monkeypatch.setattr(
        LoSiAAdamW,
        "step",
        lambda self, *a: (divisors.append(self.timeline.loss_divisor), original(self, *a))[1],
    )
    make_trainer(apply_losia(make_model(), CONFIG), tmp_path).train()
    assert len(divisors) == STEPS
    # about 2, by learned tokens
    assert len(set(divisors)) > 1 and all(1 < divisor < 6 for divisor in divisors)


class Snapshot(TrainerCallback):
    """The subnets' places in the first step."""

    places = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.places = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.places = self.places or places(model)


def places(model):
    return {name: idx.clone() for name, idx in model.state_dict().items() if name.endswith("_idx")}


@pytest.mark.parametrize("init_subnet", ["calibrated", "random"])
def test_the_first_subnets_are_calibrated_before_the_first_step_unless_told_not_to(
    tmp_path, init_subnet
):
    model = apply_losia(make_model(), paper(rank_factor=1 / 4, init_subnet=init_subnet))
    drawn, snapshot = places(model), Snapshot()
    make_trainer(model, tmp_path, callbacks=[snapshot]).train()
    moved = [name for name in drawn if not torch.equal(drawn[name], snapshot.places[name])]
    assert bool(moved) == (init_subnet == "calibrated")


class OtherLoss(Trainer):
    """Of a model that returns no loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return model(**inputs).logits.square().mean() + 0 * labels.sum()


def test_calibration_is_on_the_loss_that_is_trained(tmp_path):
    model, snapshot = apply_losia(make_model(), CONFIG), Snapshot()
    trainer = make_trainer(model, tmp_path, kind=OtherLoss, callbacks=[snapshot])
    trainer.train()
    expected = apply_losia(make_model(), CONFIG).train()
    batches = list(trainer.get_train_dataloader())[:4]
    calibrate(expected, batches, 4, lambda model, batch: trainer.compute_loss(model, dict(batch)))
    assert all(torch.equal(idx, snapshot.places[name]) for name, idx in places(expected).items())


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == 4


def test_a_resumed_run_draws_what_the_first_would_have(tmp_path):
    """The first run alone looks ahead to calibrate: torch's random state must not tell."""
    models = []
    for callbacks, checkpoint in (([], None), ([StopAt()], None), ([], True)):
        torch.manual_seed(len(models))
        models.append(apply_losia(make_model(), CONFIG))
        arguments = TrainingArguments(
            str(tmp_path / ("whole" if not models[1:] else "parts")),
            max_steps=STEPS,
            learning_rate=LR,
            per_device_train_batch_size=BATCH,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            models[-1],
            arguments,
            data_collator=Collator(256),
            train_dataset=samples(),
            callbacks=callbacks,
            optimizer_cls_and_kwargs=(LoSiAOptimizerFactory, {"lr": LR}),
        )
        trainer.add_callback(LoSiACallback(trainer))
        trainer.train(resume_from_checkpoint=checkpoint)
    whole, _, resumed = models
    assert same_tensors(whole.state_dict(), resumed.state_dict())


def test_a_second_train_goes_on_where_the_first_ended(tmp_path):
    """The Trainer keeps its optimizer: its moments are of the subnets as they are."""
    model, snapshot = apply_losia(make_model(), CONFIG), Snapshot()
    trainer = make_trainer(model, tmp_path, callbacks=[snapshot])
    trainer.train()
    ended = places(model)
    trainer.train()
    assert all(torch.equal(ended[name], snapshot.places[name]) for name in ended)


def test_a_run_too_short_for_its_groups_is_warned_about(tmp_path):
    """The Trainer knows its steps, which the optimizer is not told."""
    with pytest.warns(
        UserWarning, match="1 of 3 groups never leave.*period that gives every group a turn is 3"
    ):
        make_trainer(
            apply_losia(make_model(), dataclasses.replace(CONFIG, period=4)), tmp_path
        ).train()


def test_the_trainer_tells_the_steps_and_a_longer_resumed_run_keeps_its_period(tmp_path):
    model = apply_losia(make_model(), dataclasses.replace(CONFIG, period="auto"))
    trainer = make_trainer(model, tmp_path, Trainer, save_steps=4)
    trainer.train()
    assert trainer.optimizer.optimizer.timeline.config.period == 1  # 9 steps of 3 groups
    again = apply_losia(make_model(), dataclasses.replace(CONFIG, period="auto"))
    again = make_trainer(again, tmp_path, Trainer)
    again.args.max_steps = 20
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-8"))
    timeline = again.optimizer.optimizer.timeline
    assert timeline.config.period == 1 and timeline.step == 20


def test_a_checkpoint_without_the_optimizer_leaves_the_period_to_be_told(tmp_path):
    config = dataclasses.replace(CONFIG, period="auto")
    trainer = make_trainer(apply_losia(make_model(), config), tmp_path, Trainer, save_steps=4)
    trainer.args.save_only_model = True
    trainer.train()
    again = make_trainer(apply_losia(make_model(), config), tmp_path, Trainer)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-8"))
    assert again.optimizer.optimizer.timeline.config.period == 1


def test_the_output_layer_starts_at_the_tokens_of_the_data(tmp_path):
    config = paper(
        rank_factor=0.25, output_dim_factor=0.1, init_subnet="random", output_init="frequency"
    )
    model, snapshot = apply_losia(make_model(), config), Snapshot()
    count = np.bincount(
        np.concatenate([sample["labels"][sample["labels"] != IGNORE] for sample in samples()])
    )
    make_trainer(model, tmp_path, callbacks=[snapshot]).train()
    chosen = snapshot.places["lm_head.out_idx"].numpy()
    assert count[chosen].min() >= np.delete(count, chosen).max() and count[chosen].sum() > len(
        chosen
    )


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(samples())


def test_a_stream_is_trained_on_from_its_first_batch_though_it_calibrates(tmp_path):
    seen = apply_losia(make_model(), CONFIG)
    trainer = make_trainer(seen, tmp_path, kind=Trainer)
    trainer.train_dataset = Stream()
    trainer.train()
    model = apply_losia(make_model(), CONFIG)
    by_hand(model, [Collator(256)(samples()[i : i + BATCH]) for i in range(0, 64, BATCH)])
    assert same_tensors(model.state_dict(), seen.state_dict())


def test_length_groups_reach_the_dataloader(tmp_path):
    trainer = make_trainer(apply_losia(make_model(), CONFIG), tmp_path, group_by_length=True)
    loader = trainer.get_train_dataloader()
    loader.set_epoch(1)
    first = [batch["input_ids"] for batch in loader]
    loader.set_epoch(1)
    again = [batch["input_ids"] for batch in loader]
    loader.set_epoch(2)
    later = [batch["input_ids"] for batch in loader]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, later, strict=True)
    )


def test_packing_is_refused_where_packed_samples_see_each_other():
    check_packing(make_model())
    blind = make_model()
    forward = blind.forward
    # a model that has no use for positions
    blind.forward = lambda position_ids=None, **kwargs: forward(**kwargs)
    with pytest.raises(InputError, match="packed row see each other"):
        check_packing(blind)


def test_packed_samples_are_kept_apart_in_training(tmp_path):
    """A cache, which models make by default, would keep transformers from looking for packed
    samples."""
    model = apply_losia(make_model(), CONFIG)
    assert model.config.use_cache
    make_trainer(model, tmp_path)
    assert not model.config.use_cache
