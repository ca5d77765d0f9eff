"""Carry out one run: train, score, say what it took."""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losia_kernels.training.importance import OBSERVERS
from losia_kernels.training.optimizer import LoSiAAdamW

from ..methods import STUDY, Options, Prepared
from ..methods.base import count, trained_parameters
from .evaluate import score_items, summary
from .items import Item, batches, fingerprint
from .study import SCALES, Run
from .tasks import TASKS, Task, english

WARMUP = 0.1  # share of the steps, as in the paper; then the rate falls to zero on a line
CURVE_POINTS = 60
SCORED_ENGLISH = max(scale.other_text for scale in SCALES.values())


@dataclass
class Base:
    """The pretrained model, copied for each run."""

    model: nn.Module
    tokenizer: Any

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "Base":
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        return cls(model, AutoTokenizer.from_pretrained(folder))

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.model)


class Diverged(Exception):
    """The loss is not finite."""


def schedule(step: int, steps: int, warmup: int) -> float:
    """What the learning rate is multiplied with in ``step``, which counts from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(1, steps - warmup)


def options_of(run: Run, task: Task, base: Base) -> Options:
    scale, device, splits = SCALES[run.scale], base.model.device, task.splits
    items = [i for i in splits.train if len(i.prompt) + len(i.completion) < scale.longest]
    sizes = scale.batch, run.steps, run.seed, task.max_length
    made: dict[str, Any] = {"batches": lambda: batches(items, base.tokenizer, *sizes, device)}
    made["generic"] = lambda: generic_batches(base, scale.batch)
    warmup = max(1, int(WARMUP * run.steps))
    return Options(lr=run.lr, seed=run.seed, steps=run.steps, warmup=warmup, **made)


def generic_batches(base: Base, size: int) -> Iterator[dict[str, Tensor]]:
    """Of English that no score is of."""
    items = english(2 * SCORED_ENGLISH)[SCORED_ENGLISH:]
    steps = max(1, len(items) // size)
    return batches(items, base.tokenizer, size, steps, 0, 128, base.model.device)


def prepare(run: Run, task: Task, model: nn.Module, base: Base) -> tuple[Prepared, Options]:
    options = options_of(run, task, base)
    return STUDY[run.method].prepare(model, options), options


def train(
    trained: Prepared, options: Options, after_step: Callable[[int], None] = lambda step: None
) -> dict[str, Any]:
    """All steps; the losses and the seconds. Raises Diverged."""

    def rate(step: int) -> float:  # after the last step it is asked for once more
        return schedule(min(step, options.steps), options.steps, options.warmup)

    scheduler = torch.optim.lr_scheduler.LambdaLR(trained.optimizer, rate)
    trained.module.train()
    losses, seconds = [], []
    for step, batch in enumerate(options.batches()):
        started = time.perf_counter()
        loss = trained.module(**batch).loss
        loss.backward()
        trained.optimizer.step()
        scheduler.step()
        trained.optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
        if not math.isfinite(losses[-1]):
            raise Diverged(f"the loss is {losses[-1]} in step {step}")
        after_step(step)
    return {"losses": losses, "seconds": seconds}


def thinned(losses: list[float]) -> list[list[float]]:
    """At most CURVE_POINTS of ``[last step of a stretch, its mean loss]``."""
    length = math.ceil(len(losses) / CURVE_POINTS)
    stretches = [(start, losses[start : start + length]) for start in range(0, len(losses), length)]
    return [[start + len(part) - 1, round(sum(part) / len(part), 4)] for start, part in stretches]


def held_out(task: Task, few: bool) -> list[Item]:
    return task.splits.held_out[: task.few] if few else task.splits.held_out


def score(model: nn.Module, base: Base, task: Task, run: Run) -> dict[str, Any]:
    """What the run is for: the search split alone, or the held-out items and what was lost on other text."""

    def scored(items: list[Item], longest: int = 192):
        return score_items(model, base.tokenizer, items, longest)

    scores = {}
    if run.kind in ("search", "untrained"):
        items = task.splits.search
        scores["search"] = summary(items, scored(items, task.max_length))
    if run.kind == "search":
        scores["english"] = summary(text := english()[: SCALES[run.scale].other_text], scored(text))
        return {"scores": scores, "items": fingerprint(items)}
    items = held_out(task, SCALES[run.scale].few)
    found = scored(items, task.max_length)
    scores["held_out"] = summary(items, found)
    amount, others = SCALES[run.scale].other_text, []
    for name, text in (("english", english()), ("code", TASKS["code"].splits.held_out)):
        if name != task.name:
            others += text[:amount]
            scores[name] = summary(text[:amount], scored(text[:amount]))
    groups = itertools.groupby(item.group for item in items)
    prints = {"items": fingerprint(items), "other_items": fingerprint(others)}
    each = [[round(s.nll, 3), s.tokens, s.hits, s.right, s.lines] for s in found]
    counts = [[name, len(list(members))] for name, members in groups]
    return {"scores": scores, **prints, "each": each, "groups": counts}


def memory(trained: Prepared) -> dict[str, int]:
    """Bytes that the method adds to the weights, counted from its tensors: they are the same on every machine."""
    parameters, optimizer = trained_parameters(trained.module), trained.optimizer
    values = [value for values in optimizer.state.values() for value in values.values()]
    # GaLore's projection
    values += [value.ortho_matrix for value in values if hasattr(value, "ortho_matrix")]
    counted = {
        "trained_values": count(parameters),
        "gradient_bytes": sum(p.nbytes for p in parameters),
        "optimizer_bytes": sum(value.nbytes for value in values if isinstance(value, Tensor)),
    }
    if isinstance(optimizer, LoSiAAdamW) and optimizer.timeline.config.moves == "importance":
        timeline = optimizer.timeline
        sizes = (sum(layer.weight.numel() for layer in layers) for layers in timeline.groups)
        each = OBSERVERS[timeline.config.importance].bytes_per_weight
        counted["observing_bytes"] = each * max(sizes)
    if torch.cuda.is_available():
        counted["peak_bytes"] = torch.cuda.max_memory_allocated()
    return counted


def carry_out(run: Run, base: Base) -> dict[str, Any]:
    """The result of a resolved run of one task. A run that diverges is a result, with status "diverged"."""
    task = TASKS[run.task]
    result: dict[str, Any] = {"run": asdict(run), "status": "ok"}
    started = time.perf_counter()
    model = base.fresh()
    if run.kind == "untrained":
        return result | score(model, base, task, run)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trained, options = prepare(run, task, model, base)
    prepared = time.perf_counter()
    try:
        progress = train(trained, options)
    except Diverged as error:
        return result | {"status": "diverged", "reason": str(error)}
    result["curve"] = thinned(progress["losses"])
    result |= {"memory": memory(trained), "made": trained.made}
    after = time.perf_counter()
    if run.kind != "timing":
        result |= score(trained.finish().float(), base, task, run)
    ended, steady = time.perf_counter(), sorted(progress["seconds"][2:])
    spent = {"prepare": prepared - started, "train": after - prepared, "score": ended - after}
    seconds = {name: round(value, 2) for name, value in spent.items()}
    step = round(steady[len(steady) // 2], 4) if steady else None
    return result | {"seconds": seconds | {"step": step}}
