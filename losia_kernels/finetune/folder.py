"""The folder of a run: what it may hold at the start, checkpoints that are whole or do not count,
the model.

    model/         the result: an ordinary transformers folder, there only when the run is done
    model.json     the checksums of its files
    checkpoints/   what ``resume`` goes on from
    log.jsonl      one line a step
    subnets.jsonl  where each layer's subnet has been
    loss_curve.png
    run.json       every option and what the data became, which ``resume`` goes on with
"""

import errno
import os
import platform
import re
import warnings
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..checkpoint.checksums import (
    FILES,
    all_files,
    checksum,
    checksums,
    find_damage,
    read_sealed,
    write_sealed,
)
from ..checkpoint.writing import PlaceError, new_folder
from ..integrations.history import read_log
from .checkpoints import Checkpoints, find_checkpoints
from .options import FinetuneOptions, InputError

# Options that do not change the result; data is known by its checksum, what it became by another.
FREE_ON_RESUME = ("data", "eval_data", "save_steps", "print_every", "report_to", "samples", "env")
# What is for no file of the run: a field of SFTConfig, variables of the environment. What names a file.
SECRET_FIELDS = ("hub_token",)
SECRET = re.compile(r"TOKEN$|KEY$|SECRET|PASSWORD|CREDENTIALS", re.IGNORECASE)
PATHS = ("chat_template_path", "fsdp_config", "deepspeed", "accelerator_config")
# What a write fails with that the user can do something about.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


def open_run(options: FinetuneOptions, processes: int = 1) -> tuple[dict, Checkpoints]:
    """Look at the output folder; nothing is changed.

    A resumed run must have the options and the data of the first; on another number of processes,
    batches such that all of them together are as large.

    Returns:
        What ``run.json`` is to hold, but for what the data becomes, and the checkpoints.

    Raises:
        InputError: if the folder is not empty, has nothing to resume, is of other options, or holds
            damaged checkpoints only.
    """
    folder = Path(options.output)
    record = asdict(options)
    del record["output"], record["resume"]
    config = {k: v for k, v in (record["config"] or {}).items() if k not in SECRET_FIELDS}
    env = config.pop("env", None) or {}
    record["env"] = {name: value for name, value in env.items() if not SECRET.search(name)}
    for name in PATHS:
        if isinstance(config.get(name), str):
            config[name] = _whole_path(config[name])
    record["config"] = config or None
    record["batch_size"] *= processes
    record["model"] = _whole_path(record["model"])
    for name in ("data", "eval_data"):
        if record[name] is not None:
            record[name] = _whole_path(record[name])
            record[f"{name}_sha256"] = _sha256(Path(record[name]))
    if not options.resume:
        # a kill may have left no more than the first attempt at run.json
        new = not folder.exists() or (
            folder.is_dir() and not set(os.listdir(folder)) - {"run.json.tmp"}
        )
        if not new:
            raise InputError(
                f"{folder} exists and is not empty: name another output, or go on with --resume"
            )
        return record, Checkpoints()
    _check_holds_run(folder)
    check_no_links(folder)
    check_resumes(folder, record)
    if (folder / "model").exists():
        check_model(folder)
        return record, Checkpoints()
    log = [entry["step"] for entry in read_log(folder / "log.jsonl")]
    found = find_checkpoints(folder / "checkpoints", max(log, default=0))
    if found.damaged and found.last is None:
        said = "; ".join(f"{path.name}: {why}" for path, why in found.damaged.items())
        raise InputError(
            f"cannot resume {folder}, no checkpoint is whole: {said}; nothing was changed, begin anew in another output"
        )
    return record, found


def read_record(folder: Path) -> dict:
    """What is in ``run.json``. Raises InputError if it is damaged or no run's."""
    shape = {"model": str, "data": str, "batch_size": int, "seed": int}
    try:
        return read_sealed(folder / "run.json", shape)
    except ValueError as error:
        raise InputError(str(error)) from None


def check_resumes(folder: Path, record: dict) -> None:
    """Raises InputError if the run in ``folder`` was begun with other values of what is in
    ``record``. The same file under another name is the same."""
    first = read_record(folder)
    # what the data becomes is not known before the model is loaded
    known = {name for name in first if name in record or not name.endswith("tokens_sha256")}
    held = (record.keys() | known) - {*FREE_ON_RESUME, "versions"}
    if (first.get("config") or {}).get("load_best_model_at_end"):
        held.add("save_steps")  # the best is one of those that were saved
    changed = sorted(name for name in held if record.get(name) != first.get(name))
    tokens = [name for name in changed if name.endswith("tokens_sha256")]
    if tokens:
        raise InputError(
            f"cannot resume {folder}: the data no longer becomes the tokens that it was begun with ({tokens[0]}): "
            f"what stands in it (of a folder or a name on the hub), the tokenizer, its chat template, a date in that, "
            f"or a library is another"
        )
    for name in changed:
        data = name.removesuffix("_sha256")
        if data != name and first.get(name) and not os.path.exists(record.get(data) or folder):
            raise InputError(
                f"cannot resume {folder}: there is no {record[data]}, the {data} that it was begun with; "
                f"--{data.replace('_', '-')} FILE says where it is now"
            )
        if data != name and None not in (first.get(data), record.get(data)):
            raise InputError(
                f"cannot resume {folder}: {record[data]} is not the {data} that it was begun with, {first[data]} as "
                f"it was then"
            )
    changed = [name.removesuffix("_sha256") for name in changed]
    if changed:
        was = ", ".join(
            f"{name} was {first.get(name)!r}, now {record.get(name)!r}" for name in changed
        )
        raise InputError(f"cannot resume {folder} with other options: {was}")
    other = [
        f"{name} {first.get('versions', {}).get(name)}, now {version}"
        for name, version in record.get("versions", {}).items()
        if first.get("versions", {}).get(name) != version
    ]
    if other:
        warnings.warn(
            f"{folder} was begun with {'; '.join(other)}: what follows may differ in its last bits",
            stacklevel=2,
        )


def read_options(folder: Path, **instead: Any) -> FinetuneOptions:
    """The options that the run in ``folder`` was begun with, but for those given ``instead``.

    ``batch_size`` is that of all its processes together.
    """
    if not (folder / "run.json").exists():
        raise InputError(f"{folder} has no run.json, so its base model and its data are not known")
    record = read_record(folder)
    known = {field.name for field in fields(FinetuneOptions)}
    values = {name: value for name, value in record.items() if name in known}
    if record.get("env"):
        values["config"] = {**(values["config"] or {}), "env": record["env"]}
    return FinetuneOptions(**{**values, "output": str(folder), **instead})


def resumed_options(given: dict[str, Any]) -> FinetuneOptions:
    """What ``--resume --output FOLDER`` goes on with: the options of the run there, but for those
    ``given``."""
    folder = Path(given["output"])
    _check_holds_run(folder)
    if given.get("config") is None:  # a file of options alone
        given = {name: value for name, value in given.items() if name != "config"}
    options, processes = read_options(folder, **given), int(os.environ.get("WORLD_SIZE", "1"))
    os.environ.update((options.config or {}).get("env", {}))
    if "batch_size" in given:
        return options
    if options.batch_size % processes:
        raise InputError(
            f"cannot resume {folder} with {processes} processes: its batches of {options.batch_size} "
            f"samples cannot be shared out evenly"
        )
    return replace(options, batch_size=options.batch_size // processes)


def _check_holds_run(folder: Path) -> None:
    if not os.path.exists(folder / "run.json"):  # which may not be looked for either
        raise InputError(f"nothing to resume: {folder} holds no run (no run.json)")


def versions() -> dict[str, str]:
    """Of what takes part in every bit."""
    return {
        "losia_kernels": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": version("trl"),
        "python": platform.python_version(),
    }


def _whole_path(name: str) -> str:
    """One spelling of what is on this machine, right from everywhere; a name on the hub as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _sha256(path: Path) -> str | None:
    """Of a file; of a folder or a name on the hub None."""
    if not path.is_file():
        return None
    try:
        return checksum(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def check_no_links(folder: Path) -> None:
    """Raises InputError if something in the run's folder is a link: it would be written through."""
    for path in (*folder.iterdir(), *(folder / "checkpoints").glob("*")):
        if path.is_symlink():
            raise InputError(f"{path} is a link: put the file or folder itself there")


def damage_of_model(folder: Path) -> str | None:
    """Which file of a run's finished model is not as it was written, and how; None if all are, or
    nothing says how they were. Raises InputError if what says it is damaged."""
    record = folder / "model.json"
    if not record.exists():
        return None
    try:
        return find_damage(folder / "model", read_sealed(record, {"files": FILES})["files"], record)
    except ValueError as error:
        raise InputError(str(error)) from None


def check_model(folder: Path) -> None:
    """Raises InputError if the finished model of a run is not as it was written."""
    damage = damage_of_model(folder)
    if damage:
        raise InputError(
            f"{folder / 'model'}: {damage}; move model away, and --resume writes it again from the last checkpoint"
        )


def write_failure(error: BaseException) -> str | None:
    """What kept a file from being written, if that is what ``error`` says; None of another error."""
    if isinstance(error, PlaceError):
        return error.reason
    if isinstance(error, OSError):
        return error.strerror if error.errno in WRITE_ERRORS else None
    text = str(error)
    if "PytorchStreamWriter" in text or "inline_container" in text:  # of torch.save
        return "no space left, or the disk failed"
    failed = re.search(r"\(os error (\d+)\)", text)  # of safetensors and tokenizers
    return os.strerror(int(failed[1])) if failed and int(failed[1]) in WRITE_ERRORS else None


def save_model(
    model,
    tokenizer,
    folder: Path,
    weights: dict | None = None,
    card: str | None = None,
    record: Path | None = None,
) -> None:
    """An ordinary ``save_pretrained`` folder, written beside and renamed. ``folder`` must not
    exist.

    ``weights`` instead of the model's own: those of a model of which this process holds a part.
    ``card``: what its README.md says. ``record``: where the checksums of its files go.
    """
    with new_folder(folder) as beside:
        model.save_pretrained(beside, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        if card is not None:
            (beside / "README.md").write_text(card, encoding="utf-8")
        if record is not None:
            write_sealed(record, {"files": checksums(beside, all_files(beside))})
