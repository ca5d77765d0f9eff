"""What a run shows while it trains: a line on the terminal, a log file of JSON lines, the loss
curve as a picture."""

import math
import time
import warnings
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import psutil
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from ..integrations.history import append_log, read_log, rewind_log
from ..integrations.transformers import losia_timeline
from ..training.timeline import Timeline
from .data import IGNORE, flat, lengths
from .options import FinetuneOptions

WINDOW = 0.1  # of the run so far: how much the loss curve's moving average looks back over


class ProgressCallback(TrainerCallback):
    """Says what runs, then writes every step to ``log.jsonl`` and every ``print_every`` steps to the
    terminal; needs ``logging_steps=1``.

    The log has ``{"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gib",
    "seconds", "observing"}`` for each step, ``{"step", "relocalized"}`` after one that moved
    subnets, ``{"step", "eval_loss", "eval_accuracy"}``, both of learned tokens. Times are of this
    process; memory is the GPU's peak, without a GPU the process's resident size.
    """

    def __init__(self, folder: Path, options: FinetuneOptions, train_data: Dataset):
        self.log_path, self.picture_path = folder / "log.jsonl", folder / "loss_curve.png"
        self.options, self.train_data = options, train_data

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.timeline = losia_timeline(optimizer)
        text = describe_run(self.options, self.train_data, model, self.timeline, args)
        print(text, flush=True)
        rewind_log(self.log_path, state.global_step)
        self.first_step, self.started = state.global_step, math.nan
        self.tokens_seen = state.num_input_tokens_seen

    def on_step_begin(self, args, state, control, **kwargs):
        if math.isnan(self.started):  # calibration is over: it says nothing of the steps to come
            self.started = self.step_started = time.perf_counter()
        timeline = self.timeline
        self.observing = [timeline.group_names[group] for group in timeline.observing]
        self.moving = [
            timeline.group_names[group] for group in timeline.schedule.moving(timeline.step)
        ]

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "eval_loss" in logs:
            loss, accuracy = logs["eval_loss"], logs["eval_mean_token_accuracy"]
            self._write({"step": state.global_step, "eval_loss": loss, "eval_accuracy": accuracy})
            print(
                f"step {state.global_step}/{state.max_steps}  eval loss {loss:.4f}  "
                f"{100 * accuracy:.1f} % of learned tokens right",
                flush=True,
            )
        if "loss" not in logs:
            return
        now = time.perf_counter()
        entry = {
            "step": state.global_step,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": (state.num_input_tokens_seen - self.tokens_seen)
            / (now - self.step_started),
            "memory_gib": memory_gib(),
            "seconds": now - self.started,
            "observing": self.observing,
        }
        self.step_started, self.tokens_seen = now, state.num_input_tokens_seen
        self._write(entry)
        if self.moving:
            self._write({"step": state.global_step, "relocalized": self.moving})
        if (
            state.global_step % self.options.print_every == 0
            or state.global_step == state.max_steps
        ):
            print(self._line(entry, state), flush=True)
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"the loss is {logs['loss']} at step {state.global_step}: try a lower lr"
            )

    def on_evaluate(self, args, state, control, **kwargs):
        self.step_started = time.perf_counter()  # the next step's speed is without the evaluation

    def on_save(self, args, state, control, **kwargs):
        self.draw()
        self.step_started = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self.draw()

    def draw(self) -> None:
        """The loss curve. A run does not end for want of a picture: why there is none is said."""
        try:
            draw_loss_curve(self.log_path, self.picture_path)
        except Exception as error:  # of the disk, or of a library that draws
            warnings.warn(f"cannot draw {self.picture_path}: {error}", stacklevel=2)

    def _line(self, entry: dict, state) -> str:
        done = state.global_step - self.first_step
        left = entry["seconds"] / done * (state.max_steps - state.global_step)
        return (
            f"step {entry['step']}/{state.max_steps}  loss {entry['loss']:.4f}  lr {entry['learning_rate']:.2e}  "
            f"{entry['tokens_per_second']:,.0f} tokens/s  {entry['memory_gib']:.2f} GiB  left {_clock(left)}"
            + (f"  observing {', '.join(entry['observing'])}" if entry["observing"] else "")
        )

    def _write(self, entry: dict) -> None:
        append_log(self.log_path, [entry])


def describe_run(
    options: FinetuneOptions,
    train_data: Dataset,
    model: PreTrainedModel,
    timeline: Timeline,
    arguments: TrainingArguments,
) -> str:
    """What is about to run: the model, the data, what of the model is trained, for how long."""
    layers = [layer for layers in [*timeline.groups, timeline.dense] for layer in layers]
    config, groups, steps = timeline.config, len(timeline.groups), arguments.max_steps
    values = sum(layer.subnet.numel() for layer in layers)
    total = model.num_parameters() - values
    tokens, learned = lengths(train_data).sum(), (flat(train_data, "labels") != IGNORE).sum()
    auto = " (auto)" if options.period == "auto" else ""
    cycles = f"period {config.period} steps{auto}, {steps / (groups * config.period):.1f} cycles"
    scales = [timeline.scale_of(layer) for group in timeline.groups for layer in group]
    rates = [f"{options.lr * scale:.2g}" for scale in (min(scales), max(scales))]
    of_subnets = (
        f" ({' to '.join(dict.fromkeys(rates))} of the subnets)" if config.scales_lr else ""
    )
    many = arguments.world_size > 1
    each = f" on each of {arguments.world_size} processes" if many else ""
    return "\n".join(
        [
            f"model  {options.model}: {total / 1e6:,.1f}M values, {model.dtype} on {arguments.device}",
            f"data   {options.data}: {len(train_data):,} {'packed rows' if options.packing else 'samples'}, "
            f"{tokens:,} tokens, {learned:,} learned",
            f"LoSiA  {len(layers)} layers in {groups} groups, {values:,} trained values "
            f"({100 * values / total:.2f} %); {'no moves' if config.moves == 'none' else cycles}",
            f"run    {steps} steps of {options.batch_size} x {options.gradient_accumulation} samples{each}, "
            f"lr {options.lr:g}{of_subnets} {options.lr_scheduler}, {config.warmup_steps} steps of warm-up",
        ]
    )


def memory_gib() -> float:
    """Peak memory of the GPU's tensors in GiB; without a GPU, the resident size of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def draw_loss_curve(log_path: Path, picture_path: Path) -> None:
    """Loss by step with its moving average, evaluation losses, and a mark where subnets moved."""
    entries = read_log(log_path)
    losses = [(entry["step"], entry["loss"]) for entry in entries if _is_number(entry, "loss")]
    if not losses:
        return
    steps, values = zip(*losses, strict=True)
    window = max(1, round(WINDOW * len(values)))
    smooth = moving_average(values, window)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color="C0", alpha=0.35, linewidth=1, label="loss of the step")
    axes.plot(steps, smooth, color="C0", label="moving average")
    evaluated = [
        (entry["step"], entry["eval_loss"]) for entry in entries if _is_number(entry, "eval_loss")
    ]
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", color="C1", label="evaluation loss")
    moves = [entry["step"] for entry in entries if "relocalized" in entry]
    if moves:
        axes.plot(
            moves,
            [0.01] * len(moves),
            "|",
            color="0.4",
            markersize=9,
            transform=axes.get_xaxis_transform(),
            label="subnets moved",
        )
    axes.set(
        xlabel="optimizer step",
        ylabel="loss (nats per learned token)",
        title="Loss while training",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right")
    figure.savefig(picture_path, dpi=120)


def _is_number(entry: dict, key: str) -> bool:
    return isinstance(entry.get(key), (int, float))


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Of each value and the ``window - 1`` before it, or as many as there are."""
    sums = [0.0, *accumulate(values)]
    starts = [max(0, last - window) for last in range(1, len(sums))]
    return [
        (sums[last] - sums[start]) / (last - start) for last, start in enumerate(starts, start=1)
    ]
