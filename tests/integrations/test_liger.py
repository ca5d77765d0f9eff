"""Liger-Kernel in models that LoSiA trains: its real kernels, under Triton's interpreter."""

import dataclasses

import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn

from losia_kernels import LoSiAAdamW, apply_losia
from losia_kernels.integrations.transformers import LoSiACallback, LoSiAOptimizerFactory
from losia_kernels.layers import linear
from losia_kernels.ops import gather
from tests.conftest import INTERPRETED
from tests.integrations.tiny_llama import make_model, make_tokenizer
from tests.integrations.tiny_models import FAMILIES
from tests.liger import in_this_process_no_more, interpreted
from tests.tiny import paper, places

liger = pytest.importorskip("liger_kernel.transformers")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled in this process")

NAMES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
LLAMA = FAMILIES["llama"]
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(autouse=True)
def kernels():
    with interpreted():
        yield


@pytest.fixture
def together(monkeypatch):
    """Layers that read one input gather and sum together, as on a GPU."""
    monkeypatch.setattr(linear, "pays", lambda x: True)


def patch(model: nn.Module, **options: bool) -> nn.Module:
    liger._apply_liger_kernel_to_instance(model, **options)
    return model


def batch_of(name: str, seed: int = 0) -> dict[str, Tensor]:
    return {key: value[:, :4] for key, value in FAMILIES[name].batch(seed).items()}


def gradients(model: nn.Module, name: str) -> dict[str, Tensor]:
    loss = model(**batch_of(name)).loss
    loss.backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def train(model: nn.Module, steps: int) -> None:
    optimizer = LoSiAAdamW(model, lr=0.01)
    for step in range(steps):
        model(**batch_of("llama", step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("liger_first", [True, False], ids=["liger, losia", "losia, liger"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_plain_model(together, name, liger_first):
    """Observing layers and those outside their slot; RMSNorm's in-place backward on our sum."""
    config = paper(rank_factor=0.25, modules_to_save=["norm"])
    plain = apply_losia(FAMILIES[name].make(), config)
    expected = gradients(plain, name)
    with in_this_process_no_more(plain):
        model = FAMILIES[name].make()
        if liger_first:
            apply_losia(patch(model), config)
        else:
            patch(apply_losia(model, config))
        found = gradients(model, name)
    assert "Liger" in str(model) and any("norm" in key for key in found)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_gate_and_up_share_their_input_in_ligers_mlp(together, monkeypatch):
    """One gather for q, k, v, one for o, one for gate and up, one for down."""
    plain_gather, count = gather.gather_features_plain, []
    monkeypatch.setattr(
        gather, "gather_features_plain", lambda x, idx: (count.append(1), plain_gather(x, idx))[1]
    )
    model = LLAMA.make()
    with in_this_process_no_more(model):
        apply_losia(patch(model), paper(rank_factor=0.25, moves="none", init_subnet="random"))
        gradients(model, "llama")
    assert len(count) == 4 * len(model.model.layers)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
def test_subnets_move_as_in_the_plain_model(together, checkpointing):
    config = paper(rank_factor=0.25, period=1)
    plain = apply_losia(LLAMA.make(), config)
    before = places(plain)
    train(plain, 3)
    model = LLAMA.make()
    with in_this_process_no_more(model):
        apply_losia(patch(model), config)
        if checkpointing:
            how = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        train(model, 3)
    assert places(model) == places(plain) != before
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4)


# the output layer ---------------------------------------------------------------------------------

HEAD = paper(rank_factor=0.25, output_dim_factor=0.25)


@pytest.mark.parametrize("loss", ["cross_entropy", "neither"])
def test_an_output_layer_that_liger_calls_is_trained(loss):
    expected = gradients(apply_losia(LLAMA.make(), HEAD), "llama")
    model = LLAMA.make()
    with in_this_process_no_more(model):
        options = {"fused_linear_cross_entropy": False, "cross_entropy": loss == "cross_entropy"}
        apply_losia(patch(model, **options), HEAD)
        found = gradients(model, "llama")
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(("steps_before", "factor"), [(0, 0.25), (0, 1.0), (1, 0.25)])
def test_a_loss_that_goes_round_a_trained_output_layer_is_an_error_in_the_forward(
    steps_before, factor
):
    """In any step: Liger calls the layer in evaluations, and not in training."""
    model = LLAMA.make()
    with in_this_process_no_more(model):
        apply_losia(patch(model), dataclasses.replace(HEAD, output_dim_factor=factor))
        train(model.eval(), steps_before)
        with torch.no_grad():
            model.train()(**batch_of("llama"))
        with pytest.raises(RuntimeError, match="lm_head: .*fused_linear_cross_entropy=False"):
            model(**batch_of("llama"))
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(labels=batch_of("llama")["labels"])


def test_without_a_fused_loss_the_first_step_is():
    model = LLAMA.make()
    with in_this_process_no_more(model):
        apply_losia(patch(model), dataclasses.replace(HEAD, fused_loss=False))
        with pytest.raises(RuntimeError, match="lm_head: .*fused_linear_cross_entropy=False"):
            train(model, 1)


# what patches the model itself --------------------------------------------------------------------


def trained_by(kind, folder, model: nn.Module, config, **changes) -> nn.Module:
    """``model`` after three steps of a Trainer or an SFTTrainer."""
    rows = [{"prompt": "ab", "completion": "AB"}, {"prompt": "c", "completion": "CCC"}] * 3
    values = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        **changes,
    }
    if kind == "Trainer":
        tokenized = [{"input_ids": (ids := [5 + i, 6, 7, 8]), "labels": ids} for i in range(6)]
        trainer = transformers.Trainer
        arguments, more = transformers.TrainingArguments(**values), {"train_dataset": tokenized}
    else:
        trl = pytest.importorskip("trl")
        trainer = trl.SFTTrainer
        arguments = trl.SFTConfig(**values, bf16=False, gradient_checkpointing=False)
        more = {"train_dataset": Dataset.from_list(rows), "processing_class": make_tokenizer()}
    trainer = trainer(
        apply_losia(model, config),
        arguments,
        optimizer_cls_and_kwargs=(LoSiAOptimizerFactory, {"lr": 1e-2}),
        **more,
    )
    trainer.add_callback(LoSiACallback(trainer))
    trainer.train()
    return model


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_a_trainer_that_patches_the_model(tmp_path, kind):
    """Which it does after ``apply_losia``."""
    config = paper(rank_factor=0.25, period=1)
    plain = trained_by(kind, tmp_path, make_model(), config)
    model = make_model()
    with in_this_process_no_more(model):
        trained_by(kind, tmp_path, model, config, use_liger_kernel=True)
    assert "Liger" in str(model) and places(model) == places(plain)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4)


def test_a_trainer_that_goes_round_a_trained_output_layer(tmp_path):
    model = make_model(tie_word_embeddings=False)
    with (
        in_this_process_no_more(model),
        pytest.raises(RuntimeError, match="lm_head: the loss gave"),
    ):
        trained_by("Trainer", tmp_path, model, HEAD, use_liger_kernel=True)


def test_pefts_subnets():
    peft = pytest.importorskip("peft")
    from losia_kernels.integrations.peft import LoSiAPeftConfig

    config = LoSiAPeftConfig(rank_factor=0.25, target_modules="all-linear")
    expected = gradients(peft.get_peft_model(LLAMA.make(), config), "llama")
    model = LLAMA.make()
    with in_this_process_no_more(model):
        adapted = peft.get_peft_model(model, config)
        found = gradients((patch(model), adapted)[1], "llama")
    torch.testing.assert_close(found, expected, **CLOSE)
