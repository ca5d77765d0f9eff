"""Items, splits, batches, and the scores of a model."""

import pytest
import torch

pytest.importorskip("transformers")

from bench.harness.jobs import MissingPeer
from bench.quality.evaluate import score_items, summary
from bench.quality.items import IGNORE, Item, batches, collate, encode, fingerprint, split_by_key
from bench.quality.tasks import LONGEST, TASKS, english
from tests.bench.quality_tiny import ALPHABET, CharTokenizer, tiny_base, tiny_splits


@pytest.mark.parametrize("name", TASKS)
def test_no_item_is_in_two_splits(name):
    try:
        splits = TASKS[name].splits
    except MissingPeer as missing:
        pytest.skip(str(missing))
    parts = splits.train, splits.search, splits.held_out
    keys = [{item.key for item in part} for part in parts]
    prompts = [{item.prompt for item in part} for part in parts]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not keys[first] & keys[second]
        if name != "code":  # two files may begin with the same lines of licence
            assert not prompts[first] & prompts[second]
    assert len(splits.search) >= 30 and len(splits.held_out) >= 90 and len(splits.train) > 5000
    assert len(splits.held_out) >= TASKS[name].few
    for item in splits.held_out[:50] + splits.search:
        assert item.completion.endswith("\n") and all(
            text.endswith("\n") for text in item.also_right
        )
    assert len(keys[1]) == len(splits.search) and len(keys[2]) == len(splits.held_out)


def test_irregular_verbs_are_held_out_and_apart():
    pytest.importorskip("lemminflect")
    held_out = TASKS["past-tense"].splits.held_out
    assert [item.group for item in held_out[:180]] == [""] * 120 + ["irregular"] * 60


def test_other_text_and_code_fit_into_what_is_scored():
    assert len(english()) == 40 and all(400 < len(item.completion) <= 600 for item in english())
    assert all(
        len(item.prompt + item.completion) < LONGEST for item in TASKS["code"].splits.held_out
    )


def test_items_of_one_key_stay_together():
    items = [Item(f"k{i % 20}", f"p{i}", "c\n") for i in range(100)]
    splits = split_by_key(items, search=3, held_out=2)
    assert (len(splits.held_out), len(splits.search), len(splits.train)) == (2, 3, 75)
    keys = [{item.key for item in part} for part in (splits.train, splits.search, splits.held_out)]
    assert [len(part) for part in keys] == [15, 3, 2] and len(set.union(*keys)) == 20
    assert split_by_key(items, 3, 2) == splits != split_by_key(items, 3, 2, seed=1)


def test_only_the_completion_is_learned_line_by_line():
    found = encode(CharTokenizer(), "ab", "c\nd", max_length=10)
    assert found.line == [-1, -1, 0, 0, 1]
    assert encode(CharTokenizer(), "", "abc", 10).line == [-1, 0, 0]
    assert encode(CharTokenizer(), "ab", "cdef", 4).line == [-1, -1, 0, 0]
    with pytest.raises(ValueError, match="nothing to learn"):
        encode(CharTokenizer(), "abcd", "e\n", 4)
    batch = collate([found, encode(CharTokenizer(), "a", "b", 10)], "cpu")
    assert batch["labels"][1].tolist() == [IGNORE, ALPHABET.index("b"), IGNORE, IGNORE, IGNORE]
    assert batch["labels"][0, 2:].tolist() == batch["input_ids"][0, 2:].tolist()


def test_a_seed_gives_the_batches_and_an_epoch_repeats_no_item():
    def draw(seed):
        return [
            b["input_ids"].tolist()
            for b in batches(tiny_splits().train, CharTokenizer(), 6, 4, seed, 32, "cpu")
        ]

    assert draw(0) == draw(0) != draw(1)
    seen = [tuple(row) for batch in draw(0)[:3] for row in batch]
    assert len(set(seen)) == 18  # all training items once


def test_a_line_is_right_when_greedy_decoding_would_say_it():
    base = tiny_base()
    prompt = "say q:"
    ids = [ALPHABET.index(letter) for letter in prompt]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    said = "".join(ALPHABET[i] for i in ids)[len(prompt) :]
    other = "z" if said[-1] != "z" else "y"
    said_otherwise = said[:-1] + other
    items = [
        Item("1", prompt, said),
        Item("2", prompt, said_otherwise),
        Item("3", prompt, said_otherwise, "", (said,)),
    ]
    scores = score_items(base.model, base.tokenizer, items, 32)
    lines = len([line for line in said.split("\n") if line.strip()])
    assert [score.right for score in scores] == [lines, lines - 1, lines]
    assert [score.hits for score in scores[:2]] == [6, 5]
    assert scores[2].nll == pytest.approx(scores[1].nll)  # the cost is that of what is taught


def test_the_cost_is_the_models_own_loss():
    base = tiny_base()
    items = tiny_splits().held_out
    scores = score_items(base.model, base.tokenizer, items, 32)
    for item, score in zip(items, scores, strict=True):
        batch = collate([encode(base.tokenizer, item.prompt, item.completion, 32)], "cpu")
        assert score.nll / score.tokens == pytest.approx(base.model(**batch).loss.item(), rel=1e-5)
    found = summary(items, scores)[""]
    assert found["nll"] == pytest.approx(sum(s.nll for s in scores) / sum(s.tokens for s in scores))
    assert found["items"] == 4 and found["right"] == 100 * sum(s.right for s in scores) / 4


def test_blank_lines_do_not_count_and_groups_are_apart():
    base = tiny_base()
    items = [Item("1", "a", "b\n\nc\n"), Item("2", "a", "b\n", "odd")]
    assert [score.lines for score in score_items(base.model, base.tokenizer, items, 32)] == [2, 1]
    assert set(summary(items, score_items(base.model, base.tokenizer, items, 32))) == {"", "odd"}


def test_fingerprint_knows_other_items():
    items = tiny_splits().held_out
    assert fingerprint(items) == fingerprint(list(items))
    changed = Item(items[-1].key, items[-1].prompt, " other\n")
    others = items[:-1], items[::-1], [*items[:-1], changed]
    assert len({fingerprint(items), *map(fingerprint, others)}) == 4
