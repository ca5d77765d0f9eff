"""How LoSiA's cost grows with p, tokens, layers and T; slopes and plots are made by the report."""

from collections.abc import Iterator
from typing import Any

import torch

from losia_kernels import LoSiAAdamW, LoSiAConfig, apply_losia
from losia_kernels.linear import losia_layers

from .harness import measure
from .jobs import Job
from .layer import Inputs, run_layer, step_phases
from .methods import Options, Prepared
from .model import Run, run_model
from .models import build_stack


def run_relocalization(model: str, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> dict:
    """One decoder layer whose slot ends with every step: what the update costs with the relocalization in it.

    The layer observes in each step, so that there is importance to judge by; beside it the same without relocalizing.
    """
    rows: dict[str, Any] = {}
    for name, period in (("relocalizing", 1), ("observing", 10**9)):
        torch.manual_seed(0)
        module = apply_losia(build_stack(model, "block", device, dtype), LoSiAConfig(period=period))
        optimizer = LoSiAAdamW(module)

        def update(optimizer=optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        before = [layer.in_idx.clone() for _, layer in losia_layers(module)]
        prepared = Prepared(module, update, 0)
        timings = measure(step_phases(prepared, Inputs(module, batch, context)), device, seconds=1.0)
        rows[name] = {phase: timing.to_dict() for phase, timing in timings.items()}
        after = [layer.in_idx for _, layer in losia_layers(module)]
        rows[name]["moved"] = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if not rows["relocalizing"]["moved"] or rows["observing"]["moved"]:
        raise RuntimeError("the subnets moved when they should not, or did not when they should")
    return {**rows, "total": rows["relocalizing"]["total"],
            "relocalization_ms": rows["relocalizing"]["update"]["ms"] - rows["observing"]["update"]["ms"]}  # fmt: skip


def jobs(device: torch.device, dtype: torch.dtype) -> Iterator[Job]:
    gpu = device.type == "cuda"
    model, batch, context = ("llama-2-7b", 4, 2048) if gpu else ("smollm2-135m", 1, 256)
    common = {"model": model, "dtype": str(dtype).removeprefix("torch.")}

    def relocalize() -> dict:
        return run_relocalization(model, batch, context, device, dtype)

    yield Job("scaling", "relocalization", {**common, "batch": batch, "context": context}, relocalize, 50)
    for p in (1 / 16, 1 / 8, 1 / 4, 1 / 2):

        def by_p(p=p) -> dict:
            return run_layer("losia-pro-off", model, "block", batch, context, device, dtype, Options(p))

        yield Job("scaling", "p", {**common, "batch": batch, "context": context, "p": p}, by_p, 51)
    for tokens in (1024, 2048, 4096, 8192, 16384, 32768) if gpu else (64, 128, 256, 512):
        length = min(tokens, context)

        def by_tokens(tokens=tokens, length=length) -> dict:
            return run_layer("losia-pro-off", model, "block", tokens // length, length, device, dtype, Options())

        yield Job("scaling", "tokens", {**common, "tokens": tokens, "context": length}, by_tokens, 52)
    for layers in (2, 4, 8, 16) if gpu else (2, 4, 8):

        def by_layers(layers=layers) -> dict:
            run = Run("losia-pro", model, batch, context if gpu else 128, checkpointing=False)
            return run_model(run, device, dtype, num_hidden_layers=layers)

        yield Job("scaling", "layers", {**common, "batch": batch, "layers": layers}, by_layers, 53)
