"""The Trainer's arguments reach the optimizer when it is made, or it is said that they do not."""

import pytest
import torch
from transformers import Trainer
from transformers.trainer_utils import HPSearchBackend

from losia_kernels import LoSiAAdamW, apply_losia
from losia_kernels.integrations.transformers import LoSiACallback, LoSiAOptimizerFactory
from losia_kernels.layers.module import losia_layers
from tests.integrations.collate import Collator
from tests.integrations.test_trainer import LR, samples
from tests.integrations.test_trainer_features import (
    CONFIG,
    STEPS,
    arguments,
    make_trainer,
    places_of,
    same_state,
)
from tests.integrations.tiny_llama import make_model
from tests.tiny import paper


def given(folder, model=None, kind=Trainer, callback=None, config=CONFIG, **changes):
    """A Trainer with the callback, and what its constructor is to be given."""
    passed = {
        key: changes.pop(key)
        for key in ("optimizers", "optimizer_cls_and_kwargs", "model_init")
        if key in changes
    }
    if "model_init" not in passed:
        passed["model"] = apply_losia(make_model() if model is None else model, config)
    trainer = kind(
        args=arguments(folder, **changes),
        data_collator=Collator(256),
        train_dataset=samples(),
        eval_dataset=samples(6),
        **passed,
    )
    trainer.add_callback(LoSiACallback(trainer, **(callback or {})))
    return trainer


def driver(trainer):
    return trainer.optimizer.optimizer


def test_an_adamw_is_made_of_the_arguments(tmp_path):
    values = dict(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.1)
    trainer = make_trainer(tmp_path, max_steps=3, learning_rate=7e-4, **values)
    trainer.train()
    for group in driver(trainer).param_groups:
        assert group["initial_lr"] == 7e-4 and group["betas"] == (0.8, 0.95)
        assert group["eps"] == 1e-6 and group["weight_decay"] == 0.1


def test_a_search_trains_each_trial_at_its_own_rate(tmp_path, monkeypatch):
    """Bound when the Trainer is made, the rate would be the same in all of them."""

    def model_init():
        return apply_losia(make_model(), CONFIG)

    trainer = given(tmp_path, model_init=model_init)
    trainer.hp_search_backend = HPSearchBackend.WANDB  # its trials are plain dicts
    # what asks for wandb itself
    monkeypatch.setattr("transformers.integrations.hp_params", dict)
    monkeypatch.setattr(Trainer, "_get_output_dir", lambda self, trial: str(tmp_path))
    found = []
    for rate in (1e-3, 4e-3, 1e-3):
        trainer.train(trial={"learning_rate": rate, "weight_decay": 10 * rate})
        found.append(trainer.model)
        assert driver(trainer).param_groups[0]["initial_lr"] == rate
        assert driver(trainer).param_groups[0]["weight_decay"] == pytest.approx(10 * rate)
    assert same_state(found[0], found[2]) and not same_state(found[0], found[1])


def test_a_search_by_optuna(tmp_path):
    pytest.importorskip("optuna")
    trainer = given(tmp_path, model_init=lambda: apply_losia(make_model(), CONFIG))
    seen = []
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-4, 3e-2])},
        compute_objective=lambda metrics: seen.append(driver(trainer)) or metrics["eval_loss"],
        n_trials=3,
        backend="optuna",
    )
    rates = {optimizer.param_groups[0]["initial_lr"] for optimizer in seen}
    assert rates <= {1e-4, 3e-2} and best.hyperparameters["learning_rate"] in rates


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "rmsprop", "lion_32bit"])
def test_another_optim_is_attached(tmp_path, optim):
    if optim == "lion_32bit":
        pytest.importorskip("bitsandbytes")
    trainer = make_trainer(tmp_path, optim=optim)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    drawn = places_of(trainer.model)
    trainer.train()
    optimizer = driver(trainer)
    assert not isinstance(optimizer, LoSiAAdamW) and optimizer.timeline.step == STEPS
    assert {group["initial_lr"] for group in optimizer.param_groups} == {LR}
    moved = [
        not torch.equal(a[0], b[0]) for a, b in zip(drawn, places_of(trainer.model), strict=True)
    ]
    assert all(moved)
    for name, layer in losia_layers(trainer.model):
        assert not torch.equal(layer.weight, before[f"{name}.weight"])


def test_an_optim_of_whole_weights_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, optim="galore_adamw", optim_target_modules="all-linear")
    with pytest.raises(ValueError, match="optim='galore_adamw' is for whole weights.*adamw_torch"):
        trainer.train()


def test_an_optim_that_cannot_begin_anew_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Adagrad makes its state when it is made"):
        make_trainer(tmp_path, optim="adagrad").train()


class Own(Trainer):
    """As projects do that have their own parameter groups."""

    def create_optimizer(self, model=None):
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=self.args.learning_rate)
        return self.optimizer


class Extended(Trainer):
    def create_optimizer(self, model=None):
        self.said = "made"
        return super().create_optimizer(model)


def test_a_trainer_that_makes_its_own_optimizer_keeps_it(tmp_path):
    own, extended = given(tmp_path, kind=Own), given(tmp_path, kind=Extended)
    own.train()
    assert type(driver(own)) is torch.optim.AdamW and driver(own).timeline.step == STEPS
    extended.train()
    assert isinstance(driver(extended), LoSiAAdamW) and extended.said == "made"


def test_an_optimizer_that_was_given_is_attached(tmp_path):
    model = apply_losia(make_model(), CONFIG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    trainer = Trainer(
        model,
        arguments(tmp_path),
        data_collator=Collator(256),
        train_dataset=samples(),
        optimizers=(optimizer, None),
    )
    trainer.add_callback(LoSiACallback(trainer))
    trainer.train()
    assert driver(trainer) is optimizer and optimizer.timeline.step == STEPS
    classes = given(tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5}))
    classes.train()
    assert driver(classes).param_groups[0]["initial_lr"] == 0.5
    assert driver(classes).timeline.step == STEPS


def test_values_that_were_bound_are_said_to_win(tmp_path):
    bound = (LoSiAOptimizerFactory, {"lr": LR, "weight_decay": 0.0})
    trainer = given(tmp_path, optimizer_cls_and_kwargs=bound, learning_rate=1e-4, weight_decay=0.1)
    with pytest.warns(UserWarning, match="learning_rate=0.0001 .it has 0.003.*weight_decay=0.1"):
        trainer.train()
    with pytest.warns(UserWarning, match="optim='sgd' .it is LoSiAAdamW"):
        given(tmp_path, optimizer_cls_and_kwargs=bound, optim="sgd").train()


def test_a_rate_that_the_checkpoint_overrides_is_said(tmp_path):
    make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    resumed = make_trainer(tmp_path, max_steps=4, learning_rate=1e-4)
    with pytest.warns(UserWarning, match="with a checkpoint: learning_rate=0.0001 .it has 0.003"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_values_as_they_are_by_default_are_not_warned_about(tmp_path, recwarn):
    given(tmp_path, optimizer_cls_and_kwargs=(LoSiAOptimizerFactory, {"lr": LR})).train()
    make_trainer(tmp_path, weight_decay=0.1, warmup_steps=2).train()
    assert not [each for each in recwarn if "without effect" in str(each.message)]


def test_options_of_the_optimizer_go_to_the_callback(tmp_path):
    trainer = given(tmp_path, callback={"moments": "bfloat16", "weight_decay": 0.2})
    trainer.train()
    assert driver(trainer).param_groups[0]["weight_decay"] == 0.2
    state = next(iter(driver(trainer).state.values()))
    assert state["exp_avg"].dtype == torch.bfloat16


def test_options_for_another_optimizer_are_refused(tmp_path):
    options = {"moments": "int8"}
    with pytest.raises(ValueError, match="moments would have no effect.*optim='sgd'"):
        given(tmp_path, callback=options, optim="sgd").train()
    bound = (LoSiAOptimizerFactory, {"lr": LR})
    with pytest.raises(ValueError, match="moments would have no effect.*optimizer_cls_and_kwargs"):
        given(tmp_path, callback=options, optimizer_cls_and_kwargs=bound)


def test_biases_and_norms_do_not_decay(tmp_path):
    config = paper(rank_factor=1 / 4, period=2, modules_to_save=["norm", "embed_tokens"])
    model = make_model(tie_word_embeddings=False)
    trainer = given(tmp_path, model, config=config, weight_decay=0.1)
    trainer.train()
    named = dict(trainer.model.named_parameters())
    decay = {
        id(p): group["weight_decay"]
        for group in driver(trainer).param_groups
        for p in group["params"]
    }
    assert decay[id(named["model.norm.weight"])] == 0
    assert decay[id(named["model.embed_tokens.weight"])] == 0.1
    assert decay[id(named["model.layers.0.self_attn.q_proj.subnet"])] == 0.1


def test_a_second_callback_takes_the_place_of_the_first(tmp_path):
    """As when a cell of a notebook is run again."""
    trainer = make_trainer(tmp_path)
    trainer.add_callback(LoSiACallback(trainer, calibration_steps=2))
    ours = [each for each in trainer.callback_handler.callbacks if isinstance(each, LoSiACallback)]
    assert [each.calibration_steps for each in ours] == [2]
    trainer.train()
    assert driver(trainer).timeline.step == STEPS
