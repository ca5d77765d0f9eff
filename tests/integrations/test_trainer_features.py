"""What the Trainer promises any model, kept for one with subnets: schedules, precision, clipping,
resuming, the best checkpoint, early stopping, a folder to push."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from losia_kernels import LoSiAAdamW, apply_losia, calibrate, remove_losia
from losia_kernels.integrations.transformers import LoSiACallback
from losia_kernels.layers.module import losia_layers
from tests.integrations.collate import IGNORE, Collator
from tests.integrations.test_trainer import LR, samples
from tests.integrations.tiny_llama import ON_CPU, make_model, make_tokenizer
from tests.tiny import paper

CONFIG = paper(rank_factor=1 / 4, output_dim_factor=1 / 8, period=2)
STEPS, BATCH = 9, 2
ACCUMULATED = {"gradient_accumulation_steps": 2}


def arguments(folder, **changes):
    values = dict(
        **ON_CPU,
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        remove_unused_columns=False,
    )
    return TrainingArguments(**{**values, **changes})


def make_trainer(folder, model=None, callbacks=(), config=CONFIG, train=None, **changes):
    model = apply_losia(make_model() if model is None else model, config)
    trainer = Trainer(
        model,
        arguments(folder, **changes),
        data_collator=Collator(256),
        train_dataset=train or samples(),
        eval_dataset=samples(6),
        callbacks=list(callbacks),
        processing_class=make_tokenizer(),
    )
    trainer.add_callback(LoSiACallback(trainer))
    return trainer


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def same_state(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


class Watch(TrainerCallback):
    """Calls ``look(optimizer, model)`` before each update."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.seen.append(self.look(optimizer, model))


class Places(TrainerCallback):
    """Where the subnets are in the first step."""

    found = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.found = self.found or places_of(model)


def places_of(model):
    return [(layer.out_idx.clone(), layer.in_idx.clone()) for _, layer in losia_layers(model)]


def norm_of(gradients):
    return float(
        torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt()
    )


def test_the_logged_grad_norm_is_that_of_the_subnets_before_they_are_clipped(tmp_path):
    """By hand: the dense gradients of the model as it was, of both micro-batches together, at the
    subnets' places."""
    watch = Watch(
        lambda optimizer, model: norm_of([p.grad for p in model.parameters() if p.grad is not None])
    )
    trainer = make_trainer(
        tmp_path, callbacks=[watch], max_grad_norm=0.1, max_steps=1, **ACCUMULATED
    )
    places, dense = Places(), make_model(tie_word_embeddings=False)
    # untied, so that the output layer has a gradient of its own
    dense.load_state_dict(make_model().state_dict())
    trainer.add_callback(places)  # behind the callback that calibrates
    batches = list(trainer.get_train_dataloader())[:2]
    trainer.train()
    items = torch.tensor(sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches))
    for batch in batches:
        dense(**batch, num_items_in_batch=items).loss.backward()
    at_subnets = [
        dense.get_submodule(name).weight.grad[out_idx][:, in_idx]
        for (name, _), (out_idx, in_idx) in zip(
            losia_layers(trainer.model), places.found, strict=True
        )
    ]
    assert logged(trainer, "grad_norm")[0] == pytest.approx(norm_of(at_subnets), rel=1e-4)
    assert watch.seen == [pytest.approx(0.1, rel=1e-4)]


def train_by_hand(batches, autocast, config, scaler=None):
    """One micro-batch a step, in ``autocast``; a step that overflows is lost, as the Trainer loses
    it."""
    model = apply_losia(make_model(), config).train()

    def loss_of(model, batch, **items):
        with torch.autocast("cpu", autocast):
            return model(**batch, **items).loss.float()

    if config.init_subnet == "calibrated":
        calibrate(model, batches[:4], 4, loss_of)
    optimizer = LoSiAAdamW(model, lr=LR)
    for batch in batches[:STEPS]:
        loss = loss_of(model, batch, num_items_in_batch=(batch["labels"][:, 1:] != IGNORE).sum())
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            optimizer.timeline.loss_divisor = 1 / scaler.get_scale()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return model, optimizer


def test_bfloat16_autocast(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True)
    trainer.train()
    model, _ = train_by_hand(list(trainer.get_train_dataloader()), torch.bfloat16, CONFIG)
    assert same_state(trainer.model, model)
    assert all(layer.subnet.dtype == torch.float32 for _, layer in losia_layers(model))
    plain = make_trainer(tmp_path)
    plain.train()
    assert not same_state(trainer.model, plain.model)


def float16_trainer(folder, init_scale, **changes):
    """accelerate gives a CPU no scaler, so one is put where that of a GPU would be."""
    trainer = make_trainer(folder, fp16=True, **changes)
    trainer.accelerator.native_amp, trainer.accelerator.scaler = True, make_scaler(init_scale)
    return trainer


def make_scaler(init_scale):
    return torch.amp.GradScaler("cpu", init_scale=init_scale, backoff_factor=2.0**-14)


def test_float16_with_a_step_that_overflows(tmp_path):
    config = paper(rank_factor=1 / 4, output_dim_factor=1 / 8, period=2, init_subnet="random")
    trainer = float16_trainer(tmp_path, 2.0**24, config=config)
    trainer.train()
    taken = trainer.optimizer.optimizer.timeline.step
    assert 4 < taken < STEPS
    model, optimizer = train_by_hand(
        list(trainer.get_train_dataloader()), torch.float16, config, make_scaler(2.0**24)
    )
    assert optimizer.timeline.step == taken and same_state(trainer.model, model)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_float16_accumulates_with_the_scale_of_the_step(tmp_path):
    watch = Watch(
        lambda optimizer, model: (
            optimizer.scaler.get_scale(),
            optimizer.optimizer.timeline.loss_divisor,
        )
    )
    float16_trainer(tmp_path, 2.0**10, callbacks=[watch], **ACCUMULATED).train()
    divisors = [divisor * scale for scale, divisor in watch.seen]
    assert len(divisors) == STEPS and all(1 < divisor < 6 for divisor in divisors)


def test_float16_calibration_finds_a_scale_that_does_not_overflow(tmp_path):
    found = []
    for init_scale in (2.0**8, 2.0**24):
        trainer = float16_trainer(tmp_path, init_scale, max_steps=1)
        places = Places()
        trainer.add_callback(places)  # behind the callback that calibrates
        trainer.train()
        found.append(places.found)
    for ours, theirs in zip(*found, strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_gradient_checkpointing(tmp_path):
    whole, recomputed = (
        make_trainer(
            tmp_path,
            gradient_checkpointing=on,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        for on in (False, True)
    )
    whole.train()
    recomputed.train()
    for ours, theirs in zip(whole.model.parameters(), recomputed.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}),
        ("cosine_with_min_lr", {"min_lr": 1e-4}),
        ("constant_with_warmup", {}),
        ("inverse_sqrt", {}),
        ("warmup_stable_decay", {"num_decay_steps": 3}),
    ],
)
def test_a_schedule_is_that_of_any_optimizer_times_the_rewarming(tmp_path, name, options):
    changes = dict(lr_scheduler_type=name, lr_scheduler_kwargs=options, warmup_steps=3)
    config = paper(rank_factor=1 / 4, period=2, warmup_steps=3, init_subnet="random")
    rates = Watch(lambda optimizer, model: [group["lr"] for group in optimizer.param_groups])
    trainer = make_trainer(tmp_path, config=config, callbacks=[rates], **changes)
    trainer.train()
    plain = Trainer(
        make_model(),
        arguments(tmp_path, **changes),
        data_collator=Collator(256),
        train_dataset=samples(),
    )
    plain.train()
    expected = logged(plain, "learning_rate")
    assert len(expected) == STEPS
    assert logged(trainer, "learning_rate") == expected
    assert rates.seen == [[rate] * 2 for rate in expected]


def test_the_rate_falls_on_a_plateau(tmp_path):
    rates = Watch(lambda optimizer, model: [group["lr"] for group in optimizer.param_groups])
    make_trainer(
        tmp_path,
        callbacks=[rates],
        lr_scheduler_type="reduce_lr_on_plateau",
        eval_strategy="steps",
        eval_steps=1,
        lr_scheduler_kwargs={
            "patience": 0,
            "threshold": 100.0,
            "threshold_mode": "abs",
            "factor": 0.5,
        },
        prediction_loss_only=True,
    ).train()
    assert [rate for rate, *_ in rates.seen][:4] == [LR, LR, LR / 2, LR / 4]
    assert all(len(set(groups)) == 1 and len(groups) == 3 for groups in rates.seen)


# in the middle of a slot, with importance to save; at a relocalization
@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, stop):
    changes = dict(
        save_strategy="steps",
        save_steps=stop,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        **ACCUMULATED,
    )
    whole = make_trainer(tmp_path, **changes)
    whole.train()
    resumed = make_trainer(tmp_path, make_model(seed=1), **changes)
    first = Watch(lambda optimizer, model: optimizer.optimizer.timeline.step)
    resumed.add_callback(first)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert first.seen == list(range(stop, STEPS))
    assert same_state(whole.model, resumed.model)
    ours, theirs = (trainer.optimizer.state_dict() for trainer in (whole, resumed))
    assert (
        ours["param_groups"] == theirs["param_groups"]
        and ours["state"].keys() == theirs["state"].keys()
    )
    for i, state in ours["state"].items():
        assert all(
            torch.equal(state[key], theirs["state"][i][key]) for key in state | theirs["state"][i]
        )
    assert logged(whole, "loss") == logged(resumed, "loss")


def test_early_stopping_and_the_best_model(tmp_path):
    trainer = make_trainer(
        tmp_path,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        max_steps=60,
        learning_rate=0.03,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=3,
        load_best_model_at_end=True,
        prediction_loss_only=True,
    )
    trainer.train()
    state = trainer.state
    assert 0 < state.best_global_step < state.global_step == state.best_global_step + 2 < 60
    assert min(logged(trainer, "eval_loss")) == state.best_metric
    assert trainer.evaluate()["eval_loss"] == pytest.approx(state.best_metric, rel=1e-6)
    for _, layer in losia_layers(trainer.model):
        assert torch.equal(layer.subnet, layer.weight[layer.out_idx][:, layer.in_idx])


def test_what_is_pushed_is_the_plain_model_with_a_card(tmp_path, monkeypatch):
    pushed = {}

    class Hub:
        def upload_folder(self, repo_id, folder_path, **kwargs):
            pushed.update(
                {
                    path.name: path.read_bytes()
                    for path in Path(folder_path).iterdir()
                    if path.is_file()
                }
            )

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    trainer = make_trainer(tmp_path / "run", max_steps=2)
    trainer.train()
    remove_losia(trainer.model)
    trainer.hub_model_id = "somebody/tuned"
    trainer.push_to_hub()
    assert {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= set(pushed)
    assert b"generated_from_trainer" in pushed["README.md"]
    assert json.loads(pushed["config.json"])["architectures"] == ["LlamaForCausalLM"]
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not any(report.values()), report
