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
from ..methods.losia import NEVER
from .layer import Inputs, backward_dx, place, run_layer, step_phases
from .model import Run, run_model
from .models import build_stack, name_of, shape_of


def run_relocalization(model: str, batch: int, context: int, device, dtype) -> dict[str, Any]:
    """What localization costs one decoder layer: a step outside its slot, one inside, and one that ends with a move:
    the moving layer's slot is one step long, so that every step ends one."""
    rows: dict[str, Any] = {}
    for name, period in (("resting", NEVER), ("observing", NEVER), ("moving", 1)):
        torch.manual_seed(0)
        module = build_stack(model, "block", device, dtype)
        inputs = Inputs(module, batch, context)
        reference = Reference(module, backward_dx(inputs))
        optimizer = LoSiAAdamW(
            apply_losia(module, LoSiAConfig.paper(period=period, output_dim_factor=0.0))
        )
        layers = dict(losia_layers(module))
        if name == "resting":
            for layer in layers.values():
                layer.observe_(None)
        prepared = Prepared(module, optimizer, 0, subnets=layers)
        passed = reference.check(prepared, exact=True)
        del reference
        before = {layer: layer.in_idx.clone() for layer in layers.values()}
        timings = measure(step_phases(prepared, inputs), device, seconds=1.0)
        rows[name] = {phase: timing.to_dict() for phase, timing in timings.items()}
        rows[name]["gate"] = passed
        moved = any(not torch.equal(layer.in_idx, old) for layer, old in before.items())
        if moved != (name == "moving"):
            raise RedGate(f"{name}: the subnets {'moved' if moved else 'did not move'}")
    cost = rows["moving"]["update"]["ms"] - rows["observing"]["update"]["ms"]
    whole = {"total": rows["moving"]["total"], "layers": shape_of(model).layers}
    return {**rows, **whole, "relocalization_ms": cost}


def jobs(device: torch.device, dtype: torch.dtype) -> Iterator[Job]:
    gpu = device.type == "cuda"
    model, batch, context = place(device)
    common = {"model": model, "dtype": name_of(dtype)}
    size = {**common, "batch": batch, "context": context}
    moving = functools.partial(run_relocalization, model, batch, context, device, dtype)
    yield Job("scaling", "relocalization", size, moving, 50)
    resting = functools.partial(run_layer, "losia-pro-off", model, "block")
    for p in (1 / 16, 1 / 8, 1 / 4, 1 / 2):
        run = functools.partial(resting, batch, context, device, dtype, Options(p))
        yield Job("scaling", "p", {**size, "p": p}, run, 51)
    for tokens in (1024, 2048, 4096, 8192, 16384, 32768, 131072) if gpu else (64, 128, 256, 512):
        length = min(tokens, context)
        run = functools.partial(resting, tokens // length, length, device, dtype)
        yield Job("scaling", "tokens", {**common, "tokens": tokens, "context": length}, run, 52)
    for layers in (2, 4, 8, 16) if gpu else (2, 4, 8):
        whole = Run("losia-pro", model, batch, context if gpu else 128, checkpointing=False)
        run = functools.partial(run_model, whole, device, dtype, num_hidden_layers=layers)
        yield Job("scaling", "layers", {**common, "batch": batch, "layers": layers}, run, 53)
