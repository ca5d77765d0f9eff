"""What is learned, token by token; truncation, packing and the held-out part; and the lines that are
refused."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from losia_kernels.finetune.data import (
    FEATURES,
    IGNORE,
    Encoder,
    fingerprint,
    flat,
    lengths,
    load_data,
)
from losia_kernels.finetune.options import FinetuneOptions, InputError
from losia_kernels.finetune.rows import Row
from losia_kernels.finetune.trainer import sft_config
from tests.integrations.tiny_llama import make_model, make_tokenizer


def options(data="", **changes):
    return FinetuneOptions(**{"model": "", "data": str(data), "output": "", **changes})


def encode(tokenizer, values, **config):
    """A row's token ids and labels."""
    given = options(config=config)
    ids, taught = Encoder(tokenizer, sft_config(given)).encode(Row(values, "test:1"))
    return np.array(ids), np.where(taught, ids, IGNORE)


def learned(tokenizer, values, **config):
    """The sample's tokens and, apart, the learned ones, as text."""
    tokens, labels = encode(tokenizer, values, **config)
    assert tokens.shape == labels.shape
    return tokenizer.decode(tokens), tokenizer.decode(labels[labels != IGNORE])


def load(tokenizer, data, **changes):
    given = options(data, **changes)
    return load_data(given, sft_config(given), tokenizer)


def write(path, *lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"
    )
    return path


def test_of_prompt_and_completion_the_completion_and_the_end_are_learned(tokenizer):
    text, target = learned(tokenizer, {"prompt": "Say hi:", "completion": " hello"})
    assert text == "Say hi: hello<eos>"
    assert target == " hello<eos>"


def test_labels_token_by_token(tokenizer):
    tokens, labels = encode(tokenizer, {"prompt": "ab", "completion": "cd"})
    a, b, c, d = tokenizer("abcd")["input_ids"]
    eos = tokenizer.eos_token_id
    assert tokens.tolist() == [a, b, c, d, eos]
    assert labels.tolist() == [IGNORE, IGNORE, c, d, eos]


def test_of_text_all_but_the_first_token_is_learned(tokenizer):
    assert learned(tokenizer, {"text": "abc"}) == ("abc<eos>", "bc<eos>")


def test_an_empty_prompt_is_plain_text(tokenizer):
    assert learned(tokenizer, {"prompt": "", "completion": "abc"}) == ("abc<eos>", "bc<eos>")


def test_a_token_across_the_border_is_learned():
    tokenizer = make_tokenizer(merges=[("b", "c")])
    assert learned(tokenizer, {"prompt": "ab", "completion": "cd"}) == ("abcd<eos>", "bcd<eos>")


def test_an_end_that_is_there_already_is_learned_and_not_doubled(tokenizer):
    assert learned(tokenizer, {"prompt": "a", "completion": "b<eos>"}) == ("ab<eos>", "b<eos>")
    eos = tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        "$A <eos>", special_tokens=[("<eos>", eos)]
    )
    assert learned(tokenizer, {"prompt": "a", "completion": "b"}) == ("ab<eos>", "b<eos>")


def test_a_token_that_the_tokenizer_puts_first_is_not_learned(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        "<|end|> $A", special_tokens=[("<|end|>", end)]
    )
    assert learned(tokenizer, {"text": "abc"}) == ("<|end|>abc<eos>", "abc<eos>")


def test_of_a_chat_the_assistants_turns_and_their_ends_are_learned(tokenizer):
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Yes?"),
        ("user", "2+2"),
        ("assistant", "4"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    text, target = learned(tokenizer, {"messages": messages})
    assert text == (
        "<|system|>Be brief.<|end|>\n<|user|>Hi<|end|>\n<|assistant|>Yes?<|end|>\n"
        "<|user|>2+2<|end|>\n<|assistant|>4<|end|>"
    )
    assert target == "Yes?<|end|>4<|end|>"


def test_what_follows_the_assistants_last_turn_is_left_out(tokenizer):
    turns = [("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye")]
    text, target = learned(
        tokenizer, {"messages": [{"role": role, "content": text} for role, text in turns]}
    )
    assert text == "<|user|>Hi<|end|>\n<|assistant|>Yes?<|end|>"
    assert target == "Yes?<|end|>"


def test_a_chat_template_without_an_end_of_turn_gets_the_end_of_the_sequence(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    assert learned(tokenizer, {"messages": messages}) == ("user: Hi\nassistant: Yo<eos>", "Yo<eos>")


def test_a_chat_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    messages = [
        {"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")
    ]
    with pytest.raises(InputError, match="test:1: the chat template writes message 2 another way"):
        learned(tokenizer, {"messages": messages})


def test_what_a_template_begins_with_is_not_learned(tokenizer):
    """A chat that the assistant opens, under a template with a system prompt of its own."""
    tokenizer.chat_template = "<|system|>I help.<|end|>\n" + tokenizer.chat_template
    for first in ("Hello", "I"):  # "I" is in the system prompt too
        turns = [("assistant", first), ("user", "Hi"), ("assistant", "Bye")]
        messages = [{"role": role, "content": content} for role, content in turns]
        text, target = learned(tokenizer, {"messages": messages})
        chat = f"<|assistant|>{first}<|end|>\n<|user|>Hi<|end|>\n<|assistant|>Bye<|end|>"
        assert text == f"<|system|>I help.<|end|>\n{chat}"
        assert target == f"{first}<|end|>Bye<|end|>"


def test_a_first_turn_that_cannot_be_found_is_refused(tokenizer):
    with pytest.raises(
        InputError, match="message 1, the assistant.s, is empty: it cannot be told apart"
    ):
        learned(tokenizer, {"messages": [{"role": "assistant", "content": " "}]})


def test_a_chat_template_that_raises_names_the_line(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(
        InputError, match="test:1: the chat template refuses this sample: no system role"
    ):
        learned(tokenizer, {"messages": [{"role": "assistant", "content": "x"}]})


def test_a_long_sample_loses_its_end_and_learns_no_end(tokenizer, tmp_path, capsys):
    path = write(tmp_path / "d.jsonl", {"prompt": "abc", "completion": "defgh"})
    (row,) = load(tokenizer, path, max_length=5).train
    assert tokenizer.decode(row["input_ids"]) == "abcde"
    assert tokenizer.decode([label for label in row["labels"] if label != IGNORE]) == "de"
    said = capsys.readouterr().out
    assert "d.jsonl: 1 samples are longer than 5 tokens and lose their end" in said
    load(tokenizer, path, max_length=9)
    assert not capsys.readouterr().out  # the end of the sequence is the ninth


def test_a_sample_whose_prompt_fills_it_is_dropped_and_counted(tokenizer, tmp_path, capsys):
    path = write(
        tmp_path / "d.jsonl",
        {"prompt": "abcdef", "completion": "g"},
        {"prompt": "a", "completion": "b"},
    )
    assert len(load(tokenizer, path, max_length=6).train) == 1
    assert "1 samples have nothing to learn within 6 tokens, left out" in capsys.readouterr().out
    with pytest.raises(InputError, match="no sample has anything left to learn"):
        load(tokenizer, path, max_length=1)


def test_packed_rows_hold_whole_samples_and_give_their_losses(tokenizer, tmp_path):
    """TRL's best fit: each sample whole, in its labels too; a batch of rows costs what its samples
    do alone."""
    texts = [("a", "bcd"), ("efgh", "ij"), ("kl", "mnopq"), ("r", "s")]
    lines = [{"prompt": prompt, "completion": completion} for prompt, completion in texts]
    path = write(tmp_path / "d.jsonl", *lines)
    alone = load(tokenizer, path, max_length=14).train
    rows = load(tokenizer, path, max_length=14, packing=True).train
    assert len(rows) == 2 and sorted(flat(rows, "seq_lengths")) == sorted(lengths(alone))
    assert sorted(flat(rows, "labels")) == sorted(flat(alone, "labels"))
    model = make_model().eval()

    def total(samples, **how):
        batch = DataCollatorForLanguageModeling(tokenizer.eos_token_id, **how)(list(samples))
        return model(**batch, num_items_in_batch=1, use_cache=False).loss

    torch.testing.assert_close(total(rows, padding_free=True), total(alone))


def test_a_part_is_held_out_by_the_seed(tokenizer, tmp_path):
    path = write(tmp_path / "d.jsonl", *({"text": f"sample {n}"} for n in range(40)))
    data, again = (load(tokenizer, path, eval_fraction=0.25) for _ in range(2))
    other = load(tokenizer, path, eval_fraction=0.25, seed=1)

    def texts(dataset):
        return {tokenizer.decode(row["input_ids"]) for row in dataset}

    assert (len(data.train), len(data.eval)) == (30, 10)
    assert not texts(data.train) & texts(data.eval)
    assert texts(data.eval) == texts(again.eval) != texts(other.eval)
    with pytest.raises(InputError, match="eval_fraction needs two samples or more"):
        load(tokenizer, write(tmp_path / "one.jsonl", {"text": "a"}), eval_fraction=0.5)


def test_the_fingerprint_is_of_tokens_labels_and_rows():
    def made(*rows):
        return Dataset.from_list(
            [{"input_ids": ids, "labels": labels} for ids, labels in rows], features=FEATURES
        )

    seen = [
        fingerprint(made(([1, 2], [1, 2]))),
        fingerprint(made(([1, 2], [IGNORE, 2]))),
        fingerprint(made(([1], [1]), ([2], [2]))),
        fingerprint(made(([1, 2], [1, 2])), made(([1, 2], [1, 2]))),
        fingerprint(made(([1, 2], [1, 2])), None),
    ]
    assert len(set(seen)) == len(seen)
    two = made(([3], [3]), ([1, 2], [1, 2]))
    assert fingerprint(two.select([1])) == seen[0]  # of what a view shows


def test_pretokenized_rows_are_taken_as_they_are(tokenizer):
    tokens, labels = encode(tokenizer, {"input_ids": [5, 6, 7], "labels": [5, IGNORE, 7]})
    assert (tokens.tolist(), labels.tolist()) == ([5, 6, 7], [IGNORE, IGNORE, 7])
    with pytest.raises(InputError, match="test:1: 'input_ids' and 'labels' must be as many"):
        encode(tokenizer, {"input_ids": [5, 6], "labels": [5]})


def test_fields_of_the_config_decide_what_is_learned(tokenizer):
    whole = {"prompt": "ab", "completion": "cd"}
    assert learned(tokenizer, whole, completion_only_loss=False)[1] == "bcd<eos>"
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    text, target = learned(tokenizer, chat, assistant_only_loss=False)
    assert target == text.removeprefix("<|user|>")
    assert learned(tokenizer, {"note": "abc"}, dataset_text_field="note")[1] == "bc<eos>"


# what tokenizers do at the edges ------------------------------------------------------------------


def with_beginning(tokenizer):
    """As LLaMA's: it puts a token first."""
    begin = tokenizer.convert_tokens_to_ids("<|system|>")
    tokenizer.bos_token = "<|system|>"
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        "<|system|> $A", special_tokens=[("<|system|>", begin)]
    )
    return tokenizer


@pytest.mark.parametrize(
    "values",
    [{"text": "<|system|>abc"}, {"prompt": "<|system|>a", "completion": "bc"}, {"text": "abc"}],
)
def test_a_beginning_that_the_text_has_is_not_doubled_and_not_learned(tokenizer, values):
    text, target = learned(with_beginning(tokenizer), values)
    assert text == "<|system|>abc<eos>" and "<|system|>" not in target


@pytest.mark.parametrize("end", ["", "<eos>", "<eos>\n", "<eos><eos>", "<eos> \n"])
def test_the_end_is_learned_once_however_the_text_ends(tokenizer, end):
    for values in ({"text": "abc" + end}, {"prompt": "a", "completion": "bc" + end}):
        text, target = learned(tokenizer, values)
        assert text == "abc<eos>" and target == "bc<eos>"


def test_space_is_learned_with_a_tokenizer_that_trims_its_offsets(tokenizer):
    """As GPT-2's and SmolLM's: a token of space alone then stands for no character."""
    tokenizer._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False, trim_offsets=True
    )
    tokenizer._tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert tokenizer(" ", return_offsets_mapping=True)["offset_mapping"] == [(0, 0)]
    assert learned(tokenizer, {"prompt": "a", "completion": " \n b"})[1] == " \n b<eos>"
    turns = [("user", "Hi"), ("assistant", " \n b"), ("user", "2"), ("assistant", "  ")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert learned(tokenizer, {"messages": messages})[1] == " \n b<|end|>  <|end|>"


# refused lines ------------------------------------------------------------------------------------

GOOD = {"text": "good"}


def everything(path):
    load(make_tokenizer(), path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "a"', "not valid JSON"),
        ("[1]", "expected an object"),
        ({"question": "a"}, "expected exactly one of"),
        ({"text": "a", "prompt": "b"}, "expected exactly one of"),
        ({"prompt": "a"}, "'completion' must be a string, got None"),
        ({"prompt": 3, "completion": "a"}, "'prompt' must be a string, got 3"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"text": ""}, "'text' is empty"),
        ({"messages": []}, "'messages' must be a list"),
        ({"messages": [{"role": "user"}]}, "must have 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message has the role 'assistant'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, problem):
    path = write(tmp_path / "d.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(InputError) as error:
        everything(path)
    assert str(error.value).startswith(f"{path}:3: ") and problem in str(error.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match=f"{path}:2: not valid JSON"):
        everything(path)


def test_an_empty_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(
        InputError, match=r"empty\.jsonl: no samples; expected one a line, .*'prompt', 'completion'"
    ):
        everything(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(InputError, match="cannot read .*absent.jsonl: No such file"):
        everything(tmp_path / "absent.jsonl")


def test_a_tokenizer_that_lacks_what_the_data_needs_is_refused(tokenizer, tmp_path):
    path = write(tmp_path / "d.jsonl", {"messages": [{"role": "assistant", "content": "a"}]})
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=f"{path}:1: 'messages' need a chat template"):
        load(tokenizer, path)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        load(tokenizer, path)


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "cut \\ud83d"}',
        '{"prompt": "\\ude00", "completion": "a"}',
        '{"messages": [{"role": "user", "content": "a \\ud83d"}, {"role": "assistant", "content": "b"}]}',
    ],
)
def test_half_of_a_character_names_the_line(tmp_path, line):
    path = write(tmp_path / "d.jsonl", {"text": "good \U0001f600"}, line)
    with pytest.raises(InputError, match=r"d.jsonl:2: .* has half of a character, '.u(d83d|de00)'"):
        everything(path)


def test_a_text_without_tokens_names_the_line(tmp_path, tokenizer):
    tokenizer._tokenizer.normalizer = normalizers.Strip()
    path = write(tmp_path / "d.jsonl", {"text": "a b"}, {"text": "   "})
    with pytest.raises(InputError, match="d.jsonl:2: the tokenizer makes no token of '   '"):
        load(tokenizer, path)


def test_a_tokenizer_that_is_not_fast_is_refused(tmp_path):
    chat = {"messages": [{"role": "assistant", "content": "a"}]}
    with pytest.raises(
        InputError, match="ByT5Tokenizer does not say which characters a token stands for"
    ):
        load(ByT5Tokenizer(), write(tmp_path / "d.jsonl", chat))
