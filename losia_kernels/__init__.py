"""LoSiA fine-tuning: train, in every linear layer, a small dense sub-matrix of the weight, and move it (2507.04487)."""

from .calibrate import calibrate, start_from_frequency
from .config import LoSiAConfig
from .convert import apply_losia, export_state_dict, remove_losia
from .linear import LoSiALinear
from .optimizer import LoSiAAdamW, attach
from .output_layer import losia_linear_cross_entropy
from .selection import NonFiniteScoreError, select_subnet
from .subnet import Subnet

__version__ = "0.1.0"

__all__ = [
    "LoSiAAdamW",
    "LoSiAConfig",
    "LoSiALinear",
    "NonFiniteScoreError",
    "Subnet",
    "apply_losia",
    "attach",
    "calibrate",
    "export_state_dict",
    "losia_linear_cross_entropy",
    "remove_losia",
    "select_subnet",
    "start_from_frequency",
]
