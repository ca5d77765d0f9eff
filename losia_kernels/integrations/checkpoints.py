"""Folders of a fine-tuning run: checkpoints that are whole or not there, their export, and what is in them."""

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

from accelerate import PartialState
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging

from .options import InputError
from .transformers import losia_timeline

MARKER = "losia.json"  # written last: a checkpoint without it was interrupted


def write_json(path: Path, values: dict) -> None:
    """``values`` as JSON at ``path``: the old file or the new one, never a part."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(beside, path)


def save_model(model, tokenizer, folder: Path, weights: dict | None = None) -> None:
    """An ordinary ``save_pretrained`` folder, written beside and renamed. ``folder`` must not exist.

    ``weights`` instead of the model's own: those of a model of which this process holds a part.
    """
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside, state_dict=weights)
    if tokenizer is not None:
        tokenizer.save_pretrained(beside)
    os.replace(beside, folder)


class CheckpointCallback(TrainerCallback):
    """Completes each of the Trainer's checkpoints with the tokenizer and, last, the marker that it is whole."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def on_save(self, args, state, control, optimizer=None, **kwargs):
        PartialState().wait_for_everyone()  # every process has written its part
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.tokenizer.save_pretrained(folder)
        timeline = losia_timeline(optimizer)
        values = {
            "step": state.global_step,
            "observing": [timeline.group_names[group] for group in timeline.observing],
            "groups": list(timeline.group_names),
            "config": timeline.config.to_dict(),
        }
        write_json(folder / MARKER, values)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``; those that were interrupted are removed."""
    whole = {}
    for path in folder.glob("checkpoint-*"):
        if (path / MARKER).exists():
            whole[int(path.name.removeprefix("checkpoint-"))] = path
        else:
            shutil.rmtree(path)
    return whole[max(whole)] if whole else None


def export_checkpoint(checkpoint: Path, output: Path) -> None:
    """Write the plain model of a LoSiA checkpoint to the new folder ``output``; the checkpoint stays as it is.

    Raises InputError if ``checkpoint`` holds no subnets or ``output`` exists.
    """
    _subnet_shapes(checkpoint)
    if output.exists():
        raise InputError(f"{output} exists: name a new folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the subnets are keys that the plain model does not know
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    finally:
        logging.set_verbosity(verbosity)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint) if (checkpoint / "tokenizer_config.json").exists() else None
    save_model(model, tokenizer, output)


def describe_checkpoint(checkpoint: Path) -> str:
    """What a LoSiA checkpoint holds, as text: its step, who observes, and every kind of layer with its subnet.

    Raises InputError if it holds no subnets.
    """
    shapes = _subnet_shapes(checkpoint)
    lines = []
    if (checkpoint / MARKER).exists():
        run = json.loads((checkpoint / MARKER).read_text())
        config = run["config"]
        lines += [
            f"step            {run['step']}",
            f"observing       {', '.join(run['observing']) or 'none'}",
            f"groups          {len(run['groups'])}, period {config['period']}, update {config['update_type']}",
            f"importance      {config['importance']}",
        ]
    trained = sum(out * in_ for _, (out, in_) in shapes.values())
    total = sum(out * in_ for (out, in_), _ in shapes.values())
    lines += [f"layers          {len(shapes)}", f"trained values  {trained:,} of {total:,} in these layers", ""]
    kinds = Counter((re.sub(r"\.\d+\.", ".*.", name), *sizes) for name, sizes in shapes.items())
    for (name, weight, subnet), count in kinds.items():
        lines.append(f"{count:4} x {name}  weight {weight[0]} x {weight[1]}  subnet {subnet[0]} x {subnet[1]}")
    return "\n".join(lines)


def _subnet_shapes(checkpoint: Path) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Layer name -> shapes of its weight and its subnet, (out, in), from the files' headers alone."""
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise InputError(f"{checkpoint} is no checkpoint: it has no .safetensors file")
    shapes = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    layers = [key.removesuffix(".subnet") for key in shapes if key.endswith(".subnet")]
    if not layers:
        raise InputError(f"{checkpoint} holds no LoSiA subnets: it is a plain model")
    sizes = {name: (shapes.get(f"{name}.weight"), shapes[f"{name}.subnet"]) for name in layers}
    for name, (weight, subnet) in sizes.items():
        if weight is None:  # tied to the embedding, under whose name it is saved; the subnet takes all inputs
            vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
            sizes[name] = (vocabulary, subnet[1]), subnet
    return sizes
