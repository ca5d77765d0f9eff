"""Settings that cannot act in the run that they were given for: each is said once, with the reason."""

import math
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .data import Data
from .options import FinetuneOptions, set_by_user


class Idle(NamedTuple):
    """Options, or fields of the config file, that do nothing ``when``; ``why``."""

    names: tuple[str, ...]
    when: Callable[[FinetuneOptions, dict[str, Any]], bool]
    why: str


def _whole(options: FinetuneOptions) -> bool:
    return options.rank_factor == 1


def _nothing_moves(options: FinetuneOptions) -> bool:
    return options.moves == "none" or _whole(options) and options.output_dim_factor in (0, 1)


RULES = (
    Idle(("shape",), lambda o, c: _whole(o), "with rank_factor 1 a layer is trained whole"),
    Idle(
        ("alignment", "init_subnet", "moves", "period"),
        lambda o, c: o.moves != "none" and _nothing_moves(o),
        "with rank_factor 1 a layer is trained whole, there are no other places",
    ),
    Idle(("period",), lambda o, c: o.moves == "none", "with moves none subnets stay"),
    Idle(
        ("importance",),
        lambda o, c: o.moves != "importance",
        "subnets move by it with moves importance alone",
    ),
    Idle(
        ("warmup_ratio",),
        lambda o, c: o.lr_scheduler == "constant",
        "lr_scheduler constant has no warm-up, constant_with_warmup has",
    ),
    Idle(
        ("lr_scheduler_kwargs",),
        lambda o, c: o.lr_scheduler.startswith("constant"),
        "a constant rate takes none",
    ),
    Idle(
        ("master",),
        lambda o, c: o.master == "none" and o.dtype == "float32",
        "the weights are float32 already",
    ),
    Idle(
        (
            "eval_steps",
            "eval_delay",
            "eval_packing",
            "per_device_eval_batch_size",
            "bf16_full_eval",
            "fp16_full_eval",
            "metric_for_best_model",
            "greater_is_better",
        ),
        lambda o, c: not (o.eval_data or o.eval_fraction),
        "there is no eval_data and no eval_fraction",
    ),
    Idle(("eval_split",), lambda o, c: not o.eval_data, "there is no eval_data"),
    Idle(
        ("eval_steps",),
        lambda o, c: c.get("eval_strategy") == "epoch",
        "eval_strategy epoch evaluates once an epoch",
    ),
    Idle(
        ("save_steps",),
        lambda o, c: "save_strategy" in c and (c["save_strategy"] != "steps" or not o.save_steps),
        "save_strategy in the config file says when",
    ),
    Idle(
        ("save_total_limit",),
        lambda o, c: c.get("save_strategy", o.save_steps) in (0, False, "no"),
        "there are no checkpoints",
    ),
    Idle(("packing_strategy",), lambda o, c: not o.packing, "packing is off"),
    Idle(
        ("padding_free",),
        lambda o, c: o.packing and c.get("packing_strategy", "bfd") != "wrapped",
        "packed rows have no padding already",
    ),
    Idle(
        ("group_by_length",),
        lambda o, c: o.batch_size == 1 or bool(c.get("padding_free")),
        "there is no padding to spare",
    ),
    Idle(
        ("data_seed",),
        lambda o, c: o.group_by_length,
        "length groups are drawn by seed",
    ),
    Idle(
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        lambda o, c: not o.gradient_checkpointing,
        "gradient_checkpointing is off",
    ),
    Idle(
        ("liger_kernel_config",),
        lambda o, c: not c.get("use_liger_kernel"),
        "use_liger_kernel is off",
    ),
    Idle(
        ("hub_model_id", "hub_private_repo", "hub_revision"),
        lambda o, c: not c.get("push_to_hub"),
        "push_to_hub is off",
    ),
    Idle(
        ("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        lambda o, c: o.report_to == "none",
        "report_to is none",
    ),
    Idle(
        ("greater_is_better",),
        lambda o, c: not c.get("metric_for_best_model"),
        "it is about metric_for_best_model, which is not given",
    ),
)


def warn_idle(options: FinetuneOptions) -> None:
    """Say of each option and each field of the config file that was set whether the others leave it
    nothing to do."""
    config, given = options.config or {}, _given(options)
    for rule in RULES:
        idle = [name for name in rule.names if name in given]
        if idle and rule.when(options, config):
            _warn(f"{_list(idle)} cannot act: {rule.why}")
    if options.eval_data is not None and _place(options.eval_data) == _place(options.data):
        if Path(options.data).expanduser().is_file() or options.eval_split == options.data_split:
            _warn("eval_data is the data: the evaluation is of what is learned")


def warn_idle_in_run(options: FinetuneOptions, data: Data, steps: int, processes: int) -> None:
    """The same of what needs the data and the steps of the run to be known."""
    given, config = _given(options), options.config or {}
    for name, what in (("eval_steps", "evaluation"), ("save_steps", "checkpoint")):
        value, strategy = getattr(options, name), config.get(name.replace("steps", "strategy"))
        if name in given and value > steps and strategy in (None, "steps"):
            if name == "save_steps" or options.eval_data or options.eval_fraction:
                _warn(f"{name} {value} cannot act: the run has {steps} steps, {what} at the last")
    if "print_every" in given and options.print_every > steps:
        _warn(f"print_every {options.print_every} cannot act: the run has {steps} steps")
    rows, together = len(data.train), options.batch_size * processes
    batches = math.ceil(rows / together)
    if options.gradient_accumulation > batches:
        _warn(
            f"gradient_accumulation {options.gradient_accumulation} cannot act whole: "
            f"an epoch has {batches} batches"
        )
    if together > rows and "batch_size" in given:
        _warn(f"batch_size {options.batch_size} cannot act whole: there are {rows} samples")
    if options.samples > len(data.single):
        _warn(f"samples {options.samples} cannot act whole: there are {len(data.single)} to ask")
    needs = {
        "chat_template_path": ({"chat"}, "no row is a chat; it is saved with the model"),
        "assistant_only_loss": ({"chat"}, "no row is a chat"),
        "completion_only_loss": ({"prompt"}, "no row has a prompt and a completion of text"),
        "dataset_text_field": ({"text"}, "no row is a plain text"),
    }
    for name, (needed, why) in needs.items():
        if name in given and not needed & data.forms:
            _warn(f"{name} cannot act: {why}")


def _given(options: FinetuneOptions) -> set[str]:
    config = options.config or {}
    return set_by_user(options) | {name for name, value in config.items() if value is not None}


def _place(data: str) -> str:
    path = Path(data).expanduser()
    return str(path.resolve()) if path.exists() else data


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
