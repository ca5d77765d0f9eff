"""A Trainer with subnets that stay trains what the same Trainer does of a plain model whose gradients
are cut to them, whatever of its features are on."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

from losia_kernels import LoSiAConfig, apply_losia, losia_layers
from losia_kernels.integrations.transformers import LoSiACallback
from tests.integrations.tiny_llama import ON_CPU, make_model, make_tokenizer

LR = 2e-3
WORDS = [f"{'ab' * (i % 3 + 1)}{i}" for i in range(24)]
COMPLETIONS = [{"prompt": f"{word}:", "completion": word.upper()} for word in WORDS]
PAIRS = [{"prompt": f"{w}:", "chosen": f" {w.upper()}", "rejected": f" {w}{w}"} for w in WORDS]
ALL_AT_ONCE = {
    "neftune_noise_alpha": 5.0,
    "label_smoothing_factor": 0.1,
    "gradient_accumulation_steps": 3,
    "max_grad_norm": 0.05,
}


def arguments(kind, folder, **changes):
    values = dict(
        **ON_CPU,
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=2,
        learning_rate=LR,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        bf16=False,
        gradient_checkpointing=False,
    )
    return kind(**{**values, **changes})


def samples():
    ids = [torch.arange(5 + i, 11 + i + i % 9) for i in range(24)]
    return [
        {"input_ids": each, "attention_mask": torch.ones_like(each), "labels": each.clone()}
        for each in ids
    ]


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    ends = {"decoder_start_token_id": 256, "pad_token_id": 256}
    return T5ForConditionalGeneration(T5Config(vocab_size=261, **sizes, **ends))


def untied():
    return make_model(tie_word_embeddings=False)


def plainly(model, folder, kind=Trainer, options=TrainingArguments, **changes):
    return kind(
        model,
        arguments(options, folder, **changes),
        train_dataset=samples(),
        data_collator=DataCollatorForSeq2Seq(make_tokenizer(), model=model),
    )


def sequences(model, folder, **changes):
    return plainly(model, folder, Seq2SeqTrainer, Seq2SeqTrainingArguments, **changes)


def by_trl(name, rows):
    def make(model, folder, **changes):
        trl = pytest.importorskip("trl")
        datasets = pytest.importorskip("datasets")
        return getattr(trl, f"{name}Trainer")(
            model,
            args=arguments(getattr(trl, f"{name}Config"), folder, max_length=32, **changes),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=make_tokenizer(),
        )

    return make


PACKED = {"packing": True, "completion_only_loss": True, "gradient_accumulation_steps": 2}
CASES = {  # model, Trainer, its options, share of the output layer
    "all at once": (untied, plainly, ALL_AT_ONCE, 0.5),
    "checkpointed": (make_model, plainly, {**ALL_AT_ONCE, "gradient_checkpointing": True}, 0.0),
    "fused loss": (untied, plainly, {"gradient_accumulation_steps": 2}, 0.5),
    "T5 with smoothed labels": (t5, sequences, ALL_AT_ONCE, 0.0),
    "packed completions": (make_model, by_trl("SFT", COMPLETIONS), PACKED, 0.0),
    "preferences, no reference given": (None, by_trl("DPO", PAIRS), {"loss_type": "sigmoid"}, 0.0),
}


@pytest.mark.parametrize(
    ("make", "make_trainer", "options", "share"), CASES.values(), ids=CASES.keys()
)
@pytest.mark.filterwarnings("ignore:LoSiA. a forward with labels computed its logits")
def test_the_same_steps(tmp_path, model_folder, make, make_trainer, options, share):
    make = make or (lambda: AutoModelForCausalLM.from_pretrained(model_folder))
    start, plain, mine = make(), make(), make()
    stay = {"moves": "none", "lr_of": "subnet", "shape": "square"}
    apply_losia(mine, LoSiAConfig(0.5, output_dim_factor=share, **stay))
    layers = dict(losia_layers(mine))
    plain.requires_grad_(False)
    for name, layer in layers.items():
        weight = plain.get_submodule(name).weight.requires_grad_(True)
        inside = torch.zeros_like(weight)
        inside[layer.out_idx[:, None], layer.in_idx] = 1
        weight.register_hook(lambda grad, inside=inside: grad * inside)
    losses = []
    for model in (plain, mine):
        set_seed(0)
        trainer = make_trainer(model, tmp_path, **options)
        if model is mine:
            trainer.add_callback(LoSiACallback(trainer))
        set_seed(1)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, layer in layers.items():
        weight = plain.get_submodule(name).weight
        assert not torch.equal(weight, start.get_submodule(name).weight)
        torch.testing.assert_close(layer.weight, weight, rtol=0, atol=LR / 1000)
