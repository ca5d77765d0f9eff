"""The checkpoints of a run: which are whole and which do not count, and what becomes of these."""

import os
import re
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback

from ..checkpoint.checksums import (
    FILES,
    all_files,
    checksums,
    find_damage,
    read_sealed,
    write_sealed,
)
from ..checkpoint.folder import MARKER
from ..checkpoint.reading import check_archive, read_json
from ..checkpoint.shards import METADATA, check_shards
from ..checkpoint.writing import sync_all, write_json
from ..integrations.transformers import losia_timeline


@dataclass
class Checkpoints:
    """Of a run, as they were found.

    ``last``: the newest whole one, to go on from; None to begin. ``damaged``: those that were whole
    once, each with what is wrong. ``unfinished``: whose saving or removal was interrupted.
    ``reached``: the last step that the run took, by its log.
    """

    last: Path | None = None
    damaged: dict[Path, str] = field(default_factory=dict)
    unfinished: list[Path] = field(default_factory=list)
    reached: int = 0

    def settle(self) -> None:
        """Set aside the damaged, remove the unfinished. Only after ``last`` has been loaded: until
        then nothing is known to be good."""
        for path in self.damaged:
            free = (path.with_name(f"damaged-{path.name}{f'-{n}' if n else ''}") for n in range(99))
            os.rename(path, next(each for each in free if not os.path.lexists(each)))
        for path in self.unfinished:
            remove_checkpoint(path)
        self.damaged, self.unfinished = {}, []


class CheckpointCallback(TrainerCallback):
    """Completes each of the Trainer's checkpoints with the tokenizer and, last, the marker that it
    is whole; removes those beyond the Trainer's ``save_total_limit`` after that.

    ``found``: the run's earlier checkpoints, which are settled once the last has been loaded.
    """

    def __init__(self, tokenizer, use_cache: bool, found: Checkpoints | None = None):
        self.tokenizer, self.use_cache = tokenizer, use_cache
        self.found, self.loaded = found or Checkpoints(), False
        self.limit: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        # the Trainer would remove an old checkpoint before the new one is whole, in any order
        self.limit, args.save_total_limit = args.save_total_limit or self.limit, None
        self.folder = Path(args.output_dir)
        if args.load_best_model_at_end and state.best_global_step:
            self._find_best(state)
        self.best = state.best_model_checkpoint

    def _find_best(self, state) -> None:
        """The best checkpoint of a resumed run, wherever the run's folder is now; if it is damaged,
        the best is among those to come."""
        best = self.folder / f"checkpoint-{state.best_global_step}"
        problem = damage_of(best) if best.exists() else "it is missing"
        state.best_model_checkpoint = str(best)
        if problem:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            warnings.warn(
                f"{best.name} was the best so far and cannot be the result: {problem}", stacklevel=2
            )

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.loaded:
            self.settle(state.is_world_process_zero)

    def settle(self, first: bool) -> None:
        """All has been loaded."""
        self.loaded = True
        if first:
            self.found.settle()
            self._remove_old()  # a kill may have come before the last removal

    def on_save(self, args, state, control, model=None, optimizer=None, **kwargs):
        PartialState().wait_for_everyone()  # every process has written its part
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.tokenizer.save_pretrained(folder)
        if not (folder / "config.json").exists():  # of shards the Trainer saves the tensors alone
            model.config.save_pretrained(folder)
        config = read_json(folder / "config.json", {})
        config["use_cache"] = self.use_cache  # the Trainer turns it off
        write_json(folder / "config.json", config)
        timeline = losia_timeline(optimizer)
        sync_all(folder)
        values = {
            "step": state.global_step,
            "observing": [timeline.group_names[group] for group in timeline.observing],
            "groups": list(timeline.group_names),
            "config": timeline.config.to_dict(),
            "files": checksums(folder, all_files(folder)),
        }
        write_sealed(folder / MARKER, values)
        self.best = state.best_model_checkpoint
        self._remove_old()

    def _remove_old(self) -> None:
        by_age = sorted(list_checkpoints(self.folder), key=_step)
        for path in by_age[: -self.limit] if self.limit else []:
            if self.best is None or path != Path(self.best):
                remove_checkpoint(path)


def find_checkpoints(folder: Path, reached: int = 0) -> Checkpoints:
    """The checkpoints in ``folder``, of those that ``CheckpointCallback`` completed; changes nothing.

    ``reached``: the last step that the run took, by its log. The next step is taken when a
    checkpoint is whole, so that one of an earlier step without its marker has lost it.
    """
    found = Checkpoints(reached=reached)
    for path in sorted(list_checkpoints(folder), key=_step, reverse=True):
        if (path / MARKER).exists() and found.last is None:
            problem = damage_of(path)
            if problem is None:
                found.last = path
            else:
                found.damaged[path] = problem
        elif not (path / MARKER).exists():
            if found.last is None and _step(path) < reached:
                found.damaged[path] = f"{MARKER} is missing"
            else:
                found.unfinished.append(path)
    return found


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``, of those that ``CheckpointCallback`` completed;
    None without one.

    Warns of newer ones, which were interrupted, damaged, or saved without it. Changes nothing.
    """
    found = find_checkpoints(folder)
    newer = [
        path
        for path in (*found.damaged, *found.unfinished)
        if found.last is None or _step(path) > _step(found.last)
    ]
    if newer:
        said = ", ".join(
            path.name + (f" ({found.damaged[path]})" if path in found.damaged else "")
            for path in sorted(newer, key=_step, reverse=True)
        )
        counts = f"the last that counts is {found.last.name}" if found.last else "none counts"
        warnings.warn(
            f"{said} in {folder}: not whole, or saved without a CheckpointCallback; {counts}",
            stacklevel=2,
        )
    return found.last


def list_checkpoints(folder: Path) -> list[Path]:
    """The Trainer's, by their names; a copy under a name of the user's is none."""
    return [
        path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)
    ]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def damage_of(checkpoint: Path) -> str | None:
    """The first file of a completed checkpoint that is not as it was saved, or that nothing may be
    loaded from, and why; None if it is whole."""
    try:
        files = read_sealed(checkpoint / MARKER, {"files": FILES})["files"]
        damage = find_damage(checkpoint, files, checkpoint / MARKER)
        if damage:
            return damage
        for path in checkpoint.iterdir():
            if path.suffix in (".pt", ".pth", ".bin"):
                check_archive(path, path.stat().st_size, path)
            elif (path / METADATA).exists():
                check_shards(path)
    except ValueError as error:
        return str(error)
    return None


def remove_checkpoint(checkpoint: Path) -> None:
    """Its marker goes first: what is left of an interrupted removal is no damaged checkpoint."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)
