"""What a model is held to before a run, what of it is saved beside its weights, and that it stops
where its samples ended."""

import dataclasses
import json
import shutil
import types
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from losia_kernels.checkpoint.export import export_checkpoint
from losia_kernels.cli import main
from losia_kernels.finetune.model import resolve_dtype
from losia_kernels.finetune.options import InputError
from losia_kernels.finetune.run import finetune
from losia_kernels.finetune.trainer import sft_config
from tests.checkpoint.trained_pairs import assert_same_model
from tests.finetune.tiny_run import options
from tests.integrations.tiny_llama import make_model, make_tokenizer

SHORT = {"steps": 2, "save_steps": 0, "period": 1, "eval_data": None, "group_by_length": False}


def saved(folder: Path, tokenizer=None, **config) -> Path:
    """A model's folder."""
    make_model(**config).save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


def write(path: str, *rows: dict) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_sample_longer_than_learned_positions_is_told_before_the_run(tmp_path):
    """GPT-2 fails in the middle, at the step that draws the sample."""
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=261, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    given = options(tmp_path, tmp_path / "gpt2", steps=2)
    Path(given.data).write_text('{"text": "short"}\n{"text": "seventeen tokens"}\n')
    with pytest.raises(
        InputError, match="a sample has 17 tokens, but GPT2LMHeadModel has learned 16 positions"
    ):
        finetune(given)
    assert not (tmp_path / "run").exists()
    finetune(dataclasses.replace(given, max_length=16))
    assert (tmp_path / "run" / "model").exists()


# at the edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_factor": 1.0},
        {"rank_factor": 1.0, "output_dim_factor": 1.0},
        {"rank_factor": 1.0, "output_dim_factor": 0.0},
        {"rank_factor": 1.0, "init_subnet": "random", "importance": "marginal"},
    ],
    ids=["calibrated", "with the output layer", "without it", "random"],
)
def test_a_whole_layer_can_be_the_subnet(tmp_path, model_folder, changes):
    finetune(options(tmp_path, model_folder, **SHORT, **changes))
    before = load_file(model_folder / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in before if "_proj" in name)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("packing", [False, True])
def test_fewer_samples_than_a_batch_are_a_batch(tmp_path, model_folder, rows, packing):
    given = options(tmp_path, model_folder, packing=packing, **SHORT)
    write(given.data, *({"text": f"sample {n}"} for n in range(rows)))
    finetune(given)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_filler_beyond_the_embedding_is_not_needed(tmp_path):
    """Its place is known by position, so any token fills it; the tokenizer is saved as it was."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    folder = saved(tmp_path / "model", tokenizer)
    finetune(options(tmp_path, folder, **SHORT))
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").pad_token == "<pad>"


def test_a_tokenizer_without_a_filler_stays_without(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    folder = saved(tmp_path / "model", tokenizer, pad_token_id=None)
    finetune(options(tmp_path, folder, **SHORT))
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").pad_token is None
    ours, theirs = (
        json.loads((path / "config.json").read_text())
        for path in (tmp_path / "run" / "model", folder)
    )
    assert ours == theirs


def test_a_token_beyond_the_embedding_is_told_before_the_run(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    folder = saved(tmp_path / "model", tokenizer)
    given = options(tmp_path, folder, **SHORT)
    write(given.data, {"text": "a <new> b"})
    with pytest.raises(
        InputError, match=r"the token 261 \('<new>'\), but the model has embeddings of 261"
    ):
        finetune(given)
    assert not (tmp_path / "run").exists()


def test_a_base_that_lacks_a_weight_is_told_before_the_run(tmp_path):
    folder = saved(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match="lacks 1 of its weights, first model.layers.1.mlp.up_proj.weight"
    ):
        finetune(options(tmp_path, folder, **SHORT))
    assert not (tmp_path / "run").exists()


def test_an_encoder_is_told_before_the_run(tmp_path):
    """Whose tokens see what they are to guess: its loss would fall to nothing, and it learns to copy."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for decoder in (True, False):
        config = BertConfig(vocab_size=261, intermediate_size=48, is_decoder=decoder, **sizes)
        folder = tmp_path / f"bert-{decoder}"
        BertLMHeadModel(config).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        given = options(tmp_path, folder, **SHORT, output=str(tmp_path / f"run-{decoder}"))
        if decoder:
            finetune(given)
            continue
        with pytest.raises(InputError, match="BertLMHeadModel of bert is no causal language model"):
            finetune(given)
        assert not (tmp_path / "run-False").exists()


# where a model stops ------------------------------------------------------------------------------


def trained_to_answer(
    tmp_path, model: Path, row: dict, **changes
) -> tuple[AutoModelForCausalLM, AutoTokenizer]:
    """The saved model of a run that has learned one row by heart."""
    given = options(
        tmp_path,
        model,
        **SHORT | {"steps": 60, "period": 20},
        rank_factor=1.0,
        output_dim_factor=1.0,
        lr_scheduler="constant",
        warmup_ratio=0.0,
        batch_size=1,
        gradient_accumulation=1,
        **changes,
    )
    write(given.data, row)
    finetune(given)
    folder = tmp_path / "run" / "model"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def answer_of(model, tokenizer, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :])


def test_a_chat_model_stops_where_its_turns_end(tmp_path):
    """Its base stops at another token alone, which a chat never has."""
    folder = saved(tmp_path / "model")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    model, tokenizer = trained_to_answer(tmp_path, folder, {"messages": chat})
    end, base = tokenizer.convert_tokens_to_ids(["<|end|>", "<eos>"])
    assert model.generation_config.eos_token_id == [end, base]
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert answer_of(model, tokenizer, prompt) == "Yo<|end|>"
    assert tokenizer.chat_template == make_tokenizer().chat_template


@pytest.mark.parametrize("base_stops", [256, None, [257, 256]])
def test_a_text_model_stops_at_its_end(tmp_path, base_stops):
    folder = saved(tmp_path / "model")
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text()) | {"eos_token_id": base_stops}
    path.write_text(json.dumps(settings))
    model, tokenizer = trained_to_answer(tmp_path, folder, {"prompt": "Hi:", "completion": "Yo"})
    assert model.generation_config.eos_token_id == (base_stops or 256)
    assert answer_of(model, tokenizer, "Hi:") == "Yo<eos>"


def test_an_end_and_a_template_of_the_config_are_used_and_saved(tmp_path, model_folder):
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}")
    config = {"eos_token": "<|end|>", "chat_template_path": str(template)}
    given = options(tmp_path, model_folder, config=config, **SHORT)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    write(given.data, {"messages": chat})
    finetune(given)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.eos_token == "<|end|>" and tokenizer.chat_template == template.read_text()
    for name, words in (("eos_token", "is no token"), ("chat_template_path", "cannot load")):
        with pytest.raises(InputError, match=f"{name}.*{words}"):
            finetune(
                options(
                    tmp_path, model_folder, config={name: "./absent"}, output=str(tmp_path / name)
                )
            )


# devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("cuda", torch.bfloat16),
        ("xpu", torch.bfloat16),
        ("mps", torch.bfloat16),
        ("cpu", torch.float32),
    ],
)
def test_whatever_torch_has_is_used(tmp_path, model_folder, monkeypatch, kind, dtype):
    device = None if kind == "cpu" else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **how: device)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: device is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: True)
    assert resolve_dtype("auto") == dtype and resolve_dtype("float32") == torch.float32
    monkeypatch.setattr("transformers.TrainingArguments._setup_devices", torch.device("cpu"))
    assert sft_config(options(tmp_path, model_folder)).use_cpu == (kind == "cpu")


# the card and the hub -----------------------------------------------------------------------------


def test_the_card_says_how_the_model_came_about(tmp_path, model_folder):
    given = options(tmp_path, model_folder, steps=4, save_steps=0, period=2, eval_steps=2)
    finetune(given)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\n") and "- losia" in card
    for row in (
        "| rank factor p | 0.25, square |",
        "| moves | importance |",
        "| period | 2 steps |",
        "| data | train.jsonl |",
        f"| data, sha256 | {record['data_sha256']} |",
        "| evaluation loss | ",
        "| training loss, last tenth | ",
        "transformers 5",
    ):
        assert row in card, card
    assert "the best by" not in card
    code = card.partition("```python\n")[2].partition("```")[0]
    exec(code.replace('"run"', repr(str(tmp_path / "run" / "model"))), {})


@pytest.fixture(scope="module")
def with_best(tmp_path_factory, model_folder):
    """A run whose result is its checkpoint of step 2, which the highest loss makes the best."""
    folder = tmp_path_factory.mktemp("best")
    best = {"load_best_model_at_end": True, "greater_is_better": True}
    given = dict(steps=6, save_steps=2, eval_steps=2, period=2)
    given["config"] = {**best, "metric_for_best_model": "eval_loss"}
    finetune(options(folder, model_folder, **given))
    return folder, given


def test_the_card_is_of_the_best_model_where_that_is_taken(with_best, tmp_path):
    run = with_best[0] / "run"
    card = (run / "model" / "README.md").read_text()
    assert "| steps | 6 of 4 x 2 samples; this is step 2, the best by eval_loss |" in card
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    of_best = next(line["eval_loss"] for line in log if line["step"] == 2 and "eval_loss" in line)
    first = [line["loss"] for line in log if "loss" in line][1]
    assert f"| evaluation loss | {of_best:.4f} nats" in card
    assert f"| training loss, last tenth | {first:.4f} nats" in card
    export_checkpoint(run / "checkpoints" / "checkpoint-2", tmp_path / "plain")
    hide_card = shutil.ignore_patterns("README.md")
    shutil.copytree(run / "model", tmp_path / "model", ignore=hide_card)
    assert_same_model(tmp_path / "plain", tmp_path / "model")


@pytest.mark.parametrize("last", [4, 6])
def test_a_resumed_run_finds_the_best_model_wherever_it_is(
    with_best, tmp_path, model_folder, last, capsys
):
    first, given = with_best
    shutil.copytree(first, tmp_path / "moved")
    run = tmp_path / "moved" / "run"
    (run / "model").rename(tmp_path / "whole")
    for step in range(last + 2, 8, 2):
        shutil.rmtree(run / "checkpoints" / f"checkpoint-{step}")
    finetune(options(tmp_path / "moved", model_folder, resume=True, **given))
    said = capsys.readouterr().out
    assert "the model is that of step 2, the best by eval_loss" in said
    assert_same_model(tmp_path / "whole", run / "model")


def test_a_best_model_that_is_damaged_is_not_the_result(with_best, tmp_path, model_folder):
    first, given = with_best
    shutil.copytree(first, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "checkpoint-6")
    weights = run / "checkpoints" / "checkpoint-2" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.warns(UserWarning, match="checkpoint-2 was the best so far .* is damaged"):
        finetune(options(tmp_path / "copy", model_folder, resume=True, **given))
    assert "this is step 6, the best by" in (run / "model" / "README.md").read_text()


def test_the_finished_model_is_pushed(tmp_path, model_folder, monkeypatch):
    calls = []
    fake = {
        "whoami": lambda self: calls.append(("whoami", self.token)),
        "create_repo": lambda self, name, **how: (
            calls.append(("create", name, how)) or types.SimpleNamespace(repo_id=f"me/{name}")
        ),
        "upload_folder": lambda self, **how: calls.append(("upload", how)),
    }
    for name, function in fake.items():
        monkeypatch.setattr(HfApi, name, function)
    config = {
        "push_to_hub": True,
        "hub_model_id": "mine",
        "hub_token": "t",
        "hub_private_repo": True,
    }
    finetune(options(tmp_path, model_folder, config=config, **SHORT | {"save_steps": 1}))
    assert calls[0] == ("whoami", "t")
    assert calls[1] == ("create", "mine", {"private": True, "exist_ok": True})
    (name, how), folder = calls[2], tmp_path / "run" / "model"
    assert name == "upload" and how["repo_id"] == "me/mine" and Path(how["folder_path"]) == folder
    assert len(calls) == 3  # no checkpoint was


def test_a_push_that_cannot_be_is_told_before_the_run(tmp_path, model_folder, monkeypatch, capsys):
    def whoami(self):
        raise OSError("Token is required\nmore")

    monkeypatch.setattr(HfApi, "whoami", whoami)
    given = options(tmp_path, model_folder)
    path = tmp_path / "run.yaml"
    path.write_text("push_to_hub: true\n")
    arguments = ["--model", given.model, "--data", given.data, "--output", given.output]
    assert main(["finetune", "--config", str(path), *arguments]) == 2
    assert capsys.readouterr().err == (
        "losia-kernels: push_to_hub: the hub does not know you: Token is required\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_push_that_fails_after_the_run_says_where_the_model_is(
    tmp_path, model_folder, monkeypatch
):
    def refuse(self, *arguments, **options):
        raise OSError("503 Server Error\nmore")

    monkeypatch.setattr(HfApi, "whoami", lambda self: {})
    monkeypatch.setattr(HfApi, "create_repo", refuse)
    given = options(tmp_path, model_folder, config={"push_to_hub": True}, **SHORT)
    folder = tmp_path / "run" / "model"
    with pytest.raises(InputError, match=f"{folder} and was not pushed: 503 .*hf upload NAME"):
        finetune(given)
    assert (folder / "config.json").exists()


def test_a_template_that_is_no_text_is_named(tmp_path, model_folder):
    (tmp_path / "t.jinja").write_bytes(b"\xff\xfe")
    config = {"chat_template_path": str(tmp_path / "t.jinja")}
    with pytest.raises(
        InputError, match="chat_template_path: cannot read .*t.jinja: 'utf-8' codec"
    ):
        finetune(options(tmp_path, model_folder, config=config, **SHORT))
