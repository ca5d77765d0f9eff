"""Ends within a prompt, tokens that are cut off, and columns beside tokens."""

import warnings

import pytest
from tokenizers import processors

from tests.finetune.test_data import IGNORE, learned, load, write


def test_a_long_sample_can_lose_its_beginning(tokenizer, tmp_path):
    data = write(tmp_path / "d.jsonl", {"prompt": "a" * 20, "completion": "bcd"}, {"text": "wxyz"})
    rows = load(tokenizer, data, max_length=3, config={"truncation_mode": "keep_end"}).train
    eos = tokenizer.eos_token
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["cd" + eos, "yz" + eos]
    assert [row["labels"][0] for row in rows] == [IGNORE, IGNORE]  # nothing precedes it


def test_columns_beside_tokens_that_nothing_reads_are_said(tokenizer, tmp_path):
    hidden = {"input_ids": [5, 6], "attention_mask": [1, 0], "text": "a"}
    with pytest.warns(UserWarning, match="nothing reads the columns 'attention_mask', 'text'"):
        load(tokenizer, write(tmp_path / "a.jsonl", hidden))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = {"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": [1, 1]}
        load(tokenizer, write(tmp_path / "b.jsonl", shown))


@pytest.mark.parametrize("adds_end", [False, True])
def test_the_end_of_a_prompt_is_read_and_the_samples_learned(tokenizer, adds_end):
    if adds_end:
        end = [("<eos>", tokenizer.eos_token_id)]
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", None, end)
    for completion in ("b", "b<eos>", "b<eos>\n"):
        row = {"prompt": "a<eos>", "completion": completion}
        assert learned(tokenizer, row) == ("a<eos>b<eos>", "b<eos>")
    row = {"prompt": "a<eos>", "completion": "<eos>"}
    assert learned(tokenizer, row) == ("a<eos>", "<eos>")
