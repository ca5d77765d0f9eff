"""``python -m bench quick``: a decoder layer's step by the methods people ask about, in two minutes, with a verdict.

Every row's steps are timed in turn with those of its own floor, behind the gate. Nothing is written unless asked."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..harness.jobs import Clock, Job, describe, free_memory, run_all
from ..harness.provenance import origin, provenance
from ..harness.store import append
from .layer import place, run_layer
from .models import name_of, shape_of
from .ops import run_op
from .tables import layer_title, mean_over_floor, over_floor

# those of the verdict first
METHODS_SHOWN = ("losia-pro-off", "lora", "losia-pro", "frozen", "full")
OPS_SHOWN = ("subnet_grad", "importance_update_", "subnet_adamw_ x 32")
MINUTES = 2.0
SECONDS = 4.0  # that a row and its floor are timed, a step of each in turn
HEAD = ("a decoder layer's step", "over its floor", "20-80 %", "ms", "20-80 %", "floor ms")


def jobs(device: torch.device) -> list[Job]:
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    model, batch, context = place(device)
    name = name_of(dtype)
    size = {"model": model, "batch": batch, "context": context, "dtype": name}
    found = []
    for rank, method in enumerate(METHODS_SHOWN):
        arguments = method, model, "block", batch, context, device, dtype
        run = functools.partial(run_layer, *arguments, seconds=SECONDS)
        found.append(Job("layer", method, size, run, rank, seconds=12))
    shape = shape_of(model).linears["up_proj"]
    for rank, op in enumerate(OPS_SHOWN if gpu else ()):
        run = functools.partial(run_op, op, shape, 1 / 8, batch * context, device, dtype)
        found.append(Job("ops", op, size, run, 10 + rank, seconds=15))
    return found


def main(device: torch.device, output: Path | None = None) -> int:
    """Measure, print, and say what the spread allows to say. Exit code 1: a gate was red."""
    origins, rows = provenance(device), []

    def add(job: Job, row: dict[str, Any]) -> str:
        rows.append(row)
        free_memory()
        if output is not None:
            append(output, {**row, "provenance": origins})
        return describe(row)

    run_all(jobs(device), add, Clock(MINUTES), lambda line: print(line, flush=True))
    if device.type != "cuda":
        print("\nWithout a GPU every method is plain torch: LoSiA's kernels are not in this.")
    print(f"\n{report(rows, shape_of(place(device)[0]).layers)}\n\n{origin(origins)}")
    return 1 if any(row["status"] == "red" for row in rows) else 0


def report(rows: list[dict[str, Any]], layers: int) -> str:
    body, kernels = [], []
    for row in rows:
        name = row["id"]["name"]
        if row["status"] != "ok":
            body.append([layer_title(name), row["status"], *[""] * 4])
        elif row["id"]["suite"] == "layer":
            ratio, total = row["over_floor"], row["total"]
            over = f"{ratio['median']:.3f}", f"{ratio['low']:.3f}-{ratio['high']:.3f}"
            cells = *over, *_with_spread(total), f"{row['floor_ms']:.4g}"
            body.append([layer_title(name), *cells])
        else:
            for form, entry in row["forms"].items():
                if entry["status"] == "ok":
                    share = f"{entry['share_of_roof']:.2f}"
                    kernels.append([name, form, *_with_spread(entry), share])
    head = ("kernel", "form", "ms", "20-80 %", "share of the roof")
    parts = [aligned(head, kernels), aligned(HEAD, body), verdict(rows, layers)]
    return "\n\n".join(filter(None, parts))


def _with_spread(timing: dict[str, Any]) -> tuple[str, str]:
    return f"{timing['ms']:.4g}", f"{timing['low']:.4g}-{timing['high']:.4g}"


def verdict(rows: list[dict[str, Any]], layers: int) -> str:
    """LoSiA's mean over a model's layers against LoRA, each over its own floor."""
    ok = {row["id"]["name"]: row for row in rows if row["status"] == "ok"}
    if not {"losia-pro", "losia-pro-off", "lora"} <= ok.keys():
        return "No verdict: LoSiA and LoRA were not both measured."
    ours, off, lora = (ok[name] for name in ("losia-pro", "losia-pro-off", "lora"))
    ratio = mean_over_floor(ours, off, layers) / over_floor(lora)
    spread = math.hypot(spread_of(off), spread_of(lora))
    word = "faster" if ratio < 1 else "slower"
    allows = "allows" if abs(ratio - 1) > spread else "does not allow"
    return (
        f"Ours (mean of {layers} layers, of which one observes) is {abs(100 * (1 - ratio)):.1f} % {word} "
        f"than PEFT LoRA r 64;\nthe spread of {100 * spread:.1f} % {allows} to say so."
    )


def spread_of(row: dict[str, Any]) -> float:
    """Half of the 20-80 % of a row's ratios to its floor, as a share of their median."""
    ratio = row["over_floor"]
    return (ratio["high"] - ratio["low"]) / 2 / ratio["median"]


def aligned(head: Sequence[str], body: list[list[str]]) -> str:
    """A table for a terminal, its columns as wide as their cells, the first to the left; empty without a body."""
    rows = [list(head), *body] if body else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)
