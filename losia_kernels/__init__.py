"""LoSiA fine-tuning: train, in every linear layer, a small dense sub-matrix of the weight, and move
it (2507.04487)."""

from .config import LoSiAConfig
from .layers.convert import apply_losia, export_state_dict, remove_losia
from .layers.cross_entropy import losia_linear_cross_entropy
from .layers.linear import LoSiALinear
from .layers.subnet import Subnet
from .training.calibrate import calibrate, start_from_frequency
from .training.optimizer import LoSiAAdamW, attach
from .training.selection import NonFiniteScoreError, select_subnet

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
