"""A whole causal LM: forward, backward and update in microseconds a token, and the peak of a step.

Random weights from the config, random tokens, loss over all positions, SDPA attention, no KV cache."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from losia_kernels import CapturedBackward
from losia_kernels.finetune.estimate import estimate

from ..harness.gates import Reference
from ..harness.jobs import Job, free_memory
from ..harness.live_bytes import peak_bytes
from ..harness.timing import measure
from ..methods import DEFAULTS, LATE, MODEL_METHODS, Options, Prepared, get_method
from .layer import run_step
from .memory import SETTINGS, Setting
from .models import GPU_BATCH, GPU_CONTEXT, build_model, name_of, shape_of

GATE_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Run:
    method: str
    model: str
    batch: int
    context: int
    checkpointing: bool
    options: Options = DEFAULTS

    def settings(self, dtype: torch.dtype) -> dict[str, Any]:
        values = {key: getattr(self, key) for key in ("model", "batch", "context", "checkpointing")}
        values |= {key: getattr(self.options, key) for key in get_method(self.method).options}
        return {**values, "dtype": name_of(dtype)}


def setting_of(run: Run) -> Setting | None:
    if run.method not in SETTINGS:
        return None
    sizes = {key: getattr(run, key) for key in ("batch", "context", "checkpointing")}
    sizes |= {key: getattr(run.options, key) for key in get_method(run.method).options}
    return dataclasses.replace(SETTINGS[run.method], **sizes)


def predicted_bytes(run: Run, dtype: torch.dtype) -> int | None:
    """What the memory model says; None for a method or dtype that it does not know."""
    setting = setting_of(run) if dtype.itemsize == 2 else None
    return setting and estimate(shape_of(run.model), setting).total


def tokens_of(run: Run, vocabulary: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(2)
    return torch.randint(vocabulary, (run.batch, run.context), generator=generator, device=device)


def prepare(run: Run, model: nn.Module) -> Prepared:
    prepared = get_method(run.method).prepare(model, run.options)
    if run.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return prepared


def step_phases(prepared: Prepared, ids: Tensor) -> dict:
    state: dict[str, Tensor] = {}
    if prepared.captured and prepared.optimizer is not None:
        replay = CapturedBackward(
            lambda ids: prepared.module(input_ids=ids, labels=ids).loss, prepared.optimizer
        )
        phases = {"forward": lambda number: None, "backward": lambda number: replay(ids)}  # both
        return {**phases, "other": lambda number: prepared.update()}

    def forward(number: int) -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=prepared.autocast):
            state["loss"] = prepared.module(input_ids=ids, labels=ids).loss

    def backward(number: int) -> None:
        state.pop("loss").backward()

    return {"forward": forward, "backward": backward, "other": lambda number: prepared.update()}


def gate(run: Run, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Two blocks of the model at its own widths against dense autograd: dx of the embeddings, subnet gradients."""
    model = build_model(run.model, device, dtype, num_hidden_layers=2, vocab_size=512)
    embeddings = torch.randn(1, GATE_TOKENS, model.config.hidden_size, device=device)
    ids = tokens_of(dataclasses.replace(run, batch=1, context=GATE_TOKENS), 512, device)

    def backward(module: nn.Module) -> Tensor:
        x = embeddings.detach().clone().to(next(module.parameters()).dtype).requires_grad_()
        # The loss is a mean over tokens: scaled up, so that the gate's absolute slack is small
        # beside the gradients.
        (GATE_TOKENS * module(inputs_embeds=x, labels=ids).loss).backward()
        return x.grad

    model.eval()
    reference = Reference(model, backward)
    prepared = prepare(dataclasses.replace(run, checkpointing=False), model)
    return reference.check(prepared, get_method(run.method).exact)


def run_model(run: Run, device: torch.device, dtype: torch.dtype, **changes: Any) -> dict[str, Any]:
    """The row of one method on one model; ``changes`` to the model's config, such as fewer layers."""
    torch.manual_seed(0)
    passed = gate(run, device, dtype)
    free_memory()
    on_gpu = device.type == "cuda"
    model = build_model(run.model, device, dtype, **changes)
    prepared = prepare(run, model)
    ids = tokens_of(run, model.config.vocab_size, device)
    phases = step_phases(prepared, ids)
    run_step(phases)  # makes the optimizer's state
    # on a CPU the peak is counted above a step's start, without weights and state
    before = torch.cuda.memory_allocated() if on_gpu else 0
    peak = peak_bytes(lambda: run_step(phases), device) + before
    timings = measure(phases, device, seconds=3.0, repeats=None if on_gpu else 5, warmup=1)
    row = {"gate": passed, "trained": prepared.trained, "peak_bytes": peak}
    row |= {phase: timing.to_dict() for phase, timing in timings.items()}
    row["us_per_token"] = {name: 1e3 * each.ms / ids.numel() for name, each in timings.items()}
    predicted = {"predicted_bytes": predicted_bytes(run, dtype)} if on_gpu and not changes else {}
    return {**row, **predicted}


def _runs(device: torch.device) -> Iterator[tuple[float, Run]]:
    """(priority, run), most telling first."""
    ranked = [(rank / 100, method) for rank, method in enumerate(MODEL_METHODS)]
    if device.type != "cuda":
        yield from ((20 + rank, Run(each, "smollm2-135m", 1, 128, False)) for rank, each in ranked)
        return
    for rank, method in ranked:  # bound by the host without a graph
        if method in ("frozen", "losia-pro", "losia-pro-captured"):
            yield 21.5 + rank, Run(method, "smollm2-135m", GPU_BATCH, GPU_CONTEXT, False)
    llama = ("llama-2-7b", GPU_BATCH, GPU_CONTEXT)
    for (rank, method), checkpointing in itertools.product(ranked, (True, False)):
        priority = 20 + (not checkpointing) + rank + (20 if method in LATE else 0)
        yield priority, Run(method, *llama, checkpointing)
    for p_o, p in itertools.product((1 / 8, 1.0), (1 / 8, 1 / 16, 1 / 4, 1 / 2)):
        yield 45, Run("losia-pro", *llama, True, Options(p, p_o))
    for r, method in itertools.product((16, 256, 1024), ("lora", "lora-fp32")):
        yield 46, Run(method, *llama, True, Options(rank=r))
    for model, (rank, method) in itertools.product(("gemma-2b", "llama-2-13b"), ranked):
        if method not in LATE:
            yield 72 + rank, Run(method, model, GPU_BATCH, GPU_CONTEXT, True)


def jobs(device: torch.device, dtype: torch.dtype) -> Iterator[Job]:
    for priority, run in _runs(device):
        measured = functools.partial(run_model, run, device, dtype)
        yield Job("model", run.method, run.settings(dtype), measured, priority, seconds=40)
