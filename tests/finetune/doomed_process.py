"""One process a run, of which some kill themselves with SIGKILL in the middle of writing.

    python doomed_process.py    reads lines [argument of ``run``, ...] on stdin, answers each with its exit status

transformers is imported once; each run runs in a fork of this process, which itself never computes
anything.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch
import transformers.modeling_utils

from losia_kernels.finetune import checkpoints, progress
from losia_kernels.finetune.run import finetune
from tests.finetune.tiny_run import options

SAVE_STEPS, STEPS = 2, 6  # checkpoints 2, 4, 6; 2 goes when 6 is written


def run(folder: str, model: str, moment: str = "", resume: bool = False) -> None:
    """A fine-tuning run in ``folder`` that dies at ``moment``, or never."""
    with (
        open(Path(folder) / "printed.txt", "a") as printed,
        mock.patch.object(sys, "stdout", printed),
    ):
        if moment:
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


DOOMS = {
    "weights": lambda: dies_writing(transformers.modeling_utils, "safe_save_file", "checkpoint-6"),
    "optimizer": lambda: dies_writing(torch, "save", "checkpoint-6/optimizer"),
    "old one's removal": lambda: mock.patch.object(
        checkpoints.shutil, "rmtree", dies_removing
    ).start(),
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
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
