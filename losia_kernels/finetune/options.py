"""What a fine-tuning run can be told; free of heavy imports, so that the command line can ask for
help at once."""

import dataclasses
import math
import os
from typing import Literal

from ..config import LoSiAConfig

PICTURES = (
    "loss",
    "timeline",
    "subnets",
    "frequency",
    "gradients",
    "singular_vectors",
)  # of ``losia-kernels plot``


class InputError(ValueError):
    """A mistake in the user's input that one line can say: the command line prints it and exits
    with code 2."""


@dataclasses.dataclass
class FinetuneOptions:
    """Everything ``finetune`` can be told; the command line's help says what each is and its
    unit."""

    model: str
    data: str
    output: str
    eval_data: str | None = None
    rank_factor: float = 1 / 8
    output_dim_factor: float = 0.0
    period: int | Literal["auto"] = "auto"
    importance: str = "sensitivity"
    init_subnet: str = "calibrated"
    alignment: int = 1
    moments: str = "float32"
    master: str = "float32"
    in_backward: bool = False
    lr: float = 2e-4
    weight_decay: float = 0.0
    lr_scheduler: str = "cosine"
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 4
    gradient_accumulation: int = 1
    max_length: int = 2048
    packing: bool = False
    group_by_length: bool = False
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    seed: int = 0
    save_steps: int = 500
    eval_steps: int = 500
    print_every: int = 10
    report_to: str = "none"
    resume: bool = False

    def check(self) -> None:
        """Raises InputError for a value out of range or two that exclude each other."""
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
        if self.steps is None and not self.epochs > 0:
            raise InputError(f"epochs must be positive, got {self.epochs}")
        if not self.weight_decay >= 0:
            raise InputError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.in_backward and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                "in_backward would update before the gradients of several processes are averaged"
            )
        if self.in_backward and (self.gradient_accumulation > 1 or self.max_grad_norm > 0):
            raise InputError(
                "in_backward keeps no gradients: it needs gradient_accumulation 1 and max_grad_norm 0"
            )
        if self.packing and self.group_by_length:
            raise InputError(
                "packing and group_by_length exclude each other: packed rows have one length"
            )
        self.losia_config()

    def losia_config(self, warmup_steps: int = 0) -> LoSiAConfig:
        """Of these options. Raises InputError for a value out of range."""
        try:
            return LoSiAConfig(
                rank_factor=self.rank_factor,
                output_dim_factor=self.output_dim_factor,
                period=self.period,
                warmup_steps=warmup_steps,
                importance=self.importance,
                init_subnet=self.init_subnet,
                alignment=self.alignment,
                master_weights=self.master == "float32",
                seed=self.seed,
            )
        except ValueError as error:
            raise InputError(str(error)) from None
