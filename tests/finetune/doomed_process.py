"""One process a run, of which some kill themselves with SIGKILL in the middle of writing.

    python doomed_process.py    reads lines [argument of ``run``, ...] on stdin, answers each with its exit status

transformers is imported once; each run runs in a fork of this process, which itself never computes
anything.
"""

import errno
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from unittest import mock

import torch
import transformers.modeling_utils

from losia_kernels.finetune import checkpoints, progress
from losia_kernels.finetune.options import InputError
from losia_kernels.finetune.run import finetune
from losia_kernels.layers import module
from tests.finetune.tiny_run import options

SAVE_STEPS, STEPS = 2, 6  # checkpoints 2, 4, 6; 2 goes when 6 is written


def run(folder: str, model: str, moment: str = "", resume: bool = False) -> None:
    """A fine-tuning run in ``folder`` that dies at ``moment``, or never."""
    with (
        open(Path(folder) / "printed.txt", "a") as printed,
        mock.patch.object(sys, "stdout", printed),
    ):
        if moment.startswith(("count", "event", "second", "full")):
            at_random(moment, Path(folder))
        elif moment:
            DOOMS[moment]()
        # slow, and not what is looked at here
        mock.patch.object(progress, "draw_loss_curve").start()
        changes = dict(steps=STEPS, save_steps=SAVE_STEPS, period=2, eval_data=None, resume=resume)
        # a step too many would show
        changes |= dict(gradient_accumulation=1, lr_scheduler="constant")
        finetune(options(Path(folder), Path(model), **changes))


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def dies_writing(module, name: str, where: str) -> None:
    """A function whose second argument is the file to write: one in a path with ``where`` is left
    half written."""
    original = getattr(module, name)

    def half(content, path, *args, **kwargs):
        original(content, path, *args, **kwargs)
        if where in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    mock.patch.object(module, name, half).start()


def dies_before(module, name: str, where: str) -> None:
    """A function with a path among its arguments: for one with ``where`` in it it is never
    entered."""
    original = getattr(module, name)

    def doomed(*args, **kwargs):
        if any(where in str(each) for each in args):
            die()
        return original(*args, **kwargs)

    mock.patch.object(module, name, doomed).start()


def dies_removing(path, *args, **kwargs):
    next(Path(path).glob("*.safetensors")).unlink()
    die()


def at_random(moment: str, folder: Path) -> None:
    """Die at the "event N", a call that changes files or moves a subnet, or after "second S"; at
    "full N" the disk is full from there on; "count" only counts them."""
    kind, _, number = moment.partition(" ")
    count, started = itertools.count(), time.perf_counter()

    def note(what: str) -> None:
        at = next(count)
        if kind == "full" and at >= int(number) and not what.startswith(FREES_ROOM):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if kind == "event" and at == int(number):
            (folder / "died.txt").write_text(what)
            die()

    def hook(event: str, arguments: tuple) -> None:
        if event not in EVENTS or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path, writes = str(arguments[0]), os.O_WRONLY | os.O_RDWR | os.O_CREAT
        inside = path.startswith(str(folder / "run")) or (event != "open" and "/" not in path)
        if inside and (event != "open" or arguments[2] & writes):
            note(f"{event} {path}")

    if kind == "second":
        timer = threading.Timer(float(number), die)
        timer.daemon = True
        timer.start()
        return
    sys.addaudithook(hook)
    for owner, name in ((os, "fsync"), (module.SubnetModule, "move_subnet_")):
        mock.patch.object(owner, name, noted(note, name, getattr(owner, name))).start()
    if kind == "count":
        text = lambda: f"{next(count)} {time.perf_counter() - started}"  # noqa: E731
        mock.patch.object(os, "_exit", counted(folder / "count.txt", text, os._exit)).start()


def noted(note, name: str, original):
    def call(*args, **kwargs):
        note(name)
        return original(*args, **kwargs)

    return call


def counted(path: Path, text, original):
    def call(status):
        path.write_text(text())
        original(status)

    return call


FREES_ROOM = ("move_subnet_", "os.remove", "os.rmdir")
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")
DOOMS = {
    "weights": lambda: dies_writing(transformers.modeling_utils, "safe_save_file", "checkpoint-6"),
    "optimizer": lambda: dies_writing(torch, "save", "checkpoint-6/optimizer"),
    "old one's removal": lambda: mock.patch.object(
        checkpoints.shutil, "rmtree", dies_removing
    ).start(),
    "before the old one's removal": lambda: dies_before(
        checkpoints, "remove_checkpoint", "checkpoint-2"
    ),
    "marker": lambda: dies_before(checkpoints, "write_sealed", "checkpoint-6/losia"),
    "export": lambda: dies_writing(
        transformers.modeling_utils, "safe_save_file", "model.losia-unfinished"
    ),
}

if __name__ == "__main__":
    for line in sys.stdin:
        arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                run(*arguments)
            except InputError as error:
                (Path(arguments[0]) / "refused.txt").write_text(str(error))
                os._exit(2)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
