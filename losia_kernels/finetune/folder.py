"""Folders of a fine-tuning run: checkpoints that are whole or not there, their export, and what is
in them."""

import json
import os
import re
import shutil
import warnings
from collections import Counter
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback

from ..checkpoint.folder import ModelFolder, Spec, Track, new_folder, silent, size_of, write_model
from ..integrations.transformers import losia_timeline
from ..layers.convert import SUBNET_KEYS
from .options import InputError

MARKER = "losia.json"  # written last: a checkpoint without it was interrupted
OF_THE_RUN = (MARKER, "trainer_state.json")  # files of a checkpoint that its model has no use for


def write_json(path: Path, values: dict) -> None:
    """``values`` as JSON at ``path``: the old file or the new one, never a part."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(beside, path)


def save_model(model, tokenizer, folder: Path, weights: dict | None = None) -> None:
    """An ordinary ``save_pretrained`` folder, written beside and renamed. ``folder`` must not
    exist.

    ``weights`` instead of the model's own: those of a model of which this process holds a part.
    """
    with new_folder(folder) as beside:
        model.save_pretrained(beside, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)


class CheckpointCallback(TrainerCallback):
    """Completes each of the Trainer's checkpoints with the tokenizer and, last, the marker that it
    is whole."""

    def __init__(self, tokenizer, use_cache: bool):
        self.tokenizer, self.use_cache = tokenizer, use_cache

    def on_save(self, args, state, control, model=None, optimizer=None, **kwargs):
        PartialState().wait_for_everyone()  # every process has written its part
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.tokenizer.save_pretrained(folder)
        if not (folder / "config.json").exists():  # of shards the Trainer saves the tensors alone
            model.config.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        write_json(
            folder / "config.json", config | {"use_cache": self.use_cache}
        )  # the Trainer turns it off
        timeline = losia_timeline(optimizer)
        files = [path for path in folder.rglob("*") if path.is_file()]
        values = {
            "step": state.global_step,
            "observing": [timeline.group_names[group] for group in timeline.observing],
            "groups": list(timeline.group_names),
            "config": timeline.config.to_dict(),
            "files": {str(path.relative_to(folder)): path.stat().st_size for path in files},
        }
        write_json(folder / MARKER, values)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``, of those that ``CheckpointCallback`` completed;
    None without one.

    Warns of newer ones, which were interrupted or saved without it. Changes nothing.
    """
    torn: list[str] = []
    for path in sorted(_checkpoints(folder), key=_step, reverse=True):
        if is_whole(path):
            if torn:
                warnings.warn(
                    f"{', '.join(torn)} in {folder}: not whole, or saved without a CheckpointCallback; the "
                    f"last that counts is {path.name}",
                    stacklevel=2,
                )
            return path
        torn.append(path.name)
    if torn:
        warnings.warn(
            f"{', '.join(torn)} in {folder}: not whole, or saved without a CheckpointCallback; none counts",
            stacklevel=2,
        )
    return None


def remove_interrupted(folder: Path) -> None:
    """Remove the checkpoints of ``folder`` whose saving or removal was interrupted: all of them are
    of a run that completes its checkpoints."""
    for path in _checkpoints(folder):
        if not is_whole(path):
            shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    """The Trainer's, by their names; a copy under a name of the user's is none."""
    return [
        path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)
    ]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_whole(checkpoint: Path) -> bool:
    """Whether all is there that was when the marker was written, which is last."""
    try:
        sizes = json.loads((checkpoint / MARKER).read_text()).get("files", {})
    except (OSError, ValueError):
        return False
    files = {name: checkpoint / name for name in sizes}
    return all(file.exists() and file.stat().st_size == sizes[name] for name, file in files.items())


def export_checkpoint(checkpoint: Path, output: Path, track: Track = silent) -> None:
    """Write the plain model of a LoSiA checkpoint to the new folder ``output``; the checkpoint
    stays as it is.

    Tensors are copied one at a time, bit for bit, without what belongs to subnets; config,
    generation config and tokenizer are copied. Raises ValueError if ``checkpoint`` is no model
    folder or ``output`` exists, InputError if it holds no subnets.
    """
    folder = ModelFolder(checkpoint)
    layers = _subnet_layers(folder.specs)
    if not layers:
        raise InputError(f"{checkpoint} holds no LoSiA subnets: it is a plain model")
    extra = {f"{layer}.{key}" for layer in layers for key in SUBNET_KEYS}
    specs = {name: spec for name, spec in folder.specs.items() if name not in extra}
    with new_folder(output) as beside:
        write_model(beside, folder, specs, folder.get, track)
        for file in folder.side_files():
            if file not in OF_THE_RUN:
                shutil.copyfile(checkpoint / file, beside / file)


def describe_checkpoint(checkpoint: Path) -> str:
    """What a LoSiA checkpoint holds, as text: its step, who observes, and every kind of layer with
    its subnet.

    Of a plain model it says that, and its size. Raises ValueError if it is no model folder.
    """
    specs = ModelFolder(checkpoint).specs
    shapes = _subnet_shapes(checkpoint, specs)
    if not shapes:
        dtypes = ", ".join(
            sorted({str(dtype).removeprefix("torch.") for dtype, _ in specs.values()})
        )
        return f"plain model     no subnets; {len(specs)} tensors, {dtypes}, {size_of(specs.values()) / 1e6:,.2f} MB"
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
    elif (checkpoint / "trainer_state.json").exists():
        step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        lines.append(f"step            {step}; no {MARKER}: interrupted, or not of finetune")
    trained = sum(out * in_ for _, (out, in_) in shapes.values())
    total = sum(out * in_ for (out, in_), _ in shapes.values())
    lines += [
        f"layers          {len(shapes)}",
        f"trained values  {trained:,} of {total:,} in these layers",
        "",
    ]
    kinds = Counter((re.sub(r"\.\d+\.", ".*.", name), *sizes) for name, sizes in shapes.items())
    for (name, weight, subnet), count in kinds.items():
        lines.append(
            f"{count:4} x {name}  weight {weight[0]} x {weight[1]}  subnet {subnet[0]} x {subnet[1]}"
        )
    return "\n".join(lines)


def _subnet_layers(specs: dict[str, Spec]) -> list[str]:
    return [name.removesuffix(".subnet") for name in specs if name.endswith(".subnet")]


def _subnet_shapes(
    checkpoint: Path, specs: dict[str, Spec]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Layer name -> shapes of its weight and its subnet, (out, in)."""
    shapes = {}
    for layer in _subnet_layers(specs):
        _, subnet = specs[f"{layer}.subnet"]
        if f"{layer}.weight" in specs:
            shapes[layer] = specs[f"{layer}.weight"][1], subnet
        else:  # tied to the embedding, under whose name it is saved; the subnet takes all inputs
            vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
            shapes[layer] = (vocabulary, subnet[1]), subnet
    return shapes
