"""PEFT: LoRA at its best, at the paper's settings and at PEFT's defaults; DoRA; PiSSA."""

import functools
from typing import Any

import torch
from torch import nn

from .base import (
    Method,
    MissingPeer,
    Options,
    Prepared,
    adamw,
    count,
    stepper,
    target_names,
    trained_parameters,
)


def _prepare(
    model: nn.Module,
    options: Options,
    lr: float = 2e-4,
    float32: bool = False,
    defaults: bool = False,
    **config: Any,
) -> Prepared:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingPeer(f"peft cannot be imported: {error}") from None
    narrow = next(model.parameters()).dtype != torch.float32
    if float32 and not narrow and not defaults:
        raise MissingPeer(
            "the model is float32 already: the same as with adapters in the model's dtype"
        )
    if defaults:
        config["target_modules"] = [
            "q_proj",
            "v_proj",
        ]  # what PEFT takes for LLaMA when nothing is said
    else:
        config |= {
            "r": options.rank,
            "lora_alpha": 2 * options.rank,
            "target_modules": target_names(model),
        }
    model = get_peft_model(model, LoraConfig(**config), autocast_adapter_dtype=float32)
    parameters = trained_parameters(model)
    return Prepared(
        model, stepper(adamw(parameters, lr)), count(parameters), autocast=float32 and narrow
    )


LORA = Method(
    "lora",
    "PEFT LoRA",
    "r 64, alpha 128, no dropout, all linears, adapters in the model's dtype",
    _prepare,
    ("rank",),
)
LORA_FLOAT32 = Method(
    "lora-fp32",
    "PEFT LoRA, float32 adapters",
    "as lora, adapters in float32 under bf16 autocast as in Trainer",
    functools.partial(_prepare, float32=True),
    ("rank",),
    exact=False,
)
LORA_DEFAULTS = Method(
    "lora-defaults",
    "PEFT LoRA, PEFT's defaults",
    "LoraConfig(): r 8, alpha 8, q_proj and v_proj, float32 adapters under bf16 autocast",
    functools.partial(_prepare, float32=True, defaults=True),
    exact=False,
)
DORA = Method(
    "dora",
    "PEFT DoRA",
    "as lora with use_dora=True",
    functools.partial(_prepare, use_dora=True),
    ("rank",),
    exact=False,
)
PISSA = Method(
    "pissa",
    "PEFT PiSSA",
    "as lora with init_lora_weights='pissa_niter_4', lr 1e-4",
    functools.partial(_prepare, lr=1e-4, init_lora_weights="pissa_niter_4"),
    ("rank",),
    exact=False,
)
