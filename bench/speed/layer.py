"""One decoder layer, and its linears alone: forward, backward and update of every method over the frozen floor.

The floor is measured again inside each job, its steps and the method's in turn, so that a ratio never crosses a change
of the clocks."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..harness.gates import Reference, gate_relative
from ..harness.jobs import Job
from ..harness.live_bytes import SavedBytes, peak_bytes
from ..harness.timing import Timing, measure, rotation, samples
from ..methods import DEFAULTS, LATE, LAYER_METHODS, Options, Prepared, get_method
from ..methods.galore import project_once
from .models import GPU_BATCH, GPU_CONTEXT, STACKS, build_stack, name_of, shape_of


class Inputs:
    """Sets of ``x [b, t, d]`` and of gradients of the outputs, rotated."""

    def __init__(self, module: nn.Module, batch: int, context: int):
        weight = next(module.parameters())
        like = {"generator": torch.Generator(weight.device).manual_seed(1), "device": weight.device}

        def one_set() -> tuple[Tensor, list[Tensor]]:
            x = torch.randn(batch, context, module.width, **like).to(weight.dtype)
            with torch.no_grad():
                outputs = _tuple(module(x))
            return x.requires_grad_(), [torch.randn(y.shape, **like).to(y.dtype) for y in outputs]

        first = one_set()
        sets = rotation(first[0].nbytes + sum(dy.nbytes for dy in first[1]), weight.device)
        self.sets = [first] + [one_set() for _ in range(sets - 1)]

    def __getitem__(self, number: int) -> tuple[Tensor, list[Tensor]]:
        return self.sets[number % len(self.sets)]


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _backward(outputs: tuple[Tensor, ...], grads: list[Tensor]) -> None:
    cast = [dy.to(y.dtype) for dy, y in zip(grads, outputs, strict=True)]
    torch.autograd.backward(outputs, cast)


def backward_dx(inputs: Inputs):
    """Forward and backward on the first set, in the model's dtype; returns dx. In float64 one sample after the other:
    its attention holds all scores, which would take more than what is measured."""

    def run(module: nn.Module) -> Tensor:
        dtype = next(module.parameters()).dtype
        x, grads = inputs[0]
        x = x.detach().to(dtype).requires_grad_()
        size = 1 if dtype == torch.float64 else len(x)
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            _backward(_tuple(module(x[part])), [dy[part] for dy in grads])
        return x.grad

    return run


def step_phases(prepared: Prepared, inputs: Inputs) -> dict:
    """forward, backward, update: one training step, each a function of the repetition's number."""
    state: dict[str, Any] = {}
    device = inputs[0][0].device.type

    def forward(number: int) -> None:
        x, _ = inputs[number]
        x.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=prepared.autocast):
            state["outputs"] = _tuple(prepared.module(x))

    def backward(number: int) -> None:
        _backward(state.pop("outputs"), inputs[number][1])

    return {"forward": forward, "backward": backward, "update": lambda number: prepared.update()}


def run_step(phases: dict, number: int = 0) -> None:
    for phase in phases.values():
        phase(number)


def memory_of_step(prepared: Prepared, inputs: Inputs, device: torch.device) -> dict[str, int]:
    """Bytes kept for the backward, the input among them where it is, and the peak of a step above what is there before
    it (inputs, weights, state)."""
    phases = step_phases(prepared, inputs)
    module = prepared.module
    # a subnet's indices are in the state dict alone
    known = [*module.buffers(), *module.state_dict(keep_vars=True).values()]
    with SavedBytes(known) as saved:
        phases["forward"](0)
    phases["backward"](0)
    phases["update"](0)
    inputs[0][0].grad = None
    peak = peak_bytes(lambda: run_step(phases), device)
    return {"saved_bytes": saved.total, "peak_bytes": peak}


def run_layer(
    name, model, stack, batch, context, device, dtype, options: Options = DEFAULTS, seconds=2.0
) -> dict[str, Any]:
    """The row of one method on one stack; for ``seconds`` its steps and those of its floor are timed in turn."""
    torch.manual_seed(0)
    method = get_method(name)
    plain = build_stack(model, stack, device, dtype)
    inputs = Inputs(plain, batch, context)
    reference = Reference(plain, backward_dx(inputs))
    prepared = method.prepare(plain, options)
    passed = reference.check(prepared, method.exact)
    del reference
    floor = get_method("frozen").prepare(build_stack(model, stack, device, dtype), options)

    memory = memory_of_step(prepared, inputs, device)
    floor_step = functools.partial(run_step, step_phases(floor, inputs))
    found = samples({"floor": floor_step, **step_phases(prepared, inputs)}, device, seconds)
    floors = found.pop("floor")
    found["total"] = [sum(step) for step in zip(*found.values(), strict=True)]
    ratio = Timing.of([a / b for a, b in zip(found["total"], floors, strict=True)])
    timed = {phase: Timing.of(each).to_dict() for phase, each in found.items()}
    over = {"median": ratio.ms, "low": ratio.low, "high": ratio.high}
    row = {"gate": passed, "trained": prepared.trained, **memory, **timed}
    return row | {"floor_ms": Timing.of(floors).ms, "over_floor": over}


def run_svd(model: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """GaLore's SVDs of the gradients of one layer's linears, every 200 steps; linears of one shape are timed once."""
    shapes = [tuple(sorted(shape)) for shape in shape_of(model).linears.values()]
    project_once(torch.randn(8, 8, device=device, dtype=dtype))  # loads what a first SVD needs
    found: dict[tuple, float] = {}
    for shape in dict.fromkeys(shapes):
        gradient = torch.randn(*shape, device=device, dtype=dtype)
        projection = project_once(gradient).double()  # [short, rank], orthonormal
        gram = projection.T @ projection
        passed = gate_relative("orthonormal", gram, torch.eye(len(gram), device=device), 0.02)
        call = {"svd": lambda i, gradient=gradient: project_once(gradient)}
        found[shape] = measure(call, device, repeats=1, warmup=0)["svd"].ms
    each = {"x".join(map(str, shape)): ms for shape, ms in found.items()}
    return {"gate": passed, "total": {"ms": sum(found[s] for s in shapes)}, "svd_ms": each}


def place(device: torch.device) -> tuple[str, int, int]:
    """Model, batch and context that are measured first on this device."""
    on_gpu = device.type == "cuda"
    return ("llama-2-7b", GPU_BATCH, GPU_CONTEXT) if on_gpu else ("smollm2-135m", 1, 256)


def jobs(device: torch.device, dtype: torch.dtype) -> Iterator[Job]:
    gpu = device.type == "cuda"
    first, batch, context = place(device)
    for turn, model in enumerate((first, "gemma-2b", "llama-2-13b") if gpu else (first,)):
        for stack in reversed(STACKS):
            for rank, name in enumerate(LAYER_METHODS):
                if stack == "linears" and "liger" in name:
                    continue  # it changes what is between them
                size = {"model": model, "stack": stack, "batch": batch, "context": context}
                run = functools.partial(run_layer, name, *size.values(), device, dtype)
                linears = (1 if gpu else 20) * (stack == "linears")
                priority = 10 + 60 * turn + (25 if name in LATE else 0) + linears + rank / 100
                yield Job("layer", name, {**size, "dtype": name_of(dtype)}, run, priority)
    settings = {"model": first, "dtype": name_of(dtype)}
    svd = functools.partial(run_svd, first, device, dtype)
    yield Job("layer", "galore-svd", settings, svd, 29 if gpu else 20.5)
