"""Forms of one kernel side by side: timed on a GPU; without one, by their machine code and by counts.

``python -m bench variants``. The package chooses by ``losia_kernels.kernels.launch.choose_subnet_grad``; "ours" is its
choice, the others ask for a form by ``override_config``.

Predicted before any of it was measured, for an H200, up_proj at p = 1/8, over one read of dy at copy bandwidth: single
entries, "fused_wide" 1.3 to 1.7, "gathered" 1.5 to 1.9, "fused" 1.6 to 2.2, each slower by a fifth or more with nothing
loaded ahead; runs of 16, "fused" 0.5 to 0.7 and first. The gather beside dx hides at most itself, 0.05 ms of 1.0, and
loses where it takes multiprocessors from dx."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from losia_kernels import ops
from losia_kernels.kernels.launch import SUBNET_GRAD_VARIANTS, choose_config, override_config
from losia_kernels.layers.subnet import Subnet
from losia_kernels.ops.subnet_grad import subnet_grad_plain

from ..harness.jobs import Job
from . import counts
from .models import shape_of
from .ops import OpCase, run_case

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
LINEARS = ("up_proj", "q_proj", "down_proj")
REGISTERS, SHARED = 65536, {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # of a multiprocessor; KiB


def _in_form(function: Callable, **fields: Any) -> Callable:
    def run(*arguments):
        with override_config("subnet_grad", **fields):
            return function(*arguments)

    return run


def _case(shape, p, tokens, dtype, alignment: int, forms: dict, truth: Callable, dx: int) -> OpCase:
    """``dx``: 1 if the forms make it too."""
    k_out, k_in = (int(p * size) // alignment * alignment for size in shape)

    def inputs(generator: torch.Generator) -> tuple:
        chooser = torch.Generator().manual_seed(0)
        subnet = Subnet.random(shape, (k_out, k_in), chooser, alignment)
        out_idx, in_idx = subnet.out_idx.to(generator.device), subnet.in_idx.to(generator.device)
        dy, x, weight = (
            torch.randn(*sizes, generator=generator, device=generator.device).to(dtype)
            for sizes in ((tokens, shape[0]), (tokens, shape[1]), shape)
        )
        return dy, x[:, in_idx], weight, out_idx

    moved = dtype.itemsize * tokens * (shape[0] + k_in)
    moved += dtype.itemsize * (tokens + shape[0]) * shape[1] if dx else 4 * k_out * k_in
    flops = 2 * tokens * (k_out * k_in + dx * shape[0] * shape[1])
    return OpCase(inputs, forms, truth, moved, flops)


def _forms(ours: Callable, eager: Callable, **more: Callable) -> dict[str, Callable]:
    chosen = {f"ours: {each}": _in_form(ours, variant=each) for each in SUBNET_GRAD_VARIANTS}
    return {"ours": ours, **chosen, **more, "eager": eager}


def subnet_grad(shape, p, tokens, dtype, alignment: int) -> OpCase:
    """The gradient alone, in every form; single entries also without loading a tile ahead."""

    def ours(dy, x, weight, out_idx):
        return ops.subnet_grad(dy, x, out_idx, None, alignment)

    ahead = {
        f"ours: {variant}, nothing ahead": _in_form(ours, variant=variant, prefetch=False)
        for variant in ("fused", "fused_wide")
        if alignment == 1
    }
    forms = _forms(ours, lambda dy, x, weight, o: subnet_grad_plain(dy, x, o, None), **ahead)

    def truth(dy, x, weight, out_idx):
        return dy[:, out_idx].double().T @ x.double()

    return _case(shape, p, tokens, dtype, alignment, forms, truth, dx=0)


class GatherBesideProduct:
    """dx on this stream while dy's columns are gathered on another; then the dense product of the gathered parts."""

    def __init__(self, alignment: int):
        self.alignment = alignment
        self.side: torch.cuda.Stream | None = None

    def __call__(self, dy: Tensor, x: Tensor, weight: Tensor, out_idx: Tensor) -> list[Tensor]:
        if not dy.is_cuda:
            dy_sub, dx = ops.gather_features(dy, out_idx, self.alignment), dy @ weight
        else:
            self.side = torch.cuda.Stream() if self.side is None else self.side
            here = torch.cuda.current_stream()
            self.side.wait_stream(here)
            with torch.cuda.stream(self.side):
                dy_sub = ops.gather_features(dy, out_idx, self.alignment)
            dx = dy @ weight
            here.wait_stream(self.side)
            dy_sub.record_stream(here)
        return [dx, ops.subnet_grad(dy_sub, x)]


def backward(shape, p, tokens, dtype, alignment: int) -> OpCase:
    """dx and the subnet's gradient, as a layer's backward makes them: in order, or the gather beside dx."""

    def ours(dy, x, weight, out_idx):
        return [dy @ weight, ops.subnet_grad(dy, x, out_idx, None, alignment)]

    def eager(dy, x, weight, out_idx):
        return [dy @ weight, subnet_grad_plain(dy, x, out_idx, None)]

    def truth(dy, x, weight, out_idx):
        return [dy.double() @ weight.double(), dy[:, out_idx].double().T @ x.double()]

    forms = _forms(ours, eager, **{"ours: gather beside dx": GatherBesideProduct(alignment)})
    return _case(shape, p, tokens, dtype, alignment, forms, truth, dx=1)


CASES = {"subnet_grad": subnet_grad, "backward": backward}


def run_variant(
    name: str, shape: tuple, p: float, alignment: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    return run_case(CASES[name](shape, p, 8192, dtype, alignment), device, dtype)


def jobs(device: torch.device, dtype: torch.dtype) -> Iterator[Job]:
    if device.type != "cuda":
        return
    for name, linear, alignment, p in itertools.product(CASES, LINEARS, (1, 16), (1 / 8, 1 / 4)):
        if p == 1 / 8 or name == "subnet_grad":
            shape = shape_of("llama-2-7b").linears[linear]
            size = {"model": "llama-2-7b", "linear": linear, "p": p, "tokens": 8192}
            run = functools.partial(run_variant, name, shape, p, alignment, device, dtype)
            priority = 40 if p == 1 / 8 else 70
            yield Job("variants", name, {**size, "alignment": alignment}, run, priority)


# without a GPU ------------------------------------------------------------------------------------


def programs_at_once(arch: str, registers: int, shared: int, warps: int) -> int | None:
    """Programs that one multiprocessor holds, by registers and shared memory; None for an AMD device."""
    if arch not in SHARED:
        return None
    by_shared = SHARED[arch] * 1024 // (shared + 1024)
    return min(REGISTERS // (32 * warps * registers), by_shared, 64 // warps)


def _machine_code(
    arch: str, variant: str, alignment: int, tokens: int, shape: tuple[int, int], p: float
) -> str:
    from losia_kernels.kernels.subnet_grad import launch_subnet_grad

    from ..harness.machine_code import accesses, facts, launches

    def meta(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    k_out, k_in = (int(p * size) for size in shape)

    def case() -> None:
        with override_config("subnet_grad", variant=variant):
            index = meta(k_out, dtype=torch.int64)
            launch_subnet_grad(meta(tokens, shape[0]), meta(tokens, k_in), index, None, alignment)

    size = tokens, k_out, k_in, alignment
    chosen = choose_config("subnet_grad", arch, torch.bfloat16, *size).variant
    name, lines = variant + ("*" if variant == chosen else ""), []
    for kernel in launches(arch, case):
        found, shared, warps = facts(kernel), kernel.metadata.shared, kernel.metadata.num_warps
        at_once = programs_at_once(arch, found["registers"], shared, warps)
        touched = {kind: each for kind, each in accesses(kernel).items() if each}
        widths = "; ".join(
            f"{kind} " + ", ".join(f"{count} x {width}" for width, count in each.items())
            for kind, each in touched.items()
        )
        lines.append(
            f"{arch:7} {alignment:9} {name:12} {kernel.name:22} {found['registers']:9} "
            f"{found['spills']:6} {shared:7} {at_once or '':>7}  {widths}"
        )
    return "\n".join(lines)


def report(archs: tuple[str, ...] = ARCHS, tokens: int = 8192, p: float = 1 / 8) -> str:
    """All that a machine without a GPU can say of the forms: machine code of up_proj's gradient, then the counts."""
    shape = shape_of("llama-2-7b").linears["up_proj"]
    lines = [
        "Compiled, not run. bfloat16, LLaMA-2 7B up_proj, p = 1/8, 8,192 tokens; * is the form chosen; accesses to",
        "memory: instructions x bytes a thread (copy: asynchronous, to shared memory); programs at once on one SM.",
        f"{'arch':7} alignment {'form':12} {'kernel':22} registers spills  shared at once  accesses",
    ]
    for arch, alignment, variant in itertools.product(archs, (1, 16), SUBNET_GRAD_VARIANTS):
        if variant != "gathered_library":  # the vendor's product is not ours to compile
            lines.append(_machine_code(arch, variant, alignment, tokens, shape, p))
    counted = "Counted, not measured. Bytes of an average random choice."
    return "\n\n".join(["\n".join(lines), counted, counts.report()])
