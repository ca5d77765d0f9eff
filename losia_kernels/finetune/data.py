"""Training data: JSONL of prompts, chats or plain text -> token ids and labels -> batches.

Labels are -100 wherever nothing is learned: in prompts, in the turns of others, in padding. Padding
is known by its position, never by its token, so that an end-of-sequence token that doubles as
padding is still learned.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from .options import FinetuneOptions, InputError

IGNORE = -100  # label of a token that is not learned
FORMS = "{'prompt', 'completion'}, {'messages'} or {'text'}"


@dataclass(frozen=True)
class Sample:
    """One line of a data file: its values and where it stands, for errors."""

    values: dict[str, Any]
    where: str


def read_jsonl(path: str | Path) -> list[Sample]:
    """The samples of a JSONL file, blank lines skipped. Raises InputError with file and line
    number."""
    path = Path(path)
    samples = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError is one too
            raise InputError(f"{where}: not valid JSON: {error}") from None
        _check_sample(values, where)
        samples.append(Sample(values, where))
    if not samples:
        raise InputError(f"{path}: no samples; expected one a line, {FORMS}")
    return samples


def _check_sample(values: Any, where: str) -> None:
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object, {FORMS}; got {type(values).__name__}")
    if sum(form in values for form in ("prompt", "messages", "text")) != 1:
        raise InputError(f"{where}: expected exactly one of {FORMS}; got {sorted(values)}")
    if "messages" in values:
        _check_messages(values["messages"], where)
        return
    for key in ("prompt", "completion") if "prompt" in values else ("text",):
        if not isinstance(values.get(key), str):
            raise InputError(f"{where}: {key!r} must be a string, got {values.get(key)!r:.80}")
        if not values[key] and key != "prompt":
            raise InputError(f"{where}: {key!r} is empty: nothing to learn")
        _check_characters(values[key], where, repr(key))


def _check_characters(text: str, where: str, what: str) -> None:
    """JSON can say half of a character beyond 0xffff, as in a text that was cut there; no tokenizer
    takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise InputError(
            f"{where}: {what} has half of a character, {half}, at {error.start}"
        ) from None


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise InputError(
            f"{where}: 'messages' must be a list of {{'role', 'content'}}, got {messages!r:.80}"
        )
    for message in messages:
        good = isinstance(message, dict) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not good:
            raise InputError(
                f"{where}: a message must have 'role' and 'content' strings, got {message!r:.80}"
            )
        _check_characters(message["role"] + message["content"], where, "a message")
    if all(message["role"] != "assistant" for message in messages):
        raise InputError(f"{where}: no message has the role 'assistant': nothing to learn")


def encode(sample: Sample, tokenizer, max_length: int) -> dict[str, np.ndarray] | None:
    """``{"input_ids", "labels"}``, int32, at most ``max_length`` tokens; None when truncation
    leaves nothing to learn.

    Prompt and completion are tokenized as one text; a token is learned when any of its characters
    belongs to the completion (to an assistant's turn, to the text). The end of the sequence is
    appended and learned, unless a chat template ends its turns with a token of its own. Longer
    samples lose their end.
    """
    values = sample.values
    if "messages" in values:
        text, spans = _render_chat(sample, tokenizer)
        ids, learned = _tokenize(tokenizer, text, spans, False, sample.where)
        ended = ids[-1] in tokenizer.added_tokens_decoder
    else:
        prompt = values.get("prompt", "")
        text = prompt + values["completion"] if "prompt" in values else values["text"]
        ids, learned = _tokenize(tokenizer, text, [(len(prompt), len(text))], True, sample.where)
        ended = ids[-1] == tokenizer.eos_token_id
        learned[-1] |= ended
    if not ended:
        ids.append(tokenizer.eos_token_id)
        learned.append(True)
    input_ids, taught = np.array(ids[:max_length], dtype=np.int32), np.array(learned[:max_length])
    taught[0] = False  # nothing precedes the first token, so nothing predicts it
    if not taught.any():
        return None
    return {"input_ids": input_ids, "labels": np.where(taught, input_ids, np.int32(IGNORE))}


def _tokenize(
    tokenizer, text: str, spans: list[tuple[int, int]], special_tokens: bool, where: str
) -> tuple[list[int], list[bool]]:
    encoded = tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=True)
    if not encoded["input_ids"]:
        raise InputError(f"{where}: the tokenizer makes no token of {text!r:.80}")
    learned = [
        any(first < end and last > start for start, end in spans)
        for first, last in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), learned


def _render_chat(sample: Sample, tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The chat as its template writes it, and the character spans of the assistant's turns with
    their end tokens.

    It is cut after the last of them: the rest would only be read.
    """
    messages = sample.values["messages"]

    def render(upto: int, **kwargs) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:upto], tokenize=False, **kwargs)
        except Exception as error:  # whatever a template raises, jinja2's errors and its own
            raise InputError(
                f"{sample.where}: the chat template refuses this sample: {error}"
            ) from None

    text, spans = render(len(messages)), []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        through = render(turn + 1)
        if turn:
            before, found = render(turn, add_generation_prompt=True), "yes"
        else:  # what the template itself begins with, maybe a system prompt of its own, is not learned
            before, found, _ = through.rpartition(message["content"].strip() or "\0")
        if not (found and text.startswith(through) and through.startswith(before)):
            raise InputError(
                f"{sample.where}: the chat template rewrites earlier turns, so what the assistant said in turn "
                f"{turn + 1} cannot be told apart; give this sample as 'prompt' and 'completion'"
            )
        spans.append((len(before), len(through.rstrip())))
    return text[: spans[-1][1]], spans


def load_samples(
    path: str | Path, tokenizer, max_length: int
) -> tuple[list[dict[str, np.ndarray]], int]:
    """The encoded samples of a JSONL file, and how many were dropped because truncation left
    nothing to learn."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end-of-sequence token: set eos_token in its tokenizer_config.json"
        )
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for; a fast "
            f"tokenizer does (tokenizer.json)"
        )
    samples = read_jsonl(path)
    if tokenizer.chat_template is None:
        for sample in samples:
            if "messages" in sample.values:
                raise InputError(
                    f"{sample.where}: 'messages' need a chat template, and the tokenizer has none"
                )
    encoded = [encode(sample, tokenizer, max_length) for sample in samples]
    kept = [sample for sample in encoded if sample is not None]
    if not kept:
        raise InputError(
            f"{path}: with at most {max_length} tokens no sample has anything left to learn"
        )
    return kept, len(encoded) - len(kept)


def load_data(options: FinetuneOptions, tokenizer) -> tuple[list, list | None]:
    """Encoded (and packed) training samples, evaluation samples or None."""

    def load(path: str) -> list:
        samples, dropped = load_samples(path, tokenizer, options.max_length)
        if dropped:
            print(
                f"{path}: {dropped} samples have nothing to learn within {options.max_length} tokens, left out"
            )
        return pack(samples, options.max_length) if options.packing else samples

    return load(options.data), None if options.eval_data is None else load(options.eval_data)


def pack(samples: list[dict[str, np.ndarray]], max_length: int) -> list[dict[str, np.ndarray]]:
    """Whole samples, in order, joined into rows of at most ``max_length`` tokens.

    ``position_ids`` restart with every sample, which is how transformers' attention masks keep them
    apart.
    """
    rows: list[list[dict[str, np.ndarray]]] = [[]]
    length = 0
    for sample in samples:
        if length + len(sample["input_ids"]) > max_length:
            rows.append([])
            length = 0
        rows[-1].append(sample)
        length += len(sample["input_ids"])
    return [
        {
            "input_ids": np.concatenate([sample["input_ids"] for sample in row]),
            "labels": np.concatenate([sample["labels"] for sample in row]),
            "position_ids": np.concatenate(
                [np.arange(len(sample["input_ids"]), dtype=np.int32) for sample in row]
            ),
        }
        for row in rows
    ]


def pad_token_id(tokenizer) -> int:
    """The padding token, else the end of the sequence: masks go by position, so either is only a
    filler."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


@dataclass(frozen=True)
class Collator:
    """Pads samples on the right to the longest of the batch: int64 ``[batch, length]`` tensors.

    Plain samples get an ``attention_mask``. Packed rows get ``position_ids`` instead; there each
    token of the padding, all at position 0, is a document of its own.
    """

    pad_token_id: int

    def __call__(self, samples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        packed = "position_ids" in samples[0]
        shape = len(samples), max(len(sample["input_ids"]) for sample in samples)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORE),
        }
        batch["position_ids" if packed else "attention_mask"] = torch.zeros(
            shape, dtype=torch.int64
        )
        for row, sample in enumerate(samples):
            size = len(sample["input_ids"])
            for key, values in sample.items():
                batch[key][row, :size] = torch.from_numpy(values)
            if not packed:
                batch["attention_mask"][row, :size] = 1
        return batch


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """transformers' length grouping, ordered by seed and epoch alone: a resumed epoch has the order
    of the first."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()
