"""Forms of one kernel side by side: timed on a GPU; without one, by their machine code and by counts.

``python -m bench variants``. The package chooses by ``kernels.subnet_grad.choose_variant``; "ours" is its
choice, the others ask for a form by ``override_config``.

Predicted before any of it was measured, for an H200, up_proj at p = 1/8, over one read of dy at copy bandwidth: single
entries, "fused_wide" 1.3 to 1.7, "gathered" 1.5 to 1.9, "fused" 1.6 to 2.2, each slower by a fifth or more with nothing
loaded ahead; runs of 16, "fused" 0.5 to 0.7 and first. Of the default's subnets, single entries: down_proj in tiles of
128 x 256 50 us, of 64 x 512 61; q_proj, whose input is kept whole, 23 in its turned form, where a gather of the input
and a dense product take 46. Splits added by a dependent launch 1 us less each than by torch's sum, by the last program
of a tile 2 to 18 us more (``python -m bench counts``)."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from losia_kernels import ops
from losia_kernels.kernels.launch import choose_config, override_config
from losia_kernels.kernels.subnet_grad import VARIANTS
from losia_kernels.kernels.sums import SUMS
from losia_kernels.layers.subnet import Subnet
from losia_kernels.ops.gather import select_last
from losia_kernels.ops.subnet_grad import subnet_grad_plain

from ..harness.jobs import Job
from . import counts
from .models import shape_of
from .ops import OpCase, run_case
from .predicted import DEFAULT, PAPER, QUARTER, Layer

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
LINEARS = ("up_proj", "q_proj", "down_proj")
REGISTERS, SHARED = 65536, {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # of a multiprocessor; KiB


def subnet_grad(
    shape, factors: tuple[float, float], tokens, dtype, alignment: int, whole: bool = False
) -> OpCase:
    """In every form; single entries also without loading a tile ahead. ``whole``: the input is kept so, and gathered
    here."""
    k_out, k_in = (
        int(p * size) // alignment * alignment for p, size in zip(factors, shape, strict=True)
    )

    def inputs(g: torch.Generator) -> tuple:
        subnet = Subnet.random(shape, (k_out, k_in), torch.Generator().manual_seed(0), alignment)
        sizes = ((tokens, size) for size in shape)
        dy, x = (torch.randn(*s, generator=g, device=g.device).to(dtype) for s in sizes)
        out_idx, in_idx = subnet.out_idx.to(g.device), subnet.in_idx.to(g.device)
        return (dy, x, out_idx, in_idx) if whole else (dy, x[:, in_idx], out_idx)

    def ours(dy, x, out_idx, in_idx=None):
        return ops.subnet_grad(dy, x, out_idx, in_idx, alignment)

    def in_form(**fields: Any) -> Callable:
        def run(*arguments):
            with override_config("subnet_grad", **fields):
                return ours(*arguments)

        return run

    def eager(dy, x, out_idx, in_idx=None):
        return subnet_grad_plain(dy, x, out_idx, in_idx)

    def truth(dy, x, out_idx, in_idx=None):
        return dy[:, out_idx].double().T @ select_last(x, in_idx).double()

    forms = {"ours": ours, "eager": eager}
    forms |= {f"ours: {each}": in_form(variant=each) for each in VARIANTS}
    for each in ("fused", "fused_wide") if alignment == 1 else ():
        forms[f"ours: {each}, nothing ahead"] = in_form(variant=each, prefetch=False)
    wide = "fused_wide" if alignment == 1 else "fused"
    forms[f"ours: {wide}, 2 stages"] = in_form(variant=wide, num_stages=2)
    for each in ("gathered",) if alignment == 1 else ("gathered", "fused"):
        for block_in in (128, 256):
            tile = {"block_out": 128, "block_in": block_in}
            forms[f"ours: {each}, 128 x {block_in}"] = in_form(variant=each, **tile)
    for tile in ((64, 512), (128, 256)) if alignment == 1 else ():
        fields = {"variant": "fused_wide", "block_out": tile[0], "block_in": tile[1]}
        forms[f"ours: fused_wide, {tile[0]} x {tile[1]}"] = in_form(**fields)
    for each in SUMS[1:]:
        forms[f"ours: splits added {each}"] = in_form(sums=each)
    moved = dtype.itemsize * tokens * (shape[0] + (shape[1] if whole else k_in)) + 4 * k_out * k_in
    flops = 2 * tokens * k_out * k_in
    return OpCase(inputs, forms, truth, moved, flops)


def run_variant(layer: Layer, linear: str, device, dtype) -> dict[str, Any]:
    shape, k = layer.linears[linear], layer.subnets[linear]
    factors = (k[0] / shape[0], k[1] / shape[1])
    size = layer.tokens, dtype, layer.alignment, layer.keeps_input(linear)
    return run_case(subnet_grad(shape, factors, *size), device, dtype)


def jobs(device: torch.device, dtype: torch.dtype) -> Iterator[Job]:
    """The most telling first: the paper's subnets at p = 1/8, the default's, then p = 1/4."""
    layers = [replace(layer, alignment=a) for layer in (PAPER, DEFAULT, QUARTER) for a in (1, 16)]
    chosen = [(layer, linear) for layer in layers for linear in LINEARS]
    chosen += [(replace(DEFAULT, alignment=a), "o_proj") for a in (1, 16)]
    chosen += [(replace(PAPER, alignment=a), "up_proj") for a in (32, 64)]
    for layer, linear in chosen if device.type == "cuda" else ():
        size = {"model": layer.model, "linear": linear, "p": layer.rank_factor}
        size |= {"subnet": layer.shape, "tokens": layer.tokens, "alignment": layer.alignment}
        run = functools.partial(run_variant, layer, linear, device, dtype)
        priority = {PAPER.rank_factor: 40, DEFAULT.rank_factor: 45}.get(layer.rank_factor, 70)
        yield Job("variants", "subnet_grad", size, run, priority)


# without a GPU ------------------------------------------------------------------------------------


def programs_at_once(arch: str, registers: int, shared: int, warps: int) -> int | None:
    """Programs that one multiprocessor holds, by registers and shared memory; None for an AMD device."""
    if arch not in SHARED:
        return None
    by_shared = SHARED[arch] * 1024 // (shared + 1024)
    return min(REGISTERS // (32 * warps * registers), by_shared, 64 // warps)


def _machine_code(arch: str, variant: str, alignment: int, tokens: int, shape, p: float) -> str:
    from losia_kernels.kernels.subnet_grad import launch_subnet_grad

    from ..harness.machine_code import accesses, facts, launches

    meta = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
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
        widths = []
        for kind, each in accesses(kernel).items():
            if each:
                widths.append(f"{kind} " + ", ".join(f"{n} x {width}" for width, n in each.items()))
        lines.append(
            f"{arch:7} {alignment:9} {name:12} {kernel.name:22} {found['registers']:9} "
            f"{found['spills']:6} {shared:7} {at_once or '':>7}  {'; '.join(widths)}"
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
    for arch, alignment, variant in itertools.product(archs, (1, 16), VARIANTS):
        if variant != "gathered_library":  # the vendor's product is not ours to compile
            lines.append(_machine_code(arch, variant, alignment, tokens, shape, p))
    return "\n\n".join(["\n".join(lines), counts.report()])
