"""What a command says where it does not end as was hoped: the way on from an interrupted run, what is
missing for an import, a place that is taken.

Free of heavy imports, so that Ctrl-C is answered at once.
"""

import os
import shlex
import traceback
from pathlib import Path
from typing import Any

from .declare import InputError
from .options import with_config


def how_to_go_on(command: str, arguments: dict[str, Any]) -> str:
    """What an interrupted ``finetune`` has left, and the command that goes on from there."""
    output = with_config(arguments).get("output") if command == "finetune" else None
    if output is None:
        return ""
    folder = Path(output)
    if (folder / "model").exists():
        return f": the run is finished, the model is in {folder / 'model'}"
    if not (folder / "run.json").exists():
        return ": nothing was written yet"
    from ..checkpoint.folder import MARKER

    whole = (folder / "checkpoints").glob(f"checkpoint-*/{MARKER}")
    names = [path.parent.name.removeprefix("checkpoint-") for path in whole]
    steps = [int(name) for name in names if name.isdecimal()]  # a copy has another name
    start = f"step {max(steps)}" if steps else "the beginning, for there is no checkpoint yet"
    return f": losia-kernels finetune --resume --output {shlex.quote(output)} goes on from {start}"


def check_output(output: str) -> None:
    """Raises InputError for the place of a run's own model: with something else there the run would
    count as finished."""
    folder = Path(os.path.abspath(output))
    if folder.name == "model" and (folder.parent / "run.json").exists():
        raise InputError(f"{output} is where the run puts its model: name another folder")


def first_cause(error: BaseException) -> BaseException:
    """Of an import that failed: libraries that import late hide it behind errors of their own."""
    while reason := error.__cause__ or (not error.__suppress_context__ and error.__context__):
        error = reason
    return error


def what_is_missing(error: BaseException) -> str:
    """What to tell of the first cause of an import that failed."""
    modules = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    foreign = [name for name in modules if not name.startswith(("importlib.", "losia_kernels"))]
    module = getattr(error, "name", None) or next(reversed(foreign), "a library")
    library, install = (
        module.partition(".")[0],
        "in a checkout of losia_kernels: pip install -e '.[finetune]'",
    )
    if isinstance(error, ModuleNotFoundError):
        return f"needs {library}, which is not installed; {install}"
    problem = str(error).strip().partition("\n")[0]
    return f"cannot import {library}, broken or of another version ({problem}); {install}"
