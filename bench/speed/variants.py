"""Forms of one kernel side by side, timed on a GPU; what can be said of them without one is in ``compiled``.

``python -m bench variants``. The package chooses by ``kernels.subnet_grad.choose_variant``; "ours" is its
choice, the others ask for a form by ``override_config``.

Predicted before any of it was measured, for an H200, up_proj at p = 1/8, over one read of dy at copy bandwidth: single
entries, "fused_wide" 1.3 to 1.7, "gathered" 1.5 to 1.9, "fused" 1.6 to 2.2, each slower by a fifth or more with nothing
loaded ahead; runs of 16, "fused" 0.5 to 0.7 and first. Of the default's subnets, single entries: down_proj in tiles of
128 x 256 50 us, of 64 x 512 61; q_proj, whose input is kept whole, 23 in its turned form, where a gather of the input
and a dense product take 46. Splits added by a dependent launch 1 us less each than by torch's sum, by the last program
of a tile 2 to 18 us more (``python -m bench counts``)."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from losia_kernels import ops
from losia_kernels.kernels.launch import override_config
from losia_kernels.kernels.subnet_grad import VARIANTS
from losia_kernels.kernels.sums import SUMS
from losia_kernels.layers.subnet import Subnet
from losia_kernels.ops.gather import select_last
from losia_kernels.ops.subnet_grad import subnet_grad_plain

from ..harness.jobs import Job
from .models import DEFAULT, PAPER, QUARTER, Layer
from .ops import OpCase, run_case

LINEARS = ("up_proj", "q_proj", "down_proj")


def subnet_grad(
    shape, sizes: tuple[int, int], tokens, dtype, alignment: int, whole: bool = False
) -> OpCase:
    """In every form; single entries also without loading a tile ahead. ``shape`` is (out, in), ``sizes`` (k_out, k_in);
    ``whole``: the input is kept so, and gathered here."""
    k_out, k_in = sizes

    def inputs(g: torch.Generator) -> tuple:
        subnet = Subnet.random(shape, sizes, torch.Generator().manual_seed(0), alignment)
        dy, x = (torch.randn(tokens, n, generator=g, device=g.device).to(dtype) for n in shape)
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


def case_of(layer: Layer, linear: str, dtype: torch.dtype) -> OpCase:
    sizes = layer.linears[linear], layer.subnets[linear]
    return subnet_grad(*sizes, layer.tokens, dtype, layer.alignment, layer.keeps_input(linear))


def run_variant(layer: Layer, linear: str, device, dtype) -> dict[str, Any]:
    return run_case(case_of(layer, linear, dtype), device, dtype)


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
