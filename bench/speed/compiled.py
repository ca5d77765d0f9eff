"""What the compiler makes of the subnet's gradient, on a machine without a GPU: ``python -m bench variants`` there."""

import functools
import itertools
from dataclasses import replace
from typing import Any

import torch

from losia_kernels.kernels.launch import choose_config, override_config, padded
from losia_kernels.kernels.subnet_grad import VARIANTS, launch_subnet_grad

from ..harness.machine_code import accesses, facts, launches
from . import counts
from .models import PAPER, Layer

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
REGISTERS, SHARED = 65536, {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # of a multiprocessor; KiB
LINEAR = "up_proj"


def compile_gradient(layer: Layer, name: str, arch: str, **form: Any) -> list:
    """The kernels that the package would launch on ``arch`` for this linear's gradient, none of them run. ``form``:
    fields of the LaunchConfig to have in place of those chosen."""
    meta = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    (out, inner), (k_out, k_in) = layer.linears[name], layer.subnets[name]
    out_idx, in_idx = (meta(k, dtype=torch.int64) for k in (k_out, k_in))
    dy, x = meta(layer.tokens, out), meta(layer.tokens, inner)
    if not layer.keeps_input(name):
        x, in_idx = meta(layer.tokens, padded(k_in))[:, :k_in], None

    def case() -> None:
        with override_config("subnet_grad", **form):
            launch_subnet_grad(dy, x, out_idx, in_idx, layer.alignment)

    return launches(arch, case)


def programs_at_once(arch: str, registers: int, shared: int, warps: int) -> int | None:
    """Programs that one multiprocessor holds, by registers and shared memory; None for an AMD device."""
    if arch not in SHARED:
        return None
    by_shared = SHARED[arch] * 1024 // (shared + 1024)
    return min(REGISTERS // (32 * warps * registers), by_shared, 64 // warps)


def _lines(arch: str, layer: Layer, variant: str) -> list[str]:
    size = layer.tokens, *layer.subnets[LINEAR], layer.alignment
    chosen = choose_config("subnet_grad", arch, torch.bfloat16, *size).variant
    name, lines = variant + ("*" if variant == chosen else ""), []
    for kernel in compile_gradient(layer, LINEAR, arch, variant=variant):
        found, shared, warps = facts(kernel), kernel.metadata.shared, kernel.metadata.num_warps
        at_once = programs_at_once(arch, found["registers"], shared, warps)
        widths = []
        for kind, each in accesses(kernel).items():
            if each:
                widths.append(f"{kind} " + ", ".join(f"{n} x {width}" for width, n in each.items()))
        lines.append(
            f"{arch:7} {layer.alignment:9} {name:12} {kernel.name:22} {found['registers']:9} "
            f"{found['spills']:6} {shared:7} {at_once or '':>7}  {'; '.join(widths)}"
        )
    return lines


def report() -> str:
    """All that a machine without a GPU can say of the forms: machine code of up_proj's gradient, then the counts."""
    lines = [
        "Compiled, not run. bfloat16, LLaMA-2 7B up_proj, p = 1/8, 8,192 tokens; * is the form chosen; accesses to",
        "memory: instructions x bytes a thread (copy: asynchronous, to shared memory); programs at once on one SM.",
        f"{'arch':7} alignment {'form':12} {'kernel':22} registers spills  shared at once  accesses",
    ]
    for arch, alignment, variant in itertools.product(ARCHS, (1, 16), VARIANTS):
        if variant != "gathered_library":  # the vendor's product is not ours to compile
            lines += _lines(arch, replace(PAPER, alignment=alignment), variant)
    return "\n\n".join(["\n".join(lines), counts.report()])
