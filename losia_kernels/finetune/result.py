"""What a run has come to, for the commands that take its folder in the place of a checkpoint's."""

import shutil
from pathlib import Path

from ..checkpoint.export import describe_checkpoint, export_checkpoint
from ..checkpoint.folder import Track, untracked
from ..checkpoint.writing import new_folder
from ..integrations.history import read_log
from .checkpoints import last_checkpoint
from .folder import check_model, damage_of_model, read_options
from .options import InputError


def newest_result(run: Path) -> Path:
    """The finished model of a run, else its newest whole checkpoint. Raises InputError if it has
    neither."""
    if (run / "model").exists():
        return run / "model"
    newest = last_checkpoint(run / "checkpoints")
    if newest is None:
        raise InputError(f"{run} is a run that has neither a model/ nor a whole checkpoint yet")
    return newest


def export_run(run: Path, output: Path, track: Track = untracked) -> Path:
    """Write the plain model of a run as far as it is into the new folder ``output``, and return
    where it comes from."""
    source = newest_result(run)
    if source.name == "model":
        check_model(run)
        with new_folder(output) as beside:
            shutil.copytree(source, beside, dirs_exist_ok=True)
    else:
        export_checkpoint(source, output, track)
    return source


def describe_run(run: Path) -> str:
    """Of what a run is and how far it is, then what its newest result holds, as text."""
    options, entries = read_options(run), read_log(run / "log.jsonl")
    finished = (run / "model").exists()
    step = max((entry["step"] for entry in entries), default=0)
    losses = [
        f"{name} {found[-1]:.4f}"
        for name, key in (("loss", "loss"), ("evaluation loss", "eval_loss"))
        if (found := [entry[key] for entry in entries if key in entry])
    ]
    lines = [
        f"run             {'finished' if finished else 'not finished'}: {', '.join([f'step {step}', *losses])}",
        f"model           {options.model}",
        f"data            {options.data}",
        f"LoSiA           rank factor {options.rank_factor:g}, period {options.period}, lr {options.lr:g}",
    ]
    try:
        newest = newest_result(run)
    except InputError:
        return "\n".join([*lines, "newest result   none yet"])
    lines += [f"newest result   {newest}", ""]
    return "\n".join([*lines, describe_model(newest) if finished else describe_checkpoint(newest)])


def describe_model(model: Path) -> str:
    """What ``model/`` of a finished run holds, and whether its files are as they were written, as
    text. Raises ValueError for a file that cannot be read at all."""
    damage = damage_of_model(model.parent)
    try:
        text = describe_checkpoint(model)
    except ValueError as error:
        raise InputError(f"{model}: {damage}" if damage else str(error)) from None
    if damage:
        return f"damaged         {damage}\n{text}"
    sums = "all have the checksums that they were written with"
    return f"{text}\nfiles           {sums}" if model.with_name("model.json").exists() else text
