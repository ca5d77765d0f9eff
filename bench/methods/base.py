"""What every method gives the benchmarks, and how its peer is imported."""

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from losia_kernels import LoSiALinear

from ..harness.jobs import MissingPeer


@dataclass(frozen=True)
class Options:
    """Sizes that methods differ by, and a run of the study; each method reads its own.

    ``batches()`` starts the run's own batches anew, ``generic()`` those of English that is not scored; ``changes`` are
    a method's of the study to the paper's settings."""

    rank_factor: float = 1 / 8
    output_dim_factor: float = 0.0
    rank: int = 64
    alpha: int | None = None  # None: twice the rank
    lr: float = 1e-4
    seed: int = 0
    steps: int = 0
    warmup: int = 0
    batches: Callable[[], Any] | None = None
    generic: Callable[[], Any] | None = None
    changes: dict[str, Any] = field(default_factory=dict)


DEFAULTS = Options()


@dataclass
class Prepared:
    """A model that one method trains. ``optimizer`` None: nothing to do after the backward; ``finish()`` gives the
    plain model of the same weights; ``made``: what followed from the run's length."""

    module: nn.Module
    optimizer: torch.optim.Optimizer | None
    trained: int
    finish: Callable[[], nn.Module] | None = None
    captured: bool = False  # forward and backward are one CUDA graph, where there is a GPU
    autocast: bool = False  # float32 adapters in a 16-bit model, as Trainer(bf16=True) runs them
    subnets: dict[str, LoSiALinear] = field(default_factory=dict)  # whose gradient is gated
    made: dict[str, Any] = field(default_factory=dict)

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


@dataclass(frozen=True)
class Method:
    """``prepare(model, options)`` changes a plain model in place into what the method trains.

    ``options``: the fields of Options that name a row of it; ``exact``: it starts as the plain model to the last bit,
    so dx must be autograd's. bench/README.md says how each is configured; of those of the study their ``settings`` do,
    and ``lrs`` are the learning rates that it tries, as many for each."""

    name: str
    title: str
    prepare: Callable[[nn.Module, Options], Prepared]
    options: tuple[str, ...] = ()
    exact: bool = True
    settings: str = ""
    lrs: tuple[float, ...] = ()
    chooses: bool = False  # a choice of shape, places and moves on trial, not a method of its own
    explored: bool = False  # searched, and no more


class UnknownMethod(ValueError):
    """No method of that name."""


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the decoder blocks: what every method here trains."""
    named = model.named_modules()
    return {n: each for n, each in named if isinstance(each, nn.Linear) and "layers." in n}


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """torch's fastest AdamW, which also needs no temporaries."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


PLACEHOLDERS = ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer")


@contextlib.contextmanager
def placeholder_bitsandbytes() -> Iterator[None]:
    """Where bitsandbytes is not installed, empty modules of its name while galore-torch is imported, which wants it for
    an 8-bit optimizer that is not measured here."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        yield
        return
    sys.modules.update({name: types.ModuleType(name) for name in PLACEHOLDERS})
    sys.modules["bitsandbytes.optim.optimizer"].Optimizer2State = object
    try:
        yield
    finally:
        for name in PLACEHOLDERS:
            del sys.modules[name]


def import_peer(module: str) -> types.ModuleType:
    try:
        if not module.startswith("galore_torch"):
            return importlib.import_module(module)
        with placeholder_bitsandbytes():
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingPeer(f"{module.split('.')[0]} cannot be imported: {error}") from None
