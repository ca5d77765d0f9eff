"""The model of a run: loaded, held to what the run asks of it, converted."""

import os
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import apply_losia
from ..checkpoint.folder import MARKER
from .options import FinetuneOptions, InputError


def load_model(options: FinetuneOptions):
    """Model and tokenizer of a local folder or a hub name. Raises InputError with the loader's
    first line."""
    name = os.path.expanduser(options.model)
    local = os.path.exists(name) or name[:1] in ("", ".", "/") or name.count("/") > 1
    if local:
        _check_model_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=resolve_dtype(options.dtype))
    except (OSError, ValueError, KeyError, ImportError) as error:
        origin = "" if local else " from the hub (there is no such folder)"
        raise InputError(
            f"cannot load the model {name}{origin}: {str(error).strip().splitlines()[0]}"
        ) from None
    return model, tokenizer


def _check_model_folder(name: str) -> None:
    """Raises InputError for what would be mistaken for a model folder."""
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


def resolve_dtype(name: str) -> torch.dtype:
    """The weights' dtype; "auto" is bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        good = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if good else torch.float32
    return getattr(torch, name)


def check_lengths(model, samples: list[dict]) -> None:
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
    longest = max(
        int(sample["position_ids"].max()) + 1
        if "position_ids" in sample
        else len(sample["input_ids"])
        for sample in samples
    )
    if longest > positions:
        raise InputError(
            f"a sample has {longest} tokens, but {type(model).__name__} has learned {positions} "
            f"positions: set max_length to {positions} or less"
        )


@torch.no_grad()
def check_packing(model) -> None:
    """Raises InputError unless the model keeps the samples of a packed row apart."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 1, 2, 4, 5, 6]], device=model.device)
    positions = torch.arange(3, device=model.device).repeat(2, 2)
    model.eval()
    first, other = (
        model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 3:].float()
    )
    if (first - other).abs().max() > 1e-3 * first.abs().max():
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
