"""The losses: of training, the plain model's own; of an evaluation, over all learned tokens alike,
whatever batch they stand in."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from losia_kernels import apply_losia
from losia_kernels.finetune import samples
from losia_kernels.finetune.data import load_data
from losia_kernels.finetune.options import InputError
from losia_kernels.finetune.run import finetune
from losia_kernels.finetune.trainer import FinetuneTrainer, sft_config
from losia_kernels.integrations.history import read_log
from losia_kernels.integrations.transformers import LoSiAOptimizerFactory
from tests.finetune.tiny_run import options
from tests.integrations.tiny_llama import make_model, make_tokenizer
from tests.tiny import paper

COUNTS = {"a": 1, "bb": 9, "c": 2, "ddd": 17, "e": 5}  # learned letters of each sample


def trainer_of(folder, model, **changes):
    given = options(folder, folder, **changes)
    lines = [{"prompt": word, "completion": "z" * count} for word, count in COUNTS.items()]
    for path in filter(None, (given.data, given.eval_data)):
        with open(path, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    config, tokenizer = sft_config(given, 5), make_tokenizer()
    data = load_data(given, config, tokenizer)
    return FinetuneTrainer(
        model,
        config,
        processing_class=tokenizer,
        train_dataset=data.train,
        eval_dataset=data.eval,
        optimizer_cls_and_kwargs=(LoSiAOptimizerFactory, {"lr": 1e-2}),
    )


@torch.no_grad()
def by_hand(model) -> tuple[float, float]:
    """Nats per learned token, and the share of them that come first."""
    tokenizer, losses, right = make_tokenizer(), [], []
    for word, count in COUNTS.items():
        ids = torch.tensor(tokenizer(word + "z" * count + "<eos>")["input_ids"])
        scores = model(input_ids=ids[None]).logits[0, len(word) - 1 : -1].log_softmax(-1)
        losses += (-scores[torch.arange(count + 1), ids[len(word) :]]).tolist()
        right += (scores.argmax(-1) == ids[len(word) :]).tolist()
    return sum(losses) / len(losses), sum(right) / len(right)


@pytest.mark.parametrize(
    "how", [{}, {"packing": True, "group_by_length": False}], ids=["", "packing"]
)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_the_evaluation_does_not_depend_on_the_batch(tmp_path, size, how):
    model = make_model(tie_word_embeddings=False)
    loss, accuracy = by_hand(model.eval())
    seen = trainer_of(tmp_path, model, batch_size=size, **how).evaluate()
    assert seen["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert seen["eval_mean_token_accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_the_loss_that_trains_is_the_plain_models(tmp_path):
    """Also where the output layer has a subnet, whose gradient TRL's own loss would not make."""
    plain = make_model(tie_word_embeddings=False)
    config = paper(rank_factor=1 / 4, output_dim_factor=1 / 8, init_subnet="random")
    model = apply_losia(make_model(tie_word_embeddings=False), config)
    trainer = trainer_of(tmp_path, model, batch_size=5)
    (batch,) = trainer.get_train_dataloader()
    loss, expected = trainer.compute_loss(model.train(), dict(batch)), plain(**batch).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    head, dense = model.lm_head, plain.lm_head.weight.grad
    torch.testing.assert_close(head.subnet.grad, dense[head.out_idx][:, head.in_idx])


def test_trls_other_losses_train_what_they_reach_and_say_what_they_do_not(tmp_path, model_folder):
    """dft takes the output layer's weight past the layer."""
    dft = {"config": {"loss_type": "dft"}, "steps": 3, "save_steps": 0, "period": 1}
    with pytest.raises(InputError, match="loss_type dft .* output_dim_factor 0"):
        finetune(options(tmp_path, model_folder, **dft))
    assert not (tmp_path / "run").exists()
    finetune(options(tmp_path, model_folder, output_dim_factor=0.0, **dft))
    losses = [
        entry["loss"] for entry in read_log(tmp_path / "run" / "log.jsonl") if "loss" in entry
    ]
    assert len(losses) == 3 and all(loss < 0.1 for loss in losses)  # p log p, of p near 1/261


def test_a_held_out_part_is_evaluated(tmp_path, model_folder):
    given = options(
        tmp_path,
        model_folder,
        steps=4,
        eval_data=None,
        eval_fraction=0.25,
        save_steps=0,
        eval_steps=2,
    )
    finetune(given)
    entries = [e for e in read_log(tmp_path / "run" / "log.jsonl") if "eval_loss" in e]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert all(0 <= entry["eval_accuracy"] <= 1 for entry in entries)
    config, tokenizer = sft_config(given), make_tokenizer()
    held_out = load_data(given, config, tokenizer).eval
    assert len(held_out) == 10
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").requires_grad_(False)
    batch = DataCollatorForLanguageModeling(tokenizer.eos_token_id)(list(held_out))
    assert float(model(**batch).loss) == pytest.approx(entries[-1]["eval_loss"], rel=1e-4)


@pytest.mark.parametrize(("evaluated", "packing"), [(True, False), (False, False), (False, True)])
def test_samples_are_answered_at_each_evaluation_and_at_the_end(
    tmp_path, model_folder, capsys, evaluated, packing
):
    """They change no bit of the run, and ask one sample at a time, whatever the rows hold."""
    changes = {"steps": 4, "save_steps": 0, "eval_steps": 2}
    if packing:
        changes |= {"packing": True, "group_by_length": False}
    if not evaluated:
        changes["eval_data"] = None
    weights = []
    for count in (2, 0):
        folder = tmp_path / str(count)
        folder.mkdir()
        finetune(options(folder, model_folder, samples=count, **changes))
        weights.append((folder / "run" / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    entries = read_log(tmp_path / "2" / "run" / "samples.jsonl")
    steps = [2, 2, 4, 4] if evaluated else [4, 4]
    assert [entry["step"] for entry in entries] == steps
    first = entries[0]
    assert (
        first["prompt"].endswith(":")
        and first["expected"] == first["prompt"][:-1].upper() + "<eos>"
    )
    assert first["answer"] and "->" in capsys.readouterr().out
    assert not (tmp_path / "0" / "run" / "samples.jsonl").exists()


@pytest.mark.parametrize("answered", [0, 1])
def test_a_run_that_was_interrupted_at_its_end_answers_its_samples(
    tmp_path, model_folder, monkeypatch, answered
):
    """After its last checkpoint, with nothing or some of it answered."""
    count = iter(range(answered + 1))

    def answer(*arguments):
        if next(count) == answered:
            raise KeyboardInterrupt
        return [1]

    changes = {"steps": 4, "save_steps": 2, "eval_data": None, "samples": 2}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(samples, "generate", answer)
        finetune(options(tmp_path, model_folder, **changes))
    finetune(options(tmp_path, model_folder, **changes, resume=True))
    entries = read_log(tmp_path / "run" / "samples.jsonl")
    assert [entry["step"] for entry in entries] == [4, 4]
    assert entries[0]["prompt"] != entries[1]["prompt"]


def test_a_resumed_run_is_not_evaluated_as_if_it_began(tmp_path, model_folder):
    changes = {"steps": 4, "save_steps": 2, "eval_steps": 2, "config": {"eval_on_start": True}}
    finetune(options(tmp_path, model_folder, **changes))
    run = tmp_path / "run"
    for folder in ("model", "checkpoints/checkpoint-4"):
        shutil.rmtree(run / folder)
    finetune(options(tmp_path, model_folder, **changes, resume=True))
    evaluated = [each["step"] for each in read_log(run / "log.jsonl") if "eval_loss" in each]
    assert evaluated == [0, 2, 4]
