"""What the importance is told that a micro-batch's mean loss was divided by, held to what the Trainer
really sent through the backward."""

import pytest
import torch
from torch.nn import functional
from transformers import LlamaForSequenceClassification, Trainer

from losia_kernels import apply_losia
from losia_kernels.integrations.transformers import LoSiACallback
from tests.integrations.collate import IGNORE, Collator
from tests.integrations.test_trainer import samples
from tests.integrations.test_trainer_features import arguments
from tests.integrations.tiny_llama import make_model
from tests.tiny import paper

CONFIG = paper(rank_factor=1 / 4, period=2, init_subnet="random")
ACCUMULATION = 4


def classifier(**changes):
    config = make_model().config
    config.update(changes)
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


def labelled(label):
    return [
        {"input_ids": torch.tensor(sample["input_ids"][:6]), "labels": label(i)}
        for i, sample in enumerate(samples())
    ]


def summed(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / (
        num_items_in_batch
    )


def mean(outputs, labels, num_items_in_batch=None):
    return functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class ScaledByTheTrainer(Trainer):
    loss_is_scaled_for_ga = False


CASES = {  # model, data, class of the Trainer, its options
    "language model": (make_model, None, Trainer, {}),
    "classification": (
        lambda: classifier(num_labels=3),
        labelled(lambda i: torch.tensor(i % 3)),
        Trainer,
        {},
    ),
    "regression": (
        lambda: classifier(num_labels=1, problem_type="regression"),
        labelled(lambda i: torch.tensor(i / 7)),
        Trainer,
        {},
    ),
    "sum over items": (make_model, None, Trainer, {"compute_loss_func": summed}),
    "mean": (make_model, None, Trainer, {"compute_loss_func": mean}),
    "mean, divided": (make_model, None, ScaledByTheTrainer, {"compute_loss_func": mean}),
    "label smoothing": (make_model, None, Trainer, {"label_smoothing_factor": 0.1}),
}


def make_trainer(case, folder, callback=None, **changes):
    model, data, kind, options = CASES[case]
    options = dict(options)
    changes |= {k: options.pop(k) for k in ("label_smoothing_factor",) if k in options}
    trainer = kind(
        apply_losia(model(), CONFIG),
        arguments(folder, gradient_accumulation_steps=ACCUMULATION, max_steps=3, **changes),
        train_dataset=data or samples(),
        **({} if data else {"data_collator": Collator(256)}),
        **options,
    )
    trainer.add_callback(LoSiACallback(trainer, **(callback or {})))
    return trainer


def alone(trainer, inputs):
    """The loss of this micro-batch as a batch of its own."""
    counted = trainer._get_num_items_in_batch([inputs], trainer.args.device)
    with torch.no_grad():
        kind, model = type(trainer), trainer.model
        return kind.compute_loss(trainer, model, dict(inputs), num_items_in_batch=counted)


@pytest.mark.parametrize("case", CASES)
def test_what_is_told_is_what_was_done(case, tmp_path):
    trainer = make_trainer(case, tmp_path)
    told, sent, means = [], [], []
    step, backward = trainer.training_step, trainer.accelerator.backward

    def watched(model, inputs, num_items_in_batch=None):
        means.append(float(alone(trainer, inputs)))
        loss = step(model, inputs, num_items_in_batch)
        told.append(trainer.optimizer.optimizer.timeline.loss_divisor)
        return loss

    def noted(loss, **kwargs):
        sent.append(float(loss.detach()))
        return backward(loss, **kwargs)

    trainer.training_step, trainer.accelerator.backward = watched, noted
    trainer.train()
    sent = sent[-len(told) :]  # without those by which the scaling was found out
    assert len(told) == 3 * ACCUMULATION
    for divisor, mean, loss in zip(told, means, sent, strict=True):
        assert divisor == pytest.approx(mean / loss, rel=1e-3)
    expected = {"classification": {1.0}, "regression": {1.0}, "mean": {1.0}, "mean, divided": {4.0}}
    assert case not in expected or set(told) == expected[case]


def test_finding_it_out_leaves_no_trace(tmp_path):
    found, told = (
        make_trainer("classification", tmp_path, callback)
        for callback in (None, {"loss_divisor": 1.0})
    )
    for trainer in (found, told):
        for module in trainer.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.3
        torch.manual_seed(0)
        trainer.train()
    ours, theirs = (trainer.model.state_dict() for trainer in (found, told))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert found.state.log_history[:-1] == told.state.log_history[:-1]


class Odd(Trainer):
    """Divides by the square root of the micro-batches, which no rule foresees."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        loss = mean(model(**inputs), labels)
        return loss / self.current_gradient_accumulation_steps**0.5


def test_what_cannot_be_told_is_said_and_can_be_given(tmp_path):
    trainer = make_trainer("language model", tmp_path, {"loss_divisor": 2.0})
    seen = []
    step = trainer.training_step
    trainer.training_step = lambda *args: (
        step(*args),
        seen.append(trainer.optimizer.optimizer.timeline.loss_divisor),
    )[0]
    trainer.train()
    assert set(seen) == {2.0}
    CASES["odd"] = (make_model, None, Odd, {})
    with pytest.warns(UserWarning, match="how Odd scales its loss cannot be told.*loss_divisor="):
        make_trainer("odd", tmp_path).train()
    del CASES["odd"]


def test_labels_that_nothing_learns_from_divide_nothing(tmp_path):
    """A batch without a learned token has neither a mean nor a gradient."""
    blank = [{**sample, "labels": 0 * sample["labels"] + IGNORE} for sample in samples(24)]
    trainer = make_trainer("language model", tmp_path)
    trainer.train_dataset = blank
    trainer.train()
    assert trainer.state.global_step == 3
