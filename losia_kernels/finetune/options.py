"""What a fine-tuning run can be told, each option once: its default, and what the command line says
of it.

Free of heavy imports, so that the command line can ask for help at once.
"""

import argparse
import math
import os
import warnings
from dataclasses import MISSING, dataclass, field
from fractions import Fraction
from typing import Any, Literal

from ..config import IMPORTANCES, LoSiAConfig
from ..training.adam_state import MOMENTS

# Of ``losia-kernels plot``.
PICTURES = ("loss", "timeline", "subnets", "frequency", "gradients", "singular_vectors")


class InputError(ValueError):
    """A mistake in the user's input that one line can say: the command line prints it and exits
    with code 2."""


def parse_fraction(text: str) -> float:
    """A number, or a fraction such as 1/8."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"expected a number or a fraction such as 1/8, got {text!r}"
        ) from None


def parse_period(text: str) -> int | str:
    """A number of steps, or "auto"."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number of steps or 'auto', got {text!r}"
        ) from None


def option(
    group: str, help: str, default: Any = MISSING, exclusive: bool = False, **argument: Any
) -> Any:
    """A field that is an option of the command line too.

    ``group``: under which heading its help stands; of those that are ``exclusive`` there, one may
    be given. ``argument``: what else argparse's ``add_argument`` takes; without a default the
    option is required, and a number's type is its default's.
    """
    if default is MISSING:
        argument["required"] = True
    else:
        argument["default"] = default
    if default is False:
        argument["action"] = "store_true"
    elif isinstance(default, (int, float)):
        argument.setdefault("type", type(default))
    metadata = {"group": group, "exclusive": exclusive, "argument": {"help": help, **argument}}
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class FinetuneOptions:
    """Everything ``finetune`` can be told; ``losia-kernels finetune --help`` says what each is and
    its unit."""

    model: str = option("model and data", "a local folder or a name on the hub")
    data: str = option(
        "model and data",
        'JSONL, one {"prompt", "completion"}, {"messages": [{"role", "content"}, ...]} or {"text"} a line; '
        "learned are completions, the assistant's turns, all of the text",
        metavar="FILE",
    )
    eval_data: str | None = option(
        "model and data", "JSONL of the same forms, for the evaluation loss", None, metavar="FILE"
    )
    output: str = option("model and data", "a new folder for the run", metavar="FOLDER")
    max_length: int = option(
        "model and data", "longer samples lose their end", 2048, metavar="TOKENS"
    )
    packing: bool = option(
        "model and data",
        "join short samples into rows of up to --max-length",
        False,
        exclusive=True,
    )
    group_by_length: bool = option(
        "model and data", "batch samples of similar length", False, exclusive=True
    )
    dtype: str = option(
        "model and data",
        "of the weights; auto: bfloat16 on a GPU that has it, else float32",
        "auto",
        choices=("auto", "float32", "bfloat16"),
    )

    rank_factor: float = option(
        "LoSiA",
        "p: p^2 of a layer's weights are trained, such as 1/8",
        LoSiAConfig.rank_factor,
        type=parse_fraction,
        metavar="P",
    )
    shape: str = option(
        "LoSiA",
        "which p^2: half of the side that is the residual stream and as much of the other, or p of both sides as in "
        "the paper",
        LoSiAConfig.shape,
        choices=("wide", "square"),
    )
    output_dim_factor: float = option(
        "LoSiA",
        "share of the vocabulary whose output weights are trained; 0: none, 1: all",
        0.0,
        type=parse_fraction,
        metavar="P",
    )
    period: int | Literal["auto"] = option(
        "LoSiA",
        "steps until the next group of layers moves its subnets; auto: the paper's 100, or in a short run as many as "
        "give every group two turns",
        "auto",
        type=parse_period,
        metavar="STEPS",
    )
    moves: str = option(
        "LoSiA",
        "where subnets move: to new places at random, to where the importance is largest as in the paper, nowhere",
        LoSiAConfig.moves,
        choices=("random", "importance", "none"),
    )
    importance: str = option(
        "LoSiA",
        "what subnets move by with --moves importance; sensitivity_bfloat16 keeps it in half the memory, marginal needs none of the "
        "weights' size",
        "sensitivity",
        choices=IMPORTANCES,
    )
    init_subnet: str = option(
        "LoSiA",
        "place the first subnets at random as in the paper, or by the first 4 batches",
        LoSiAConfig.init_subnet,
        choices=("random", "calibrated"),
    )
    alignment: int = option(
        "LoSiA",
        "choose runs of so many neighbours: 16 makes gathers read only the memory they need; 1 is the paper",
        1,
        metavar="NEURONS",
    )

    # What is kept for each trained value; docs/memory.md has the bytes.
    moments: str = option(
        "memory of the optimizer",
        "how the optimizer keeps its moments",
        "float32",
        choices=tuple(MOMENTS),
    )
    master: str = option(
        "memory of the optimizer",
        "how the trained values are kept: in float32, in bfloat16 with the missing bits beside them, in bfloat16 alone "
        "with stochastic rounding",
        "float32",
        choices=("float32", "split", "none"),
    )
    in_backward: bool = option(
        "memory of the optimizer", "update inside the backward, keep no gradients", False
    )

    lr: float = option(
        "training",
        "peak learning rate, of full fine-tuning: each subnet's is that divided by the share it trains (for --moves "
        "importance or --init-subnet calibrated: the subnets' own)",
        5e-5,
    )
    lr_scheduler: str = option(
        "training",
        "over the whole run",
        "cosine",
        choices=("cosine", "linear", "constant", "constant_with_warmup"),
    )
    warmup_ratio: float = option(
        "training", "share of the steps in which the rate rises", 0.1, metavar="SHARE"
    )
    epochs: float = option("training", "passes over the data", 3.0)
    steps: int | None = option("training", "optimizer steps, instead of --epochs", None, type=int)
    batch_size: int = option(
        "training", "samples (packed: rows) of one forward", 4, metavar="SAMPLES"
    )
    gradient_accumulation: int = option(
        "training", "batches of one optimizer step", 1, metavar="BATCHES"
    )
    weight_decay: float = option("training", "decoupled, on the subnets", 0.0)
    max_grad_norm: float = option(
        "training", "clip gradients to this norm; 0: never", 1.0, metavar="NORM"
    )
    gradient_checkpointing: bool = option(
        "training", "recompute activations: less memory, more time", False
    )
    seed: int = option("training", "of the order of the data, the first subnets, dropout", 0)

    print_every: int = option(
        "progress", "a line on the terminal; log.jsonl has every step", 10, metavar="STEPS"
    )
    report_to: str = option(
        "progress",
        "where the Trainer reports to as well: tensorboard, wandb, ...",
        "none",
        metavar="NAME",
    )
    eval_steps: int = option(
        "progress", "between evaluations; the last step has one too", 500, metavar="STEPS"
    )
    save_steps: int = option(
        "progress", "between checkpoints, two are kept; 0: none", 500, metavar="STEPS"
    )
    resume: bool = option(
        "progress",
        "go on with the run in --output from its last checkpoint; run.json there has the options",
        False,
    )

    def check(self) -> None:
        """Hold the options to their ranges, before anything is loaded.

        Raises:
            InputError: for a value out of range or two that exclude each other.
        """
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
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.save_steps < 0:
            raise InputError(
                f"save_steps must be at least 0 (0: no checkpoints), got {self.save_steps}"
            )
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InputError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.warmup_ratio < 1:
            raise InputError(f"warmup_ratio must be in [0, 1), got {self.warmup_ratio}")
        if self.steps is None and not 0 < self.epochs < math.inf:
            raise InputError(f"epochs must be positive, got {self.epochs}")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be in [0, 2**32), got {self.seed}")
        if self.in_backward and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                "in_backward would update before the gradients of several processes are averaged"
            )
        if self.in_backward and (self.gradient_accumulation > 1 or self.max_grad_norm > 0):
            raise InputError(
                "in_backward keeps no gradients: it needs gradient_accumulation 1 and max_grad_norm 0"
            )
        if self.importance != LoSiAConfig.importance and self.moves != "importance":
            warnings.warn(
                f"importance {self.importance} cannot act: subnets move by it with moves importance alone",
                stacklevel=2,
            )
        if self.packing and self.group_by_length:
            raise InputError(
                "packing and group_by_length exclude each other: packed rows have one length"
            )
        self.losia_config()

    def total_steps(self, samples: int, processes: int = 1) -> int:
        """Optimizer steps of a run whose ``processes`` take a batch of the ``samples`` each at a
        time."""
        if self.steps is not None:
            return self.steps
        batches = math.ceil(samples / (self.batch_size * processes))
        return math.ceil(self.epochs * math.ceil(batches / self.gradient_accumulation))

    def warmup_steps(self, total_steps: int) -> int:
        """Optimizer steps of the warm-up, which the scheduler "constant" has not."""
        constant = self.lr_scheduler == "constant"
        return 0 if constant else math.ceil(total_steps * self.warmup_ratio)

    def losia_config(self, total_steps: int = 0) -> LoSiAConfig:
        """What a run of ``total_steps`` trains and when it moves.

        Raises:
            InputError: for a value out of range.
        """
        try:
            return LoSiAConfig(
                rank_factor=self.rank_factor,
                shape=self.shape,
                output_dim_factor=self.output_dim_factor,
                period=self.period,
                warmup_steps=self.warmup_steps(total_steps),
                moves=self.moves,
                importance=self.importance,
                init_subnet=self.init_subnet,
                alignment=self.alignment,
                master=self.master,
                seed=self.seed,
            )
        except ValueError as error:
            raise InputError(str(error)) from None
