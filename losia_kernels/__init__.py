"""LoSiA fine-tuning (2507.04487): train, in every linear layer, a small dense block of the weight,
and move it.

Where what lives, each folder importing from those above it only:

    config.py      LoSiAConfig: every choice of the method
    kernels/       the Triton kernels, one file an operation
    ops/           the same words: checks, plain torch, what runs where
    parallel/      who trains together, and where weights live
    layers/        what stands in the model
    training/      what step() does
    checkpoint/    what lies on disk
    integrations/  Transformers and PEFT
    finetune/      the command's run
    cli.py         the command

One training step is read in four files: ``layers/linear.py`` (forward and backward),
``training/optimizer.py`` (the update), ``training/timeline.py`` (who observes, who moves) and
``training/selection.py`` (where to).
"""

from .config import LoSiAConfig
from .layers.convert import apply_losia, export_state_dict, remove_losia
from .layers.cross_entropy import losia_linear_cross_entropy
from .layers.linear import LoSiALinear
from .layers.module import losia_layers
from .layers.subnet import Subnet
from .training.attach import attach
from .training.calibrate import calibrate, start_from_frequency
from .training.capture import CapturedBackward
from .training.optimizer import LoSiAAdamW
from .training.selection import NonFiniteScoreError, select_subnet
from .training.timeline import Timeline

__version__ = "0.1.0"

__all__ = [
    "CapturedBackward",
    "LoSiAAdamW",
    "LoSiAConfig",
    "LoSiALinear",
    "NonFiniteScoreError",
    "Subnet",
    "Timeline",
    "apply_losia",
    "attach",
    "calibrate",
    "export_state_dict",
    "losia_layers",
    "losia_linear_cross_entropy",
    "remove_losia",
    "select_subnet",
    "start_from_frequency",
]
