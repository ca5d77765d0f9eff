"""The methods that are compared, most telling first."""

from .base import Method, MissingPeer, Options, Prepared, UnknownMethod
from .fused_lora import FUSED_LORA
from .galore import GALORE, GALORE_PER_LAYER
from .losia import DENSE, DENSE_OFF, PRO, PRO_FUSED, PRO_LEAN, PRO_OFF
from .losia_reference import REFERENCE, REFERENCE_OFF
from .peft_adapters import DORA, LORA, LORA_DEFAULTS, LORA_FLOAT32, PISSA
from .plain import FROZEN, FULL
from .unsloth import UNSLOTH

_ALL = (
    FROZEN,
    PRO,
    LORA,
    LORA_FLOAT32,
    PRO_FUSED,
    DORA,
    DENSE,
    FUSED_LORA,
    FULL,
    GALORE,
    PISSA,
    LORA_DEFAULTS,
    PRO_LEAN,
    GALORE_PER_LAYER,
    REFERENCE,
    UNSLOTH,
    PRO_OFF,
    DENSE_OFF,
    REFERENCE_OFF,
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}

# A layer alone cannot say who observes, so both kinds of step are measured; in a model one block of
# many observes.
LAYER_METHODS = (
    "frozen",
    "losia-pro-off",
    "losia-pro",
    "lora",
    "lora-fp32",
    "dora",
    "lora-fused",
    "losia-dense-off",
    "losia-dense",
    "full",
    "galore",
    "pissa",
    "lora-defaults",
    "galore-per-layer",
    "losia-reference-off",
    "losia-reference",
    "unsloth",
)
MODEL_METHODS = tuple(name for name in METHODS if not name.endswith("-off"))


def get_method(name: str) -> Method:
    """Raises UnknownMethod, listing the methods there are."""
    if name not in METHODS:
        raise UnknownMethod(f"unknown method {name!r}; the methods are {', '.join(METHODS)}")
    return METHODS[name]


__all__ = [
    "LAYER_METHODS",
    "METHODS",
    "MODEL_METHODS",
    "Method",
    "MissingPeer",
    "Options",
    "Prepared",
    "UnknownMethod",
    "get_method",
]
