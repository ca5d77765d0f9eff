"""What other libraries have made of a model's linears, refused by name: a subnet is trained in the
weight itself, which then is quantized, adapted, or not what the forward computes with."""

import sys

import torch
from torch import nn

# Whose linears hold their weight in a quantized form: a subnet is written into the weight itself.
_QUANTIZERS = (
    "aqlm",
    "auto_gptq",
    "auto_round",
    "awq",
    "bitsandbytes",
    "compressed_tensors",
    "eetq",
    "fp_quant",
    "gptqmodel",
    "hqq",
    "optimum",
    "qqq",
    "quark",
    "spqr_quant",
    "torchao",
    "transformers.integrations",
    "torch.ao.nn",
    "vptq",
)
_PACKED = ("qweight", "W_q", "weight_packed", "quant_state", "quantization_scheme")


def check_no_adapters(model: nn.Module) -> None:
    """Raise ValueError for a model that holds PEFT adapters: their own linears are no targets, and
    under one the weight would be trained twice."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # imported if there is one
    adapter = getattr(tuners, "BaseTunerLayer", None)
    for name, module in model.named_modules():
        if adapter is not None and isinstance(module, adapter):
            raise ValueError(
                f"apply_losia: {name!r} holds a PEFT adapter: give the plain model "
                f"(merge_and_unload() makes one), or use LoSiAPeftConfig in the place of the "
                f"adapter's config"
            )


def check_forward(name: str, module: nn.Module) -> None:
    """Raise ValueError for a module whose weight is computed or offloaded, or that has a forward of
    its own, which would be lost (hooks are kept)."""
    weight = module._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"apply_losia: {name!r} has a weight that is computed (by spectral_norm, weight_norm or "
            f"pruning), so that no subnet of it can be trained: remove that first, or leave it out "
            f"with exclude_modules"
        )
    if weight.is_inference():
        raise ValueError(
            f"apply_losia: {name!r} was made in torch.inference_mode(), so that autograd takes no "
            f"part of it: make or load the model outside of it (torch.no_grad() is fine)"
        )
    if weight.is_meta and is_offloaded(module):
        raise ValueError(
            f"apply_losia: {name!r} is offloaded (its weight is on 'meta' until it is used), but a "
            f"subnet is written into a weight that stays: load the model without offloading, or "
            f"leave it out with exclude_modules"
        )
    if "forward" in module.__dict__:
        raise ValueError(
            f"apply_losia: {name!r} has a forward of its own (as offloading and other libraries' "
            f"patches give it), which its subnet's layer would not run: convert before that is "
            f"applied, or leave it out with exclude_modules"
        )


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate takes the module's weights away after each use."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # of a SequentialHook
    return any(getattr(each, "offload", False) for each in hooks)


def quantized_as(module: nn.Module) -> str | None:
    """What kind of quantized linear ``module`` is, with the library that made it; None if it is
    none."""
    home = type(module).__module__
    library = next((name for name in _QUANTIZERS if f"{home}.".startswith(f"{name}.")), None)
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):
        kind = type(weight.data)
        of_torch = kind in (torch.Tensor, nn.Parameter) or _package(kind) == "torch"
        if not of_torch:
            return f"{type(module).__name__} with a weight of {_package(kind)}'s {kind.__name__}"
        floats = weight.is_floating_point() and weight.element_size() > 1
        if isinstance(module, nn.Linear) and not floats:
            return f"{type(module).__name__} with a {weight.dtype} weight"
    packed = any(getattr(module, name, None) is not None for name in _PACKED)
    if packed or (library and "linear" in type(module).__name__.lower()):
        return f"{type(module).__name__} of {library or home.partition('.')[0]}"
    return None


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def check_not_quantized(name: str, module: nn.Module) -> None:
    """Raise ValueError, saying what to do instead, if ``module`` is a quantized linear."""
    kind = quantized_as(module)
    if kind is not None:
        raise ValueError(
            f"apply_losia: {name!r} is quantized: a {kind}. LoSiA trains the weight itself, which "
            f"needs 16 or 32 bits: load the original model in bfloat16 (without "
            f"quantization_config, not its GPTQ, AWQ or FP8 copy) or call transformers' "
            f"model.dequantize(); or leave such layers out with exclude_modules"
        )
