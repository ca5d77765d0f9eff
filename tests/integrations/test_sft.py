"""TRL's SFTTrainer with the same factory and callback: prompts, chats and packing; its loss that
builds no logits."""

import pytest
import torch

from losia_kernels import apply_losia, remove_losia
from losia_kernels.integrations.transformers import LoSiACallback, LoSiAOptimizerFactory
from losia_kernels.layers.module import losia_layers
from tests.integrations.tiny_llama import make_model, make_tokenizer
from tests.tiny import paper

pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

CONFIG = paper(rank_factor=1 / 4, period=2)
STEPS, ACCUMULATION, LR = 8, 2, 3e-2
WORDS = ["a" * (i % 5 + 1) + "b" * (i % 7) for i in range(24)]
PROMPTS = [{"prompt": f"{word}:", "completion": word.upper()} for word in WORDS]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": word},
            {"role": "assistant", "content": word.upper()},
        ]
    }
    for word in WORDS
]


def make_trainer(folder, rows, config=CONFIG, kind=SFTTrainer, **changes):
    values = dict(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=LR,
        max_length=32,
        gradient_accumulation_steps=ACCUMULATION,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        lr_scheduler_type="constant",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = kind(
        apply_losia(make_model(), config),
        SFTConfig(**{**values, **changes}),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        optimizer_cls_and_kwargs=(LoSiAOptimizerFactory, {"lr": LR}),
    )
    trainer.add_callback(LoSiACallback(trainer))
    return trainer


class Divisors(SFTTrainer):
    """Notes, of every micro-batch, what the timeline was told, and the ratio of the mean loss to
    the one returned."""

    seen = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with torch.no_grad():
            logits = (
                model(**{k: v for k, v in inputs.items() if k != "labels"})
                .logits[:, :-1]
                .flatten(0, 1)
            )
        mean = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        self.seen.append(
            (self.optimizer.optimizer.timeline.loss_divisor, float(mean / loss.detach()))
        )
        return loss


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (PROMPTS, {}),
        (CHATS, {}),
        (PROMPTS, {"packing": True, "packing_strategy": "wrapped"}),
        (PROMPTS, {"packing": True, "packing_strategy": "bfd"}),
    ],
    ids=["prompts", "chats", "wrapped", "packed"],
)
def test_subnets_learn_and_move_by_the_mean_loss_of_each_micro_batch(tmp_path, rows, changes):
    trainer = make_trainer(tmp_path, rows, kind=Divisors, **changes)
    trainer.seen = []
    before = make_model().state_dict()
    first = {name: layer.out_idx.clone() for name, layer in losia_layers(trainer.model)}
    trainer.train()
    assert len(trainer.seen) > STEPS
    for told, true in trainer.seen:
        assert told == pytest.approx(true, rel=1e-3)
    if not changes:
        # micro-batches differ in what is learned
        assert len({round(told, 3) for told, _ in trainer.seen}) > 2
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-2:]) < sum(losses[:2])
    assert any(
        not torch.equal(layer.out_idx, first[name]) for name, layer in losia_layers(trainer.model)
    )
    after = remove_losia(trainer.model).state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if "_proj" in name}


def test_its_loss_goes_round_the_output_layer(tmp_path):
    config = paper(rank_factor=1 / 4, output_dim_factor=1 / 8, period=2)
    with pytest.raises(
        RuntimeError,
        match="lm_head: the loss gave the output layer.s subnet no gradient.*SFTTrainer",
    ):
        make_trainer(tmp_path, PROMPTS, config).train()


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    whole = make_trainer(tmp_path, PROMPTS, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make_trainer(tmp_path, PROMPTS, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
