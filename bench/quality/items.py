"""What a task is made of: items, splits that share none, and batches of token ids."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100  # label of a token that is not learned


@dataclass(frozen=True)
class Item:
    """One sample. ``completion`` is learned; ``also_right``: other completions that count as right when scored.

    ``key`` is what no two splits share (a verb, a file); items of one ``group`` are reported apart."""

    key: str
    prompt: str
    completion: str
    group: str = ""
    also_right: tuple[str, ...] = ()


@dataclass(frozen=True)
class Splits:
    """``search`` chooses learning rates and nothing else; ``held_out`` gives the figures of the report."""

    train: list[Item]
    search: list[Item]
    held_out: list[Item]


def split_by_key(items: list[Item], search: int, held_out: int, seed: int = 0) -> Splits:
    """``held_out`` and ``search`` keys with one item each, so that their items are independent; all other keys
    train."""
    keys = sorted({item.key for item in items})
    random.Random(seed).shuffle(keys)
    of_key: dict[str, list[Item]] = {key: [] for key in keys}
    for item in items:
        of_key[item.key].append(item)
    chooser = random.Random(seed)
    one_each = [chooser.choice(of_key[key]) for key in keys[: held_out + search]]
    train = [item for key in keys[held_out + search :] for item in of_key[key]]
    random.Random(seed).shuffle(train)
    return Splits(train, one_each[held_out:], one_each[:held_out])


def fingerprint(items: list[Item]) -> str:
    """Equal only for the same items in the same order: scores of different items are never paired."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.prompt}\0{item.completion}\0".encode())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Encoded:
    """Token ids and, for each token, the number of the completion's line that it begins in; -1 in the prompt."""

    ids: list[int]
    line: list[int]


def encode(tokenizer, prompt: str, completion: str, max_length: int) -> Encoded:
    """Prompt and completion as one text, at most ``max_length`` tokens. A text without a prompt is learned from its
    second token on. Raises ValueError if nothing is left to learn."""
    encoded = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"][:max_length]
    lines = []
    for start, end in encoded["offset_mapping"][:max_length]:
        learned = end > len(prompt)
        begins = max(start, len(prompt)) - len(prompt)
        lines.append(completion.count("\n", 0, begins) if learned else -1)
    lines[0] = -1  # nothing precedes the first token, so nothing predicts it
    if all(line < 0 for line in lines):
        raise ValueError(f"nothing to learn within {max_length} tokens: {prompt[:60]!r}")
    return Encoded(ids, lines)


def collate(encoded: list[Encoded], device: torch.device | str) -> dict[str, Tensor]:
    """``input_ids`` and ``labels`` ``[batch, t]``, padded on the right, where a causal model needs no mask."""
    longest = max(len(sample.ids) for sample in encoded)
    ids = torch.zeros(len(encoded), longest, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    for row, sample in enumerate(encoded):
        values = torch.tensor(sample.ids)
        ids[row, : len(values)] = values
        labels[row, : len(values)] = torch.where(torch.tensor(sample.line) >= 0, values, IGNORE)
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def batches(
    items: list[Item], tokenizer, size: int, steps: int, seed: int, max_length: int, device
) -> Iterator[dict[str, Tensor]]:
    """``steps`` batches in the order that ``seed`` gives, the same for every method; epochs are shuffled anew."""
    generator = random.Random(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += generator.sample(range(len(items)), len(items))
        chosen, order = order[:size], order[size:]
        texts = [(items[i].prompt, items[i].completion) for i in chosen]
        yield collate([encode(tokenizer, *text, max_length) for text in texts], device)
