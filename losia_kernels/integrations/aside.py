"""Training steps of a Trainer on the side: what they teach is kept, what they leave in the Trainer
is put back."""

import copy
import math
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Trainer

from ..layers.module import losia_layers
from ..parallel.placement import local
from ..parallel.ranks import Ranks
from ..training.calibrate import calibrate
from ..training.selection import NonFiniteScoreError

TrainingStep = Callable[..., Tensor]  # Trainer.training_step, bound
OWN_ITEMS = "num_items_in_batch"  # which some of TRL's trainers keep in the prepared micro-batch


class Scaling(NamedTuple):
    """What a Trainer divides the mean loss of a micro-batch by: the items (learned tokens) of the
    whole accumulated batch over its own, the number of micro-batches, both, or neither."""

    by_items: bool = False
    by_steps: bool = False

    def divisor(self, trainer: Trainer, inputs: Any, items: Any) -> float:
        """Of this micro-batch; ``items`` is what the Trainer hands to its loss."""
        divisor = float(trainer.current_gradient_accumulation_steps) if self.by_steps else 1.0
        own = count_items(trainer, inputs) if self.by_items and items is not None else None
        if own is not None:
            divisor *= max(1.0, float(items)) / max(1.0, float(own))
        return divisor


def count_items(trainer: Trainer, inputs: Any) -> Any:
    """What the Trainer would hand to its loss if this micro-batch were the whole batch."""
    return trainer._get_num_items_in_batch([inputs], trainer.args.device)


def find_scaling(
    trainer: Trainer, step: TrainingStep, inputs: Any, items: Any, steps: int, ranks: Ranks
) -> Scaling | None:
    """How the Trainer scales its losses, seen in the gradients: told of twice the items, or of
    twice the micro-batches, they halve where it divides by them.

    Three backwards, with the same dropout; nothing observes them. None where the gradient is zero
    or not finite: then this micro-batch does not tell. A ratio that is neither is warned about.

    Args:
        step: the Trainer's training_step.
        inputs, items, steps: a micro-batch as the dataloader has it, and what the Trainer knows of
            the batch that it is part of.
    """
    model = trainer.model
    with _aside(trainer), _unobserved(model):
        model.train()
        prepared = trainer._prepare_inputs(inputs)  # once: trainers that generate do it here

        def norm(items: Any, steps: int, own_items: int = 1) -> float:
            def as_prepared(_: Any) -> Any:
                if not isinstance(prepared, Mapping) or prepared.get(OWN_ITEMS) is None:
                    return copy.copy(prepared)
                return {**prepared, OWN_ITEMS: own_items * prepared[OWN_ITEMS]}

            trainer._prepare_inputs = as_prepared
            trainer.current_gradient_accumulation_steps = steps
            with same_random_state(trainer.args.device):
                step(model, inputs, items)
            return _take_gradient_norm(model, ranks)

        try:
            once = norm(items, steps)
            with_items = once if items is None else norm(2 * items, steps)
            with_steps = norm(items, 2 * steps, own_items=2)
        finally:
            del trainer._prepare_inputs
    if not all(0 < seen < math.inf for seen in (once, with_items, with_steps)):
        return None
    answers = [math.log2(once / with_items), math.log2(once / with_steps)]
    if any(min(abs(answer - whole) for whole in (0, 1, 2)) > 0.2 for answer in answers):
        warnings.warn(
            f"LoSiA: how {type(trainer).__name__} scales its loss cannot be told: its gradient "
            f"shrinks to {with_items / once:.2f} with twice the items, to {with_steps / once:.2f} "
            f"with twice the micro-batches. Give LoSiACallback loss_divisor=, what the mean loss "
            f"of a micro-batch is divided by",
            stacklevel=2,
        )
    return Scaling(*(answer > 0.5 for answer in answers))


def calibrate_aside(
    trainer: Trainer, step: TrainingStep, batches: list, scale: float, show_progress: bool
) -> None:
    """``calibrate`` by the Trainer's own training step, each batch as if it were a whole one.

    In float16 with the largest scale, from ``scale`` down, that does not overflow.

    Args:
        step: the Trainer's training_step.
        scale: of accelerate's GradScaler; 1 without one.
        show_progress: a bar on stderr.
    """
    scaler: Any = trainer.accelerator.scaler

    def backward(model: nn.Module, batch: Any) -> None:
        trainer.current_gradient_accumulation_steps = 1
        step(model, copy.copy(batch), count_items(trainer, batch))

    tried = scale
    try:
        while True:
            try:
                with _aside(trainer):
                    loss_divisor = 1 / tried
                    shown = _with_bar(batches, "placing the first subnets", show_progress)
                    calibrate(trainer.model, shown, len(batches), backward, None, loss_divisor)
                return
            except NonFiniteScoreError:
                if tried <= 1:
                    raise
                tried = max(1.0, tried / 16)
                scaler.update(tried)
    finally:
        if tried != scale:
            scaler.update(scale)


@contextmanager
def same_random_state(device: torch.device) -> Iterator[None]:
    """What is drawn inside is not missed outside: a resumed run, which does not look ahead, sees
    the same order."""
    state = random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(state)


@contextmanager
def _aside(trainer: Trainer) -> Iterator[None]:
    """Steps inside count nothing in the Trainer: TRL's keep metrics, generations and their own
    step."""
    kept = {
        name: value
        for name, value in vars(trainer).items()
        if "dataset" not in name and _is_plain(value)
    }
    kept["state"] = trainer.state
    for name, value in kept.items():
        copied = copy.copy(value) if name == "state" else copy.deepcopy(value)
        setattr(trainer, name, copied)
    try:
        with same_random_state(trainer.args.device):
            yield
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, deque)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


@contextmanager
def _unobserved(model: nn.Module) -> Iterator[None]:
    before = {layer: layer.observe_callback for _, layer in losia_layers(model)}
    for layer in before:
        layer.observe_(None)
    try:
        yield
    finally:
        for layer, callback in before.items():
            layer.observe_(callback)


def _take_gradient_norm(model: nn.Module, ranks: Ranks) -> float:
    total = torch.zeros((), dtype=torch.float64)
    for parameter in model.parameters():
        if parameter.grad is not None:
            norm = torch.linalg.vector_norm(local(parameter.grad), dtype=torch.float64)
            total += norm.square().cpu()
            parameter.grad = None
    if ranks.size > 1:
        total = total.to(next(model.parameters()).device)
        ranks.all_reduce_([total])
    return math.sqrt(float(total))


def _with_bar(batches: list, doing: str, show: bool) -> Iterator[Any]:
    """The batches, each counted when it is done with, the last one too if no more is asked for."""
    with tqdm(total=len(batches), desc=doing, unit="batch", disable=not show) as bar:
        for batch in batches:
            try:
                yield batch
            finally:
                bar.update()
