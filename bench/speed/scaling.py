"""How LoSiA's cost grows with p, tokens, layers and T; slopes and plots are made by the report."""

import functools
from collections.abc import Iterator
from typing import Any

import torch

from losia_kernels import LoSiAAdamW, LoSiAConfig, apply_losia
from losia_kernels.layers.module import losia_layers

from ..harness.gates import RedGate, Reference
from ..harness.jobs import Job
from ..harness.timing import measure
from ..methods import Options, Prepared
from .layer import Inputs, backward_dx, place, run_layer, step_phases
from .model import Run, run_model
from .models import build_stack, name_of, shape_of

NEVER = 10**9  # steps


def run_relocalization(
    model: str, batch: int, context: int, device: torch.device, dtype: torch.dtype
) -> dict:
    """What localization costs one decoder layer: a step outside its slot, one inside, and one that ends with a move.

    The moving layer's slot is one step long, so that every step ends one."""
    rows: dict[str, Any] = {}
    for name, period in (("resting", NEVER), ("observing", NEVER), ("moving", 1)):
        torch.manual_seed(0)
        module = build_stack(model, "block", device, dtype)
        inputs = Inputs(module, batch, context)
        reference = Reference(module, backward_dx(inputs))
        optimizer = LoSiAAdamW(apply_losia(module, LoSiAConfig(period=period)))
        layers = dict(losia_layers(module))
        if name == "resting":
            for layer in layers.values():
                layer.observe_(None)
        prepared = Prepared(module, optimizer, 0, subnets=layers)
        passed = reference.check(prepared, exact=True)
        del reference
        before = [layer.in_idx.clone() for layer in layers.values()]
        timings = measure(step_phases(prepared, inputs), device, seconds=1.0)
        rows[name] = {
            "gate": passed,
            **{phase: timing.to_dict() for phase, timing in timings.items()},
        }
        moved = any(
            not torch.equal(layer.in_idx, old)
            for layer, old in zip(layers.values(), before, strict=True)
        )
        if moved != (name == "moving"):
            raise RedGate(f"{name}: the subnets {'moved' if moved else 'did not move'}")
    return {
        **rows,
        "total": rows["moving"]["total"],
        "layers": shape_of(model).layers,
        "relocalization_ms": rows["moving"]["update"]["ms"] - rows["observing"]["update"]["ms"],
    }


def jobs(device: torch.device, dtype: torch.dtype) -> Iterator[Job]:
    gpu = device.type == "cuda"
    model, batch, context = place(device)
    common = {"model": model, "dtype": name_of(dtype)}
    size = {**common, "batch": batch, "context": context}
    moving = functools.partial(run_relocalization, model, batch, context, device, dtype)
    yield Job("scaling", "relocalization", size, moving, 50)
    for p in (1 / 16, 1 / 8, 1 / 4, 1 / 2):
        arguments = "losia-pro-off", model, "block", batch, context, device, dtype, Options(p)
        yield Job("scaling", "p", {**size, "p": p}, functools.partial(run_layer, *arguments), 51)
    for tokens in (1024, 2048, 4096, 8192, 16384, 32768, 131072) if gpu else (64, 128, 256, 512):
        length = min(tokens, context)
        arguments = "losia-pro-off", model, "block", tokens // length, length, device, dtype
        settings = {**common, "tokens": tokens, "context": length}
        yield Job("scaling", "tokens", settings, functools.partial(run_layer, *arguments), 52)
    for layers in (2, 4, 8, 16) if gpu else (2, 4, 8):
        run = Run("losia-pro", model, batch, context if gpu else 128, checkpointing=False)
        whole = functools.partial(run_model, run, device, dtype, num_hidden_layers=layers)
        yield Job("scaling", "layers", {**common, "batch": batch, "layers": layers}, whole, 53)
