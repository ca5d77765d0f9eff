"""Training data: rows -> token ids and labels -> the data sets that TRL's SFTTrainer takes.

Labels are -100 wherever nothing is learned: in prompts, in the turns of others. A text ends with
the end of the sequence, once; an assistant's turn with what its chat template ends it with.
"""

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from trl import SFTConfig, pack_dataset
from trl.data_utils import common_prefix_length

from .chat import Chat, ChatWriter
from .forms import FORMS, read_chat, read_text
from .options import FinetuneOptions, InputError
from .rows import Row, read_rows

IGNORE = -100  # label of a token that is not learned
FEATURES = Features(input_ids=List(Value("int32")), labels=List(Value("int32")))


class Encoder:
    """Makes token ids and labels of rows, whatever their form.

    ``ends``: the tokens that samples end with so far.
    ``columns``: those that nothing has read.
    ``forms``: what rows have been: "chat", "prompt" with a completion, "text", "tokens".
    """

    def __init__(self, tokenizer, config: SFTConfig):
        if tokenizer.eos_token_id is None:
            raise InputError(
                "the tokenizer has no end-of-sequence token: set eos_token in its tokenizer_config.json, or in --config"
            )
        self.tokenizer, self.config = tokenizer, config
        self.writer = ChatWriter(tokenizer)
        self.ends: set[int] = set()
        self.columns: set[str] = set()
        self.forms: set[str] = set()

    def encode(self, row: Row) -> tuple[list[int], np.ndarray]:
        """The row's token ids, and which of them are learned.

        Raises:
            InputError: naming the row, if it is of no known form or cannot be learned as it is.
        """
        if isinstance(row.values, dict) and "input_ids" in row.values:
            self.forms.add("tokens")
            return self._encoded(row)
        form = read_chat(row, self.columns) or read_text(row, self.config, self.columns)
        ids, learned = self._chat(form, row) if isinstance(form, Chat) else self._text(*form, row)
        learned[0] = False  # nothing precedes the first token, so nothing predicts it
        kind = "prompt" if "prompt" in row.values else "text"
        self.forms.add("chat" if isinstance(form, Chat) else kind)
        return ids, learned

    def _chat(self, chat: Chat, row: Row) -> tuple[list[int], np.ndarray]:
        if not self.tokenizer.is_fast:
            raise InputError(
                f"{type(self.tokenizer).__name__} does not say which characters a token stands for, which chats need; "
                f"a fast tokenizer does (tokenizer.json)"
            )
        text, parts = self.writer.write(chat, row.where)
        self.writer.note_unread(chat)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), np.array(encoded["offset_mapping"])
        learned = np.zeros(len(ids), bool)
        for part in parts:  # offsets without their space end where the token does: still inside
            learned |= (offsets[:, 0] < part.stop) & (offsets[:, 1] > part.start)
        if not part.ended:
            ids, learned = [*ids, self.tokenizer.eos_token_id], np.append(learned, True)
        if part.last:  # turns in the middle may end otherwise, with a token that does not stop
            self.ends.add(ids[-1])
        if self.config.assistant_only_loss is False:
            learned[:] = True
        return ids, learned

    def _text(self, prompt: str, completion: str, row: Row) -> tuple[list[int], np.ndarray]:
        """Prompt and completion are tokenized as one text: a token across the border is learned."""
        end = self.tokenizer.eos_token
        if completion.rstrip().endswith(
            end
        ):  # as chats that were written out end, and a line break
            completion = completion.rstrip()
        ids = self._bounded(self.tokenizer(prompt + completion)["input_ids"])
        if len(ids) == 1:  # its end
            raise InputError(
                f"{row.where}: the tokenizer makes no token of {prompt + completion!r:.80}"
            )
        before = 0
        if prompt and self.config.completion_only_loss is not False:
            # an end of the prompt's own is read; the sample's is learned, whatever it says
            own = self._begun(self.tokenizer(prompt)["input_ids"])
            before = min(common_prefix_length(own, ids), len(ids) - 1)
        self.ends.add(ids[-1])
        return ids, np.arange(len(ids)) >= before

    def _bounded(self, ids: list[int]) -> list[int]:
        """With one beginning of the sequence, if any, and one end, whoever wrote them."""
        eos, ids = self.tokenizer.eos_token_id, self._begun(ids)
        while ids[-1:] == [eos]:
            del ids[-1]
        return [*ids, eos]

    def _begun(self, ids: list[int]) -> list[int]:
        bos, ids = self.tokenizer.bos_token_id, list(ids)
        while bos is not None and ids[:2] == [bos, bos]:
            del ids[0]
        return ids

    def _encoded(self, row: Row) -> tuple[list[int], np.ndarray]:
        """Tokens that the user has made, as TRL takes them."""
        ids = row.values["input_ids"]
        labels = row.values.get("labels", ids)
        good = all(
            isinstance(each, list) and each and all(type(value) is int for value in each)
            for each in (ids, labels)
        )
        if (
            not good
            or len(labels) != len(ids)
            or any(b not in (a, IGNORE) for a, b in zip(ids, labels, strict=True))
        ):
            raise InputError(
                f"{row.where}: 'input_ids' and 'labels' must be as many whole numbers each, equal or -100 where "
                f"nothing is learned"
            )
        if not all(0 <= value < 2**31 for value in ids):
            raise InputError(f"{row.where}: 'input_ids' must be tokens, whole numbers from 0 on")
        masks = [name for name in ("completion_mask", "assistant_masks") if row.values.get(name)]
        if masks and "labels" not in row.values:
            raise InputError(
                f"{row.where}: {masks[0]!r} beside 'input_ids' is not read: give 'labels', -100 where "
                f"nothing is learned"
            )
        self.columns |= row.values.keys() - {"input_ids", "labels"}
        if all(row.values.get("attention_mask") or ()):  # nothing is hidden
            self.columns.discard("attention_mask")
        learned = np.array(labels) != IGNORE
        learned[0] = False
        return ids, learned

    def encode_all(self, rows: Iterable[Row], data: str) -> Dataset:
        """All rows as a data set of ``input_ids`` and ``labels``, cut to ``max_length``; it says how
        many had nothing left to learn."""
        config, samples, dropped, cut = self.config, [], 0, 0
        most = config.max_length
        if config.packing and config.packing_strategy != "bfd":  # which cut rows, not samples
            most = None
        keep = slice(-most, None) if most and config.truncation_mode == "keep_end" else slice(most)
        for row in rows:
            ids, learned = self.encode(row)
            tokens, taught = np.array(ids[keep], np.int32), learned[keep]
            taught[0] = False  # its beginning may have been cut off
            if taught.any():
                samples.append((tokens, np.where(taught, tokens, np.int32(IGNORE))))
                cut += len(tokens) < len(ids)
            else:
                dropped += 1
        if dropped and samples:
            print(f"{data}: {dropped} samples have nothing to learn within {most} tokens, left out")
        if cut:
            side = "beginning" if config.truncation_mode == "keep_end" else "end"
            print(f"{data}: {cut} samples are longer than {most} tokens and lose their {side}")
        if not samples and not dropped:
            raise InputError(f"{data}: no samples; expected one a line, {FORMS}")
        if not samples:
            raise InputError(
                f"{data}: with at most {most} tokens no sample has anything left to learn"
            )
        self.writer.warn_unread(data)
        if self.columns:
            names = ", ".join(map(repr, sorted(self.columns)))
            warnings.warn(f"{data}: nothing reads the columns {names}", stacklevel=2)
        columns = {name: [sample[i] for sample in samples] for i, name in enumerate(FEATURES)}
        return Dataset.from_dict(columns, features=FEATURES)


def check_rows(options: FinetuneOptions, config: SFTConfig) -> None:
    """Raises InputError for the first row of the data that is malformed, before a model is loaded."""
    for rows in filter(None, (_train_rows(options), _eval_rows(options))):
        for row in rows:
            if not isinstance(row.values, dict) or "input_ids" not in row.values:
                read_chat(row, set()) or read_text(row, config, set())


def _train_rows(options: FinetuneOptions) -> Iterator[Row]:
    return read_rows(options.data, options.data_split, options.data_config)


def _eval_rows(options: FinetuneOptions) -> Iterator[Row] | None:
    if options.eval_data is None:
        return None
    return read_rows(options.eval_data, options.eval_split, options.data_config)


class Data(NamedTuple):
    """What a run trains on and is evaluated on, the tokens that samples end with, the samples that it
    may be asked, one a row, and the forms that rows have (``Encoder.forms``)."""

    train: Dataset
    eval: Dataset | None
    ends: set[int]
    single: Dataset
    forms: set[str]


def load_data(options: FinetuneOptions, config: SFTConfig, tokenizer) -> Data:
    """The run's data, encoded and, if asked, packed; the same bits every time.

    Raises:
        InputError: naming the file and the line of what cannot be learned.
    """
    encoder = Encoder(tokenizer, config)
    train, held_out = encoder.encode_all(_train_rows(options), options.data), None
    rows = _eval_rows(options)
    if rows is not None and options.eval_data is not None:
        held_out = encoder.encode_all(rows, options.eval_data)
    elif options.eval_fraction:
        if len(train) < 2:
            raise InputError(
                f"eval_fraction needs two samples or more, {options.data} has {len(train)}"
            )
        if len(train) - math.ceil(len(train) * options.eval_fraction) < 1:
            raise InputError(
                f"eval_fraction {options.eval_fraction:g} of {len(train)} samples leaves none to learn"
            )
        split = train.train_test_split(test_size=options.eval_fraction, seed=options.seed)
        train, held_out = (split[name].flatten_indices() for name in ("train", "test"))
    if config.shuffle_dataset:
        train = train.shuffle(seed=config.seed).flatten_indices()
    single = train if held_out is None else held_out
    if config.packing:
        train = pack_dataset(train, config.max_length, config.packing_strategy)
    if held_out is not None and config.eval_packing:
        held_out = pack_dataset(held_out, config.max_length, config.packing_strategy)
    return Data(train, held_out, encoder.ends, single, encoder.forms)


def column(dataset: Dataset, name: str) -> pa.Array:
    """A column of lists as one Arrow array."""
    values = dataset.with_format("arrow")[:][name]
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def lengths(dataset: Dataset) -> np.ndarray:
    """How many tokens each row has."""
    return column(dataset, "input_ids").value_lengths().to_numpy()


def flat(dataset: Dataset, name: str) -> np.ndarray:
    """A column of lists, one after the other."""
    return column(dataset, name).flatten().to_numpy()


def fingerprint(*parts: Dataset | None) -> str:
    """sha256 of all that the model gets to see of data sets: their tokens, labels and rows."""
    digest = hashlib.sha256()
    for dataset in parts:
        if dataset is None:
            digest.update(b"none")
            continue
        for name in sorted(dataset.column_names):
            sizes = column(dataset, name).value_lengths().to_numpy()
            for values in (sizes, flat(dataset, name)):
                digest.update(
                    f"{name} {len(values)} ".encode()
                    + np.ascontiguousarray(values, np.int64).tobytes()
                )
    return digest.hexdigest()
