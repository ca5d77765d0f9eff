"""What is learned, token by token; truncation, padding, packing; and the lines that are refused."""

import json

import numpy as np
import pytest
import torch
from tokenizers import normalizers, processors
from transformers import ByT5Tokenizer

from losia_kernels.finetune.data import (
    IGNORE,
    Collator,
    EpochLengthGroupedSampler,
    Sample,
    encode,
    load_samples,
    pack,
    read_jsonl,
)
from losia_kernels.finetune.options import InputError
from tests.integrations.tiny_llama import make_model, make_tokenizer


def learned(tokenizer, values, max_length=100):
    """The sample's tokens and, apart, the learned ones, as text."""
    sample = encode(Sample(values, "test:1"), tokenizer, max_length)
    tokens, labels = sample["input_ids"], sample["labels"]
    assert tokens.shape == labels.shape and len(tokens) <= max_length
    assert set(labels[labels != tokens]) <= {IGNORE}
    return tokenizer.decode(tokens), tokenizer.decode(labels[labels != IGNORE])


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
    sample = encode(Sample({"prompt": "ab", "completion": "cd"}, "test:1"), tokenizer, 100)
    a, b, c, d = tokenizer("abcd")["input_ids"]
    eos = tokenizer.eos_token_id
    assert sample["input_ids"].tolist() == [a, b, c, d, eos]
    assert sample["labels"].tolist() == [IGNORE, IGNORE, c, d, eos]


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
    with pytest.raises(InputError, match="test:1: the chat template rewrites earlier turns"):
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
    with pytest.raises(InputError, match="what the assistant said in turn 1 cannot be told apart"):
        learned(tokenizer, {"messages": [{"role": "assistant", "content": " "}]})


def test_a_chat_template_that_raises_names_the_line(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(
        InputError, match="test:1: the chat template refuses this sample: no system role"
    ):
        learned(tokenizer, {"messages": [{"role": "assistant", "content": "x"}]})


def test_a_long_sample_loses_its_end_and_learns_no_end(tokenizer):
    assert learned(tokenizer, {"prompt": "abc", "completion": "defgh"}, max_length=5) == (
        "abcde",
        "de",
    )


def test_a_sample_whose_prompt_fills_it_is_dropped_and_counted(tokenizer, tmp_path):
    path = write(
        tmp_path / "d.jsonl",
        {"prompt": "abcdef", "completion": "g"},
        {"prompt": "a", "completion": "b"},
    )
    kept, dropped = load_samples(path, tokenizer, max_length=6)
    assert (len(kept), dropped) == (1, 1)
    with pytest.raises(InputError, match="no sample has anything left to learn"):
        load_samples(path, tokenizer, max_length=1)


def test_padding_is_masked_by_position_and_the_end_stays_learned(tokenizer):
    eos = tokenizer.eos_token_id
    samples = [
        encode(Sample({"text": text}, "test:1"), tokenizer, 6) for text in ("ab", "abcdefgh")
    ]
    batch = Collator(pad_token_id=eos)(samples)
    assert batch["input_ids"][0].tolist()[2:] == [eos] * 4
    assert batch["labels"][0].tolist()[2:] == [eos, IGNORE, IGNORE, IGNORE]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert all(values.dtype == torch.int64 for values in batch.values())


def test_packed_rows_hold_whole_samples_in_order():
    samples = [
        {"input_ids": np.full(n, n, np.int32), "labels": np.full(n, n, np.int32)}
        for n in (3, 4, 2, 5)
    ]
    rows = pack(samples, max_length=8)
    assert [row["input_ids"].tolist() for row in rows] == [
        [3, 3, 3, 4, 4, 4, 4],
        [2, 2, 5, 5, 5, 5, 5],
    ]
    assert rows[0]["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3]


def test_a_packed_row_gives_the_loss_of_its_samples_alone(tokenizer):
    texts = [("a", "bcd"), ("efgh", "ij"), ("kl", "mnopq")]
    samples = [
        encode(Sample({"prompt": p, "completion": c}, "test:1"), tokenizer, 64) for p, c in texts
    ]
    model, collate = make_model().eval(), Collator(tokenizer.eos_token_id)
    apart = sum(model(**collate([sample]), num_items_in_batch=1).loss for sample in samples)
    rows = pack(samples, max_length=14)
    assert len(rows) == 2  # of different lengths: one is padded
    together = model(**collate(rows), num_items_in_batch=1, use_cache=False).loss
    torch.testing.assert_close(together, apart)


def test_length_groups_depend_on_seed_and_epoch_alone():
    lengths = [n % 17 + 1 for n in range(64)]

    def order(epoch, seed=3):
        sampler = EpochLengthGroupedSampler(4, lengths, seed)
        sampler.set_epoch(epoch)
        torch.rand(epoch + 1)  # the global generator has no say
        return list(sampler)

    assert order(1) == order(1) and sorted(order(1)) == list(range(64))
    assert order(1) != order(2) and order(1) != order(1, seed=4)
    batches = torch.tensor([lengths[i] for i in order(1)]).view(-1, 4)
    assert (batches.amax(1) - batches.amin(1)).float().mean() < 4  # unsorted: 10


# refused lines ------------------------------------------------------------------------------------

GOOD = {"text": "good"}


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
        read_jsonl(path)
    assert str(error.value).startswith(f"{path}:3: ") and problem in str(error.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match=f"{path}:2: not valid JSON"):
        read_jsonl(path)


def test_an_empty_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(
        InputError, match=r"empty\.jsonl: no samples; expected one a line, .*'prompt', 'completion'"
    ):
        read_jsonl(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(InputError, match="cannot read .*absent.jsonl: No such file"):
        read_jsonl(tmp_path / "absent.jsonl")


def test_a_tokenizer_that_lacks_what_the_data_needs_is_refused(tokenizer, tmp_path):
    path = write(tmp_path / "d.jsonl", {"messages": [{"role": "assistant", "content": "a"}]})
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=f"{path}:1: 'messages' need a chat template"):
        load_samples(path, tokenizer, 10)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        load_samples(path, tokenizer, 10)


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
        read_jsonl(path)


def test_a_text_without_tokens_names_the_line(tmp_path, tokenizer):
    tokenizer._tokenizer.normalizer = normalizers.Strip()
    path = write(tmp_path / "d.jsonl", {"text": "a b"}, {"text": "   "})
    with pytest.raises(InputError, match="d.jsonl:2: the tokenizer makes no token of '   '"):
        load_samples(path, tokenizer, 64)


def test_a_tokenizer_that_is_not_fast_is_refused(tmp_path):
    with pytest.raises(
        InputError, match="ByT5Tokenizer does not say which characters a token stands for"
    ):
        load_samples(write(tmp_path / "d.jsonl", {"text": "a"}), ByT5Tokenizer(), 64)
