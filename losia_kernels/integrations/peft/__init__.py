"""LoSiA as a PEFT method, registered from outside by importing this module.

# also before PeftModel.from_pretrained
from losia_kernels.integrations.peft import LoSiAPeftConfig
model = get_peft_model(model, LoSiAPeftConfig(period=100))
optimizer = LoSiAAdamW(model, lr=1e-4)
"""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from .config import LoSiAPeftConfig, LoSiAPeftType
from .model import LoSiAModel

__all__ = ["LoSiAModel", "LoSiAPeftConfig"]

PEFT_TYPE_TO_CONFIG_MAPPING[LoSiAPeftType.LOSIA] = LoSiAPeftConfig
PEFT_TYPE_TO_TUNER_MAPPING[LoSiAPeftType.LOSIA] = LoSiAModel
PEFT_TYPE_TO_PREFIX_MAPPING[LoSiAPeftType.LOSIA] = LoSiAModel.prefix
