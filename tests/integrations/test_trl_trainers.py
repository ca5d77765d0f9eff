"""Every Trainer of TRL that runs on one machine, with the callback alone and at its defaults: what
it learns with, where it starts, what its losses are divided by."""

import importlib

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from losia_kernels import LoSiAAdamW, apply_losia
from losia_kernels.integrations.transformers import LoSiACallback
from losia_kernels.layers.module import losia_layers
from tests.integrations.paper_adapter import paper_adapter
from tests.integrations.tiny_llama import ON_CPU, make_model, make_tokenizer
from tests.tiny import paper

pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402

STEPS, ACCUMULATION, LR = 4, 2, 2e-3
WORDS = [f"{'ab' * (i % 3 + 1)}{i}" for i in range(32)]
PAIRS = [{"prompt": f"{w}:", "chosen": f" {w.upper()}", "rejected": f" {w}{w}"} for w in WORDS]
PROMPTS = [{"prompt": f"{word}:"} for word in WORDS]
COMPLETIONS = [{"prompt": f"{word}:", "completion": word.upper()} for word in WORDS]
CHATS = [
    {"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w.upper()}]}
    for w in WORDS
]
JUDGED = [{"prompt": f"{w}:", "completion": w, "label": i % 2 == 0} for i, w in enumerate(WORDS)]
GENERATED = {"num_generations": 2, "max_completion_length": 5}


def reward(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]


# module, data, arguments, what else it is given, what its losses are divided by: the micro-batches,
# a share of the learned tokens, or nothing
BY_STEPS, BY_ITEMS, BY_NOTHING = "steps", "items", "nothing"
TRAINERS = {
    "SFT": ("trl", COMPLETIONS, {}, {}, BY_ITEMS),
    "Reward": ("trl", PAIRS, {}, {}, BY_STEPS),
    "DPO": ("trl", PAIRS, {}, {}, BY_STEPS),
    "KTO": ("trl", JUDGED, {}, {}, BY_STEPS),
    "GRPO": ("trl", PROMPTS, GENERATED, {"reward_funcs": reward}, BY_STEPS),
    "RLOO": ("trl", PROMPTS, GENERATED, {"reward_funcs": reward}, BY_STEPS),
    "Distillation": ("trl", PROMPTS, {"max_completion_length": 5}, {"teacher_model"}, BY_STEPS),
    "ORPO": ("trl.experimental.orpo", PAIRS, {}, {}, BY_STEPS),
    "CPO": ("trl.experimental.cpo", PAIRS, {}, {}, BY_STEPS),
    "GKD": ("trl.experimental.gkd", CHATS, {"max_new_tokens": 5}, {"teacher_model"}, BY_ITEMS),
    "OnlineDPO": (
        "trl.experimental.online_dpo",
        PROMPTS,
        {"max_new_tokens": 5},
        {"reward_funcs": reward},
        BY_NOTHING,
    ),
    "GMPO": ("trl.experimental.gmpo", PROMPTS, GENERATED, {"reward_funcs": reward}, BY_STEPS),
    "TPO": ("trl.experimental.tpo", [p | {"reference": "x"} for p in PAIRS], {}, {}, BY_STEPS),
    "SDFT": (
        "trl.experimental.sdft",
        [p | {"privileged_context": "say it loud"} for p in PROMPTS],
        GENERATED,
        {},
        BY_STEPS,
    ),
    "SDPO": ("trl.experimental.sdpo", PROMPTS, GENERATED, {"reward_funcs": reward}, BY_STEPS),
    "GOLD": (
        "trl.experimental.gold",
        CHATS,
        {"max_completion_length": 5},
        {"teacher_model"},
        BY_ITEMS,
    ),
    "IWOPD": (
        "trl.experimental.iw_opd",
        CHATS,
        {"max_completion_length": 5},
        {"teacher_model"},
        BY_ITEMS,
    ),
    "A2PO": (
        "trl.experimental.a2po",
        PROMPTS,
        {"max_completion_length": 5},
        {"reward_funcs": reward},
        BY_STEPS,
    ),
}


def make_trainer(name, folder, model_folder, peft_config=None, output_dim_factor=0.0, **changes):
    module, rows, arguments, given, _ = TRAINERS[name]
    module = importlib.import_module(module)
    values = dict(
        **ON_CPU,
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=LR,
        gradient_accumulation_steps=ACCUMULATION,
        bf16=False,
        gradient_checkpointing=False,
    )
    values |= {"max_length": 32} if rows[0].keys() & {"chosen", "completion", "messages"} else {}
    kind = AutoModelForSequenceClassification if name == "Reward" else AutoModelForCausalLM
    options = {"num_labels": 1} if name == "Reward" else {}
    model = kind.from_pretrained(model_folder, **options)
    if isinstance(given, set):  # a teacher other than the student
        teacher = make_model(seed=1)
        teacher.save_pretrained(folder / "teacher")  # IWOPD compares tokenizers by the folder
        make_tokenizer().save_pretrained(folder / "teacher")
        teacher.config._name_or_path = str(folder / "teacher")
        given = {"teacher_model": teacher}
    config = paper(rank_factor=1 / 4, period=1, output_dim_factor=output_dim_factor)
    if peft_config is not None:
        given = {**given, "peft_config": peft_config}
    return getattr(module, f"{name}Trainer")(
        model=apply_losia(model, config) if peft_config is None else model,
        args=getattr(module, f"{name}Config")(**{**values, **arguments, **changes}),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        **given,
    )


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "SFT"])
def test_as_a_peft_config(name, tmp_path, model_folder):
    pytest.importorskip("peft")

    config = paper_adapter(rank_factor=1 / 4, period=1, task_type="CAUSAL_LM")
    trainer = make_trainer(name, tmp_path, model_folder, peft_config=config)
    trainer.add_callback(LoSiACallback(trainer))
    trainer.train()
    timeline = trainer.optimizer.optimizer.timeline
    assert timeline.step == STEPS
    assert all(len(layer.block_values) > 1 for layer in timeline.layers)  # they have moved


PAST_THE_HEAD = ("SFT", "DPO", "KTO", "GRPO", "RLOO", "Distillation")


@pytest.mark.parametrize("name", [*PAST_THE_HEAD, "ORPO", "CPO", "GKD", "TPO"])
def test_a_trained_output_layer(name, tmp_path, model_folder):
    """Some losses read its weight past it, which its first forward tells."""
    trainer = make_trainer(name, tmp_path, model_folder, output_dim_factor=1 / 4)
    trainer.add_callback(LoSiACallback(trainer))
    if name in PAST_THE_HEAD:
        with pytest.raises(RuntimeError, match=r"reads lm_head.weight past the layer.*DPOTrainer"):
            trainer.train()
        assert trainer.state.global_step == 0
        return
    head = trainer.model.lm_head.weight.clone()
    trainer.train()
    assert not torch.equal(trainer.model.lm_head.weight, head)


def places(model):
    return [layer.out_idx.clone() for _, layer in losia_layers(model)]


def differ(ours, theirs):
    return not all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", TRAINERS)
def test_one_line_is_enough(name, tmp_path, model_folder):
    trainer = make_trainer(name, tmp_path, model_folder)
    drawn, seen = places(trainer.model), []
    trainer.add_callback(LoSiACallback(trainer))
    step = trainer.training_step

    def watched(model, inputs, num_items_in_batch=None):
        found = places(trainer.model)
        loss = step(model, inputs, num_items_in_batch)
        seen.append((trainer.optimizer.optimizer.timeline.loss_divisor, found))
        return loss

    trainer.training_step = watched
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, LoSiAAdamW) and optimizer.timeline.step == STEPS
    assert optimizer.param_groups[0]["initial_lr"] == LR
    # what the trainer counts and logs is of its own steps alone
    assert getattr(trainer, "_step", STEPS * ACCUMULATION) == STEPS * ACCUMULATION
    divisors, found = zip(*seen, strict=True)
    assert len(seen) == STEPS * ACCUMULATION
    assert differ(drawn, found[0]) and differ(found[0], found[-1])
    divided = TRAINERS[name][-1]
    if divided == BY_ITEMS:
        assert len({round(divisor, 3) for divisor in divisors}) > 1
        assert all(1 < divisor < 9 for divisor in divisors)
    else:
        assert set(divisors) == {ACCUMULATION if divided == BY_STEPS else 1}
