"""The authors' own package, ``losia`` 0.1.5 (LoSiA-Pro through its ``attach_losia``), as its README
configures it."""

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from .base import Method, MissingPeer, Options, Prepared, decoder_linears
from .imports import import_peer

NEVER = 10**6  # steps
EXTENSION_FOLDER = Path(
    ".cache/losia_extension"
)  # its CUDA extension is built into the current directory on import


def _import_losia() -> ModuleType:
    found = _try_import()
    if isinstance(found, str):
        raise MissingPeer(found)
    return found


@functools.cache
def _try_import() -> ModuleType | str:
    """The package, or why there is none; a build that fails takes minutes and is not tried
    twice."""
    try:
        return _build_and_import()
    except MissingPeer as error:
        return str(error)


def _build_and_import() -> ModuleType:
    if not torch.cuda.is_available():
        raise MissingPeer(
            "losia 0.1.5 builds a CUDA extension when it is imported; there is no CUDA device here"
        )
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        raise MissingPeer(
            "losia 0.1.5 builds a CUDA extension when it is imported; there is no nvcc here"
        )
    try:
        with _working_in(EXTENSION_FOLDER):
            peer = import_peer("losia.optimizer")
    except (RuntimeError, OSError) as error:
        raise MissingPeer(
            f"losia 0.1.5: its CUDA extension does not build: {str(error).splitlines()[0]}"
        ) from None
    _accept_old_argument(import_peer("losia.losia_torch.scheduler").LambdaLR4LoSiA)
    return peer


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _accept_old_argument(scheduler: type) -> None:
    """Its scheduler passes ``verbose`` on to torch, which no longer takes it; nothing else is
    changed."""

    class Base(LRScheduler):
        def __init__(self, optimizer, last_epoch=-1, verbose=None):
            super().__init__(optimizer, last_epoch)

    scheduler.__bases__ = (Base,)


def _prepare(model: nn.Module, options: Options, observing: bool = True) -> Prepared:
    peer = _import_losia()
    model.requires_grad_(
        False
    )  # as for every method here; its README trains embeddings, norms and head densely
    linears = decoder_linears(model)
    for linear in linears.values():
        linear.weight.requires_grad_()
    # Its timeline cannot be set: the first layer's slot never ends, or it ends with the first step
    # and never returns.
    layers = 1 + max(int(name.split(".")[2]) for name in linears) if observing else NEVER
    peer.attach_losia(
        model,
        SimpleNamespace(num_hidden_layers=layers),
        num_training_steps=10_000,
        lr=6e-5,
        rank_factor=options.rank_factor,
        period=NEVER if observing else 1,
        use_pro=True,
    )
    trained = sum(
        int(options.rank_factor * linear.out_features)
        * int(options.rank_factor * linear.in_features)
        for linear in linears.values()
    )
    return Prepared(
        model, update=lambda: None, trained=trained
    )  # its hooks update during the backward


REFERENCE = Method(
    "losia-reference",
    "losia 0.1.5 (the authors')",
    "attach_losia(rank_factor=1/8, use_pro=True); only the decoder's "
    "linears train; its hooks update during the backward; one block observes",
    _prepare,
    ("rank_factor",),
)
REFERENCE_OFF = Method(
    "losia-reference-off",
    "losia 0.1.5 (the authors'), outside its slot",
    "as losia-reference; no block observes",
    functools.partial(_prepare, observing=False),
    ("rank_factor",),
)
