"""transformers' causal LMs with the fused loss against their own: one training step, whatever their
forward does."""

import warnings

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from losia_kernels import LoSiAAdamW, apply_losia
from losia_kernels.layers import lazy_logits
from losia_kernels.layers.module import losia_layers
from tests.tiny import paper
from tests.tolerance import assert_within

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {  # and what is particular about the way to the loss
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Mistral": {},
    "Gemma": {},  # tied
    "Gemma2": {"final_logit_softcapping": 5.0},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "GPTNeoX": {"hidden_size": 32},  # its head is called embed_out
}


def make_model(name: str, output_dim_factor: float, fused: bool, dtype=torch.float32):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MODELS[name]})
    model = AutoModelForCausalLM.from_config(config).train()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.to(dtype)
    losia = paper(rank_factor=0.25, output_dim_factor=output_dim_factor, period=1, fused_loss=fused)
    return apply_losia(model, losia)


def make_batch() -> dict:
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def calls(monkeypatch) -> list:
    """One entry for each loss that was computed without logits."""
    seen = []
    original = lazy_logits.losia_linear_cross_entropy
    monkeypatch.setattr(
        lazy_logits,
        "losia_linear_cross_entropy",
        lambda *a, **k: seen.append(k) or original(*a, **k),
    )
    return seen


def truth_of(name: str, num_items: int | None, output_dim_factor: float):
    """Loss and gradients in float64, from whole logits: transformers' own loss is float32 whatever
    the model is."""
    model, batch = make_model(name, output_dim_factor, False, torch.float64), make_batch()
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    loss = loss / (num_items or (batch["labels"][:, 1:] != -100).sum())
    loss.backward()
    return loss, {layer: module.subnet.grad for layer, module in losia_layers(model)}


@pytest.mark.parametrize("output_dim_factor", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("num_items", [None, 40], ids=["mean", "num_items"])
@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_is_the_ordinary_one(calls, name, num_items, output_dim_factor):
    """Loss and every gradient as near to float64's as the ordinary step's, nothing told, evaluation
    alike."""
    losses, grads, evaluated = [], [], []
    batch = make_batch()
    extra = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    for fused in (True, False):
        model = make_model(name, output_dim_factor, fused)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss = model(**batch, **extra).loss
            loss.backward()
        losses.append(loss)
        grads.append({layer: module.subnet.grad for layer, module in losia_layers(model)})
        with torch.no_grad():
            evaluated.append(model(**batch))
    true_loss, true_grads = truth_of(name, num_items, output_dim_factor)
    assert_within(*losses, true_loss)
    for layer, truth in true_grads.items():
        assert_within(*(grad[layer] / truth.abs().max() for grad in (*grads, true_grads)))
    torch.testing.assert_close(evaluated[0].loss, evaluated[1].loss)
    assert torch.equal(evaluated[0].logits + 0, evaluated[1].logits)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["Gemma2", "Granite"])
def test_training_moves_the_same_subnets(name):
    """Double precision, two cycles of three groups: the head relocalizes to the same rows."""
    moves = []
    for fused in (True, False):
        model = make_model(name, 0.25, fused, torch.float64)
        optimizer = LoSiAAdamW(model, lr=1e-3)
        for _ in range(6):
            model(**make_batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moves.append(
            {layer: (m.out_idx.tolist(), m.in_idx.tolist()) for layer, m in losia_layers(model)}
        )
    assert moves[0] == moves[1]
    assert moves[0]["lm_head"][0] != make_model(name, 0.25, True).lm_head.out_idx.tolist()


def test_generation_and_gradient_checkpointing(calls):
    fused, plain = (make_model("Llama", 0.25, fused) for fused in (True, False))
    ids = make_batch()["input_ids"][:, :5]
    tokens = [
        model.eval().generate(ids, max_new_tokens=4, do_sample=False) for model in (fused, plain)
    ]
    assert torch.equal(*tokens) and not calls
    grads = []
    for model in (fused, plain):
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model(**make_batch()).loss.backward()
        grads.append(model.lm_head.subnet.grad)
    torch.testing.assert_close(*grads)
    assert len(calls) == 1


def test_a_part_of_the_logits_by_name(calls):
    """logits_to_keep slices the hidden states before the head: the loss is over those."""
    fused, plain = (make_model("Llama", 0.25, fused) for fused in (True, False))
    batch = make_batch()
    batch["labels"] = batch["labels"][:, -6:]
    torch.testing.assert_close(*(model(**batch, logits_to_keep=6).loss for model in (fused, plain)))
    assert len(calls) == 1
