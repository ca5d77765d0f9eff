"""What a command leaves behind: the way on from an interrupted run, the place of a run's model.

Free of heavy imports, so that Ctrl-C is answered at once.
"""

import os
import shlex
from pathlib import Path
from typing import Any

from ..checkpoint.folder import MARKER
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
