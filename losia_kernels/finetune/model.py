"""The model of a run: loaded, held to what the run asks of it, converted."""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .. import apply_losia
from ..checkpoint.folder import INDEX, MARKER, WEIGHTS, ModelFolder
from .data import Data, flat, lengths
from .options import FinetuneOptions, InputError
from .rows import is_local

LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    RuntimeError,
    TypeError,
    AttributeError,
    EOFError,
)
# In the names of a tokenizer's files, whichever it is.
OF_TOKENIZERS = re.compile(r"tok|tekken|vocab|merges|spiece|sentencepiece|\.(spm|model|codes)$")
FROM_HUB = " from the hub (there is no such folder)"


def load_tokenizer(options: FinetuneOptions, config: SFTConfig) -> Any:
    """The tokenizer of a local folder or a hub name, with the end and the chat template that
    ``config`` names. Raises InputError with the loader's first line."""
    name, local = _find_model(options.model)
    with _as_input_error(f"cannot load the model {name}{'' if local else FROM_HUB}"):
        if local:
            _check_model_folder(name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **_trust(config))
        except LOAD_ERRORS:
            if local and not any(OF_TOKENIZERS.search(path.name) for path in Path(name).iterdir()):
                raise InputError(
                    f"{name} has no tokenizer: save it there too (tokenizer.save_pretrained)"
                ) from None
            raise
    path = config.chat_template_path and os.path.expanduser(config.chat_template_path)
    if path is not None and os.path.isfile(path):
        with _as_input_error(f"chat_template_path: cannot read {path}"):
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    elif path is not None:
        with _as_input_error(f"chat_template_path: cannot load {path}"):
            source = AutoTokenizer.from_pretrained(path)
        template = source.get_chat_template()
        needed = (token.content for token in source.added_tokens_decoder.values())
        unknown = [
            token for token in needed if token in template and token not in tokenizer.get_vocab()
        ]
        if unknown:
            raise InputError(
                f"chat_template_path: the template of {path} has {', '.join(unknown)}, which the model does not know; "
                f"embeddings are not trained"
            )
        tokenizer.chat_template = template
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            raise InputError(f"eos_token {config.eos_token!r} is no token of the model's tokenizer")
        tokenizer.eos_token = config.eos_token
    return tokenizer


def load_model(options: FinetuneOptions, config: SFTConfig) -> Any:
    """The model of a local folder or a hub name. Raises InputError with the loader's first line, or
    naming a weight that is not there."""
    name, local = _find_model(options.model)
    with _as_input_error(f"cannot load the model {name}{'' if local else FROM_HUB}"):
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=resolve_dtype(options.dtype),
            **_trust(config),
            output_loading_info=True,
        )
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise InputError(
            f"the model {name} lacks {len(missing)} of its weights, first {missing[0]}: they would begin at random"
        )
    return model


def _trust(config: SFTConfig) -> dict[str, bool]:
    return {"trust_remote_code": True} if config.trust_remote_code else {}


def names_on_hub(options: FinetuneOptions) -> list[str]:
    """What of a run is not on this machine by its name."""
    data = [each for each in (options.data, options.eval_data) if each and not is_local(each)]
    return ([] if _find_model(options.model)[1] else [options.model]) + list(dict.fromkeys(data))


def _find_model(name: str) -> tuple[str, bool]:
    """The name without ``~``, and whether it is a folder's."""
    name = os.path.expanduser(name)
    return name, os.path.exists(name) or name[:1] in ("", ".", "/") or name.count("/") > 1


@contextmanager
def _as_input_error(doing: str) -> Iterator[None]:
    """Whatever a loader raises of a file that is damaged or not what it should be, in one line."""
    try:
        yield
        return
    except InputError:
        raise
    except LOAD_ERRORS as error:
        problem = str(error).strip().partition("\n")[0]
    except pickle.UnpicklingError:
        problem = "its weights are damaged, or no file of torch.save"
    raise InputError(f"{doing}: {problem}")


def has_embedding(model, token: int) -> bool:
    """Whether the model has learned anything of this token."""
    return token < model.get_input_embeddings().weight.shape[0]


def end_where_samples_end(model, ends: set[int]) -> None:
    """Let the model's saved ``generation_config`` stop at every token that samples end with, and at
    those it has."""
    known = model.generation_config.eos_token_id
    known = [] if known is None else known if isinstance(known, list) else [known]
    every = [*sorted(ends - set(known)), *known]
    if every:
        model.generation_config._from_model_config = False  # which does not know the new ones
        model.generation_config.eos_token_id = every if len(every) > 1 else every[0]


def _check_model_folder(name: str) -> None:
    """Raises InputError for what would be mistaken for a model folder, ValueError for weights that
    cannot be read."""
    folder = Path(name)
    if not folder.is_dir():
        raise InputError(f"no model folder {name}")
    if (folder / MARKER).exists():
        raise InputError(
            f"{folder} is a checkpoint of a LoSiA run: --resume goes on with the run, "
            f"losia-kernels export makes a plain model of it"
        )
    if not (folder / "config.json").exists():
        inside = folder / "model"
        hint = f"; there is one in {inside}" if (inside / "config.json").exists() else ""
        raise InputError(f"{folder} is no model folder: it has no config.json{hint}")
    if any((folder / name).exists() for name in (WEIGHTS, INDEX)):
        ModelFolder(folder)  # reads the headers alone


def resolve_dtype(name: str) -> torch.dtype:
    """The weights' dtype; "auto" is bfloat16 on a GPU that has it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    device = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if device is None else device.type
    good = {
        "cuda": lambda: torch.cuda.is_bf16_supported(),
        "xpu": lambda: torch.xpu.is_bf16_supported(),
        "mps": lambda: torch.backends.mps.is_macos_or_newer(14, 0),
    }.get(kind, lambda: False)
    return torch.bfloat16 if good() else torch.float32


def check_data(model, data: Data, tokenizer) -> None:
    """Raises InputError for samples that the model cannot take: tokens that it has no embedding of,
    more of them than the positions it has learned."""
    for dataset in filter(None, (data.train, data.eval)):
        largest = int(flat(dataset, "input_ids").max())
        if not has_embedding(model, largest):
            rows = model.get_input_embeddings().weight.shape[0]
            raise InputError(
                f"the data has the token {largest} ({tokenizer.decode([largest])!r}), but the model has embeddings of "
                f"{rows} tokens: its tokenizer is of another model"
            )
        check_lengths(model, dataset)


def check_lengths(model, dataset) -> None:
    """Raises InputError for a sample longer than the positions that the model has learned, if it
    has learned any."""
    learned = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
        and re.search(r"(^|\.)(wpe|\w*position\w*)$", name)
    ]
    positions = getattr(model.config, "max_position_embeddings", None)
    if not learned or positions is None:
        return
    packed = "seq_lengths" in dataset.column_names
    longest = int(flat(dataset, "seq_lengths").max() if packed else lengths(dataset).max())
    if longest > positions:
        raise InputError(
            f"a sample has {longest} tokens, but {type(model).__name__} has learned {positions} "
            f"positions: set max_length to {positions} or less"
        )


@torch.no_grad()
def check_causal(model) -> None:
    """Raises InputError for an encoder that was loaded as if it were a decoder."""
    if getattr(model.config, "is_decoder", True):  # of others the config has no such word
        return
    model.eval()
    pair = torch.tensor([[1, 2, 3], [1, 2, 4]], device=model.device)
    first, second = model(input_ids=pair).logits[:, :2].float()
    if (first - second).abs().max() > 1e-4 * first.abs().max():
        raise InputError(
            f"{type(model).__name__} of {model.config.model_type} is no causal language model: each token sees those "
            f"after it, so it would learn to copy them (is_decoder true in its config.json makes it causal)"
        )


@torch.no_grad()
def check_packing(model) -> None:
    """Raises InputError unless the model keeps the samples of a packed row apart."""
    collate = DataCollatorForLanguageModeling(0, padding_free=True)
    second = {"input_ids": [4, 5, 6]}
    model.eval()
    outputs = []
    for first in ([1, 2, 3], [3, 1, 2]):
        batch = collate([{"input_ids": first}, second])
        batch = {
            key: value.to(model.device) if torch.is_tensor(value) else value
            for key, value in batch.items()
            if key != "labels"
        }
        try:
            outputs.append(model(**batch, use_cache=False).logits[0, 3:].float())
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{type(model).__name__} does not take packed rows ({str(error).splitlines()[0]}): use group_by_length "
                f"instead of packing"
            ) from None
    if (outputs[0] - outputs[1]).abs().max() > 1e-3 * outputs[0].abs().max():
        raise InputError(
            f"{type(model).__name__} with {model.config._attn_implementation} attention lets the samples of a packed "
            f"row see each other: use group_by_length instead of packing"
        )


def convert_model(model, options: FinetuneOptions, total_steps: int) -> None:
    """Convert ``model`` for a run of ``total_steps``. Raises InputError for options that do not fit
    it."""
    if options.master == "split" and model.dtype != torch.bfloat16:
        raise InputError(
            f"master split completes bfloat16 weights, the model is {model.dtype}: set dtype bfloat16"
        )
    config = options.losia_config(total_steps)
    try:
        apply_losia(model, config)
    except ValueError as error:
        raise InputError(str(error)) from None
