"""The methods that are compared, most telling first: ``METHODS`` for speed and memory, ``STUDY`` for what is
learned."""

from ..harness.jobs import MissingPeer
from .adapters import DORA, FUSED_LORA, LORA, LORA_DEFAULTS, LORA_FLOAT32, PISSA
from .base import DEFAULTS, Method, Options, Prepared, UnknownMethod
from .galore import GALORE, GALORE_PER_LAYER
from .liger import FROZEN_LIGER, LORA_LIGER, PRO_LIGER, PRO_LIGER_OFF
from .losia import DENSE, DENSE_OFF, PRO, PRO_CAPTURED, PRO_FUSED, PRO_LEAN, PRO_OFF
from .plain import FROZEN, FULL
from .study import STUDY

_ALL = (FROZEN, PRO, LORA, LORA_FLOAT32, PRO_FUSED, DORA, PRO_LIGER, LORA_LIGER, FROZEN_LIGER)
_ALL += (DENSE, FUSED_LORA, FULL, GALORE, PISSA, LORA_DEFAULTS, PRO_LEAN, GALORE_PER_LAYER)
_ALL += (PRO_CAPTURED, PRO_OFF, DENSE_OFF, PRO_LIGER_OFF)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
# A layer alone cannot say who observes, so both kinds of step are measured; in a model one block of
# many observes.
LAYER_METHODS = tuple(
    "frozen losia-pro-off losia-pro lora lora-fp32 dora losia-liger-off losia-liger lora-liger frozen-liger "
    "lora-fused losia-dense-off losia-dense full galore pissa lora-defaults galore-per-layer".split()
)
MODEL_METHODS = tuple(name for name in METHODS if not name.endswith("-off"))
LATE = ("pissa", "lora-defaults", "galore-per-layer")  # slow to prepare, or less asked for


def get_method(name: str) -> Method:
    if name not in METHODS:
        raise UnknownMethod(f"unknown method {name!r}; the methods are {', '.join(METHODS)}")
    return METHODS[name]


__all__ = ["DEFAULTS", "LATE", "LAYER_METHODS", "METHODS", "MODEL_METHODS", "STUDY"]
__all__ += ["Method", "MissingPeer", "Options", "Prepared", "UnknownMethod", "get_method"]
