"""The memory model against the bytes of live tensors, at full size and without a GPU: shapes under FakeTensorMode.

On a GPU the model suite holds the same estimates against the allocator's peak. No figure here is a time."""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from losia_kernels.finetune.estimate import estimate

from ..harness.jobs import Job
from ..harness.live_bytes import LiveBytes
from ..methods import Options
from .layer import run_step
from .model import Run, prepare, setting_of, step_phases
from .models import build_model, shape_of


def _convert(module: nn.Module, *arguments: Any, **keywords: Any) -> nn.Module:
    """``nn.Module.to`` for fake parameters, which torch cannot swap: replaces those whose dtype changes."""
    dtype = torch._C._nn._parse_to(*arguments, **keywords)[1]
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and dtype is not None and parameter.dtype != dtype:
                cast = parameter.detach().to(dtype)
                part._parameters[name] = nn.Parameter(cast, parameter.requires_grad)
    return module


def launch_nothing(kernel: Any, grid: Any) -> Callable[..., None]:
    return lambda *arguments, **keywords: None


def launching_nothing() -> contextlib.AbstractContextManager:
    """What launches kernels of Triton's makes its tensors, and leaves them as they are."""
    try:
        from triton.runtime.jit import KernelInterface
    except ImportError:
        return contextlib.nullcontext()
    return mock.patch.object(KernelInterface, "__getitem__", launch_nothing)


@contextlib.contextmanager
def simulated() -> Iterator[LiveBytes]:
    """Tensors without storage, counted as if they had one; values that are asked for are 1."""
    with (
        mock.patch.object(nn.Module, "to", _convert),
        mock.patch.object(torch.Tensor, "item", lambda tensor: 1),
        mock.patch.object(torch, "equal", lambda one, other: True),
        launching_nothing(),
        FakeTensorMode(),
        LiveBytes() as live,
    ):
        yield live


def simulate(run: Run, **changes: Any) -> dict[str, int]:
    """Peak bytes of a step of ``run`` in bfloat16, the optimizer's state being there; ``changes`` to the model's
    config."""
    with simulated() as live:
        model = build_model(run.model, torch.device("cpu"), torch.bfloat16, **changes)
        # Under a GPU's SDPA there is no mask; transformers makes one when it sees tensors that it
        # cannot look into.
        modeling = sys.modules[type(model).__module__]
        with mock.patch.object(modeling, "create_causal_mask", lambda *a, **k: None):
            prepared = prepare(run, model)
            phases = step_phases(prepared, torch.zeros(run.batch, run.context, dtype=torch.long))
            for _ in range(2):
                live.restart_peak()
                run_step(phases)
    return {"live_bytes": live.peak, "trained": prepared.trained}


def compare(run: Run, **changes: Any) -> dict[str, Any]:
    names = {"num_hidden_layers": "layers", "vocab_size": "vocabulary"}
    changed = {names[key]: value for key, value in changes.items()}
    found = estimate(dataclasses.replace(shape_of(run.model), **changed), setting_of(run))
    parts = {"predicted_bytes": found.total, "parts": dataclasses.asdict(found)}
    return {**simulate(run, **changes), **parts}


def _runs() -> Iterator[tuple[float, Run]]:
    llama, shares = ("llama-2-7b", 4, 2048), (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    yield 28, Run("losia-pro", *llama, True, Options(1 / 8, 1 / 8))
    yield 28, Run("lora", *llama, True)
    methods = "losia-pro lora lora-fp32 dora losia-liger lora-liger frozen-liger losia-dense full galore frozen".split()
    for method, checkpointing in itertools.product(methods, (True, False)):
        yield 85, Run(method, *llama, checkpointing)
    for p_o, p in itertools.product((1 / 8, 1.0), shares):
        yield 84, Run("losia-pro", *llama, True, Options(p, p_o))
    for p in shares:
        yield 83, Run("losia-pro-lean", *llama, True, Options(p, 1 / 8))
    for r in (16, 256, 1024):
        yield 86, Run("lora", *llama, True, Options(rank=r))


def jobs(device: torch.device, dtype: torch.dtype) -> Iterator[Job]:
    """Without a GPU only: beside one, the model suite measures."""
    for priority, run in _runs() if device.type != "cuda" else ():
        settings = run.settings(torch.bfloat16)
        yield Job("memory", run.method, settings, functools.partial(compare, run), priority)
