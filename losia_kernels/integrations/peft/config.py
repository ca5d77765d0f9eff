"""LoSiAPeftConfig: LoSiAConfig's choices in the form that PEFT saves and loads."""

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Literal

from peft import PeftConfig

from ...config import LoSiAConfig
from .card import say_how_to_load


class LoSiAPeftType(str, Enum):
    """Stands beside PEFT's own enum of methods, which is closed; equal to its value, as theirs
    are."""

    LOSIA = "LOSIA"


@dataclass
class LoSiAPeftConfig(PeftConfig):
    """A LoSiA adapter for ``peft.get_peft_model``; every field that ``LoSiAConfig`` has means what
    it means there.

    What differs is PEFT's: ``target_modules`` ("all-linear" is every linear but the output layer,
    wherever it is), ``exclude_modules`` and ``modules_to_save`` follow PEFT's rules; float32
    masters of 16-bit weights are chosen by ``get_peft_model(..., autocast_adapter_dtype=)`` (True
    by default; False: 16-bit subnets, rounded stochastically); losses are computed as the model
    does.

    Args:
        init_weights: False starts from a random change instead of from the base model. For tests.

    Raises:
        ValueError: a value is out of range.
    """

    rank_factor: float = 3 / 20
    output_dim_factor: float = 0.0
    period: int | Literal["auto"] = 100
    warmup_steps: int = 0
    update_type: str = "async"
    importance: str = "sensitivity"
    init_subnet: str = "random"
    importance_beta1: float = 0.85
    importance_beta2: float = 0.85
    output_init: str = "random"
    rewarm: bool = True
    reset_step: bool = True
    target_modules: str | list[str] | None = "all-linear"
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, float | tuple[float, float]] = field(default_factory=dict)
    seed: int = 0
    alignment: int = 1
    shape: str = "wide"
    moves: str = "random"
    lr_of: str = "auto"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LoSiAPeftType.LOSIA
        if self.target_modules is None:
            self.target_modules = "all-linear"
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        self.losia_config()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's, which has written the adapter's model card by then: it is completed."""
        super().save_pretrained(save_directory, **kwargs)
        say_how_to_load(save_directory, self.base_model_name_or_path, self.task_type)

    def losia_config(self) -> LoSiAConfig:
        """The same choices as a LoSiAConfig. Raises ValueError for a value out of range."""
        values = {
            f.name: getattr(self, f.name) for f in fields(LoSiAConfig) if hasattr(self, f.name)
        }
        for name, value in values.items():
            if isinstance(value, set):
                values[name] = sorted(value)
        return LoSiAConfig(**values, fused_loss=False)
