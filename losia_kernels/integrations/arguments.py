"""The optimizer that a Trainer's arguments ask for, made when they are known."""

import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ..training.attach import attach
from ..training.optimizer import LoSiAAdamW
from ..training.timeline import Timeline

ADAMW = ("adamw_torch", "adamw_torch_fused")  # LoSiAAdamW takes their place
WHOLE_WEIGHTS = ("galore", "apollo", "lomo", "adalomo")  # families of optimizers by what they train


def create_optimizer(
    trainer: Trainer,
    create: Callable[..., torch.optim.Optimizer],
    model: nn.Module | None,
    factory: Any,
    options: dict[str, Any],
) -> torch.optim.Optimizer:
    """The Trainer's optimizer, made by ``create``, its own method, if it has none yet; one that
    drives the subnets.

    Args:
        model: the wrapped one where the Trainer makes the optimizer after it.
        factory: what ``optimizer_cls_and_kwargs`` takes for a LoSiAAdamW.
        options: for it, over the Trainer's arguments.

    Raises:
        ValueError: ``options`` without a LoSiAAdamW to take them, an ``optim`` of whole weights, or
            an optimizer that ``attach`` refuses.
    """
    optim = _optim(trainer.args)
    given = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
    ours = not given and optim in ADAMW
    if not given and not ours:
        check_options(options, f"optim={optim!r}")
        if optim.startswith(WHOLE_WEIGHTS):
            raise ValueError(
                f"optim={optim!r} is for whole weights, of which LoSiA trains subnets: choose another, such as "
                f"'adamw_torch'"
            )
    if ours:
        trainer.optimizer_cls_and_kwargs = factory, {**_adamw_options(trainer.args), **options}
    try:
        optimizer = create() if model is None else create(model)
    finally:
        if ours:  # the arguments may be others the next time
            trainer.optimizer_cls_and_kwargs = None
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if not isinstance(getattr(inner, "timeline", None), Timeline):
        attach(inner, trainer.model if model is None else model)
    elif ours:
        _spare_from_decay(inner)
    return optimizer


def check_options(options: dict[str, Any], chosen_by: str) -> None:
    """Raise ValueError for options of LoSiAAdamW where something else chooses the optimizer."""
    if options:
        raise ValueError(
            f"LoSiACallback: {', '.join(options)} would have no effect, for {chosen_by} chooses the Trainer's "
            f"optimizer: give them there, or leave that out"
        )


def _adamw_options(args: TrainingArguments) -> dict[str, Any]:
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }


def _optim(args: TrainingArguments) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _spare_from_decay(optimizer: LoSiAAdamW) -> None:
    """Biases and norms that are trained in full do not decay, as the Trainer has it."""
    for group in optimizer.param_groups[len(optimizer.timeline.groups) :]:
        spared = [parameter for parameter in group["params"] if parameter.ndim < 2]
        if spared and group["weight_decay"]:
            group["params"] = [parameter for parameter in group["params"] if parameter.ndim >= 2]
            optimizer.add_param_group({**group, "params": spared, "weight_decay": 0.0})


def warn_of_idle_arguments(args: TrainingArguments, optimizer: torch.optim.Optimizer) -> None:
    """Warn of a Trainer's arguments that were set and are not what the optimizer has: it was given
    others, or they came with a checkpoint."""
    if not isinstance(optimizer, LoSiAAdamW):
        return
    default = {field.name: field.default for field in fields(args)}
    group = optimizer.param_groups[0]
    rate = float(group.get("initial_lr", group["lr"]))
    has = {
        "learning_rate": rate,
        "adam_beta1": group["betas"][0],
        "adam_beta2": group["betas"][1],
        "adam_epsilon": group["eps"],
        "weight_decay": group["weight_decay"],
    }
    optim = _optim(args)
    idle = [
        f"{name}={getattr(args, name)!r} (it has {value!r})"
        for name, value in has.items()
        if getattr(args, name) not in (value, default[name])
    ]
    if optim not in ADAMW:
        idle.append(f"optim={optim!r} (it is LoSiAAdamW)")
    if idle:
        warnings.warn(
            f"LoSiA: without effect on the optimizer, which was given other values or loaded them with a checkpoint: "
            f"{', '.join(idle)}. Without optimizer_cls_and_kwargs, LoSiACallback makes it from these arguments",
            stacklevel=2,
        )
