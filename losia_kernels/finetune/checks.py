"""Options held to their ranges and to each other, before anything is loaded."""

import math
import os
from dataclasses import fields
from itertools import groupby
from pathlib import Path

from .options import FinetuneOptions, InputError, set_by_user

# Of SFTConfig: what only an evaluation can do.
METRICS = ("eval_loss", "eval_mean_token_accuracy")


def check_options(options: FinetuneOptions) -> None:
    """Raises InputError for a value out of range, two that exclude each other, or one without which
    the run would be another than was asked for."""
    _check_names(options)
    _check_ranges(options)
    if not options.resume:  # which is held to the options of the first run, one by one
        _check_exclusive(options)
    if options.in_backward and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "in_backward would update before the gradients of several processes are averaged"
        )
    if options.in_backward and (options.gradient_accumulation > 1 or options.max_grad_norm > 0):
        raise InputError(
            "in_backward keeps no gradients: it needs gradient_accumulation 1 and max_grad_norm 0"
        )
    if options.master == "split" and options.dtype == "float32":
        raise InputError(
            "master split completes bfloat16 weights, the model's are float32: set dtype bfloat16"
        )
    _check_parts(options)
    _check_evaluation(options)
    options.losia_config()


def _check_names(options: FinetuneOptions) -> None:
    """Names that no file can have, or that ``run.json`` could not hold for ``--resume``."""
    for name in ("model", "data", "eval_data", "output"):
        value = getattr(options, name)
        if value is None:
            continue
        value = os.fspath(value)
        if not value.strip():
            raise InputError(f"{name} is empty")
        try:
            path = Path(value).expanduser()
            os.path.realpath(path).encode()
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            pass  # a name on the hub, or said with its neighbours
        except UnicodeEncodeError:
            raise InputError(f"{name} must be a name in UTF-8, got {ascii(value):.80}") from None
        except (OSError, RuntimeError, ValueError) as error:
            problem = getattr(error, "strerror", None) or error
            raise InputError(f"{name}: cannot look at {value:.80}: {problem}") from None


def _check_ranges(options: FinetuneOptions) -> None:
    whole = (
        "batch_size",
        "gradient_accumulation",
        "max_length",
        "eval_steps",
        "print_every",
        "steps",
        "alignment",
    )
    for name in whole:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if options.save_steps < 0:
        raise InputError(
            f"save_steps must be at least 0 (0: no checkpoints), got {options.save_steps}"
        )
    if not (options.lr > 0 and math.isfinite(options.lr)):
        raise InputError(f"lr must be positive, got {options.lr}")
    if not 0 <= options.warmup_ratio < 1:
        raise InputError(f"warmup_ratio must be in [0, 1), got {options.warmup_ratio}")
    if options.steps is None and not 0 < options.epochs < math.inf:
        raise InputError(f"epochs must be positive, got {options.epochs}")
    for name in ("weight_decay", "max_grad_norm"):
        if not 0 <= getattr(options, name) < math.inf:
            raise InputError(f"{name} must be at least 0, got {getattr(options, name)}")
    if not 0 <= options.seed < 2**32:
        raise InputError(f"seed must be in [0, 2**32), got {options.seed}")
    if not 0 <= options.eval_fraction < 1:
        raise InputError(f"eval_fraction must be in [0, 1), got {options.eval_fraction}")
    if options.samples < 0:
        raise InputError(f"samples must be at least 0, got {options.samples}")


def _check_exclusive(options: FinetuneOptions) -> None:
    given = set_by_user(options)
    for why, rivals in groupby(fields(options), lambda field: field.metadata["exclusive"]):
        names = [field.name for field in rivals if field.name in given]
        if why and len(names) > 1:
            raise InputError(f"{' and '.join(names)} exclude each other: {why}")
    order = (options.config or {}).get("train_sampling_strategy")
    if options.group_by_length and order is not None:
        raise InputError(
            f"group_by_length and config: train_sampling_strategy {order} exclude each other: one order of the data"
        )
    if order == "group_by_length":
        raise InputError("config: train_sampling_strategy: give the option group_by_length")


def _check_parts(options: FinetuneOptions) -> None:
    """A file has no parts: it would be read whole where a part was asked for."""
    for data, parts in (
        (options.data, ("data_split", "data_config")),
        (options.eval_data, ("eval_split",)),
    ):
        asked = [name for name in parts if name in set_by_user(options)]
        if asked and data is not None and Path(data).expanduser().is_file():
            raise InputError(
                f"{asked[0]} {getattr(options, asked[0])} is for folders and the hub: {data} is one file"
            )


def _check_evaluation(options: FinetuneOptions) -> None:
    """What TRL would say of evaluations when the model is loaded, or after steps."""
    config, has_data = options.config or {}, bool(options.eval_data or options.eval_fraction)
    needing = [
        name
        for name in ("eval_strategy", "eval_on_start", "load_best_model_at_end")
        if config.get(name) not in (None, False, "no")
    ]
    if needing and not has_data:
        raise InputError(f"config: {needing[0]} needs eval_data or eval_fraction")
    if has_data and config.get("eval_strategy", "steps") in ("no", False):  # YAML's "no" is False
        raise InputError("config: eval_strategy no leaves eval_data or eval_fraction without a use")
    metric = config.get("metric_for_best_model")
    if metric is not None and f"eval_{str(metric).removeprefix('eval_')}" not in METRICS:
        raise InputError(
            f"config: metric_for_best_model must be one of {', '.join(METRICS)}, got {metric!r}"
        )
