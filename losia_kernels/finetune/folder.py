"""The folder of a run: what it may hold at the start, checkpoints that are whole or do not count,
the model.

    model/         the result: an ordinary transformers folder, there only when the run is done
    checkpoints/   what ``resume`` goes on from
    log.jsonl      one line a step
    subnets.jsonl  where each layer's subnet has been
    loss_curve.png
    run.json       the options, which ``resume`` holds to
"""

import hashlib
import json
import re
import shutil
import warnings
from dataclasses import asdict, fields
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback

from ..checkpoint.folder import MARKER, new_folder, write_json
from ..integrations.transformers import losia_timeline
from .options import FinetuneOptions, InputError

# Options that do not change the result.
FREE_ON_RESUME = ("output", "resume", "save_steps", "print_every", "report_to", "samples")


def open_run(options: FinetuneOptions, processes: int = 1) -> tuple[dict, Path | None]:
    """Look at the output folder, and remove the checkpoints in it that were interrupted.

    A resumed run must have the options and the data of the first; on another number of processes,
    batches such that all of them together are as large.

    Returns:
        What ``run.json`` is to hold, and the checkpoint to go on from; None to begin.

    Raises:
        InputError: if the folder is not empty, has nothing to resume, or is of other options.
    """
    folder = Path(options.output)
    record = {name: value for name, value in asdict(options).items() if name not in FREE_ON_RESUME}
    record["batch_size"] *= processes
    for name in ("data", "eval_data"):
        if record[name] is not None and Path(record[name]).is_file():
            record[f"{name}_sha256"] = _sha256(record[name])
    if not options.resume:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(
                f"{folder} exists and is not empty: name another output, or go on with --resume"
            )
        return record, None
    if not (folder / "run.json").exists():
        raise InputError(f"nothing to resume: {folder} holds no run (no run.json)")
    first = json.loads((folder / "run.json").read_text())
    changed = sorted(name for name in record | first if record.get(name) != first.get(name))
    if changed:
        was = ", ".join(
            f"{name} was {first.get(name)!r}, now {record.get(name)!r}" for name in changed
        )
        raise InputError(f"cannot resume {folder} with other options: {was}")
    remove_interrupted(folder / "checkpoints")
    return record, last_checkpoint(folder / "checkpoints")


def read_options(folder: Path, model: str | None = None) -> FinetuneOptions:
    """The options that the run in ``folder`` was begun with; ``model`` instead of its own."""
    if not (folder / "run.json").exists():
        raise InputError(f"{folder} has no run.json, so its base model and its data are not known")
    record = json.loads((folder / "run.json").read_text())
    known = {field.name for field in fields(FinetuneOptions)}
    values = {name: value for name, value in record.items() if name in known}
    values["model"] = model or values["model"]
    return FinetuneOptions(**{**values, "output": str(folder)})


def _sha256(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


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
        config["use_cache"] = self.use_cache  # the Trainer turns it off
        write_json(folder / "config.json", config)
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


def save_model(
    model, tokenizer, folder: Path, weights: dict | None = None, card: str | None = None
) -> None:
    """An ordinary ``save_pretrained`` folder, written beside and renamed. ``folder`` must not
    exist.

    ``weights`` instead of the model's own: those of a model of which this process holds a part.
    ``card``: what its README.md says.
    """
    with new_folder(folder) as beside:
        model.save_pretrained(beside, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        if card is not None:
            (beside / "README.md").write_text(card, encoding="utf-8")
