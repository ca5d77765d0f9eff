"""Which linears hold their weight in a quantized form: a subnet is written into the weight itself,
which they lack."""

import torch
from torch import nn

_LIBRARIES = (
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


def quantized_as(module: nn.Module) -> str | None:
    """What kind of quantized linear ``module`` is, with the library that made it; None if it is
    none."""
    home = type(module).__module__
    library = next((name for name in _LIBRARIES if f"{home}.".startswith(f"{name}.")), None)
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):
        kind = type(weight.data)
        if (
            kind not in (torch.Tensor, nn.Parameter)
            and kind.__module__.partition(".")[0] != "torch"
        ):
            return f"{type(module).__name__} with a weight of {kind.__module__.partition('.')[0]}'s {kind.__name__}"
        if isinstance(module, nn.Linear) and (
            weight.element_size() == 1 or not weight.is_floating_point()
        ):
            return f"{type(module).__name__} with a {weight.dtype} weight"
    packed = next((name for name in _PACKED if getattr(module, name, None) is not None), None)
    if packed or (library and "linear" in type(module).__name__.lower()):
        return f"{type(module).__name__} of {library or home.partition('.')[0]}"
    return None


def refuse_quantized(name: str, module: nn.Module) -> None:
    """Raise ValueError, saying what to do instead, if ``module`` is a quantized linear."""
    kind = quantized_as(module)
    if kind is not None:
        raise ValueError(
            f"apply_losia: {name!r} is quantized: a {kind}. LoSiA trains the weight itself, which needs 16 or 32 bits: "
            f"load the original model in bfloat16 (without quantization_config, not its GPTQ, AWQ or FP8 copy) or call "
            f"transformers' model.dequantize(); or leave such layers out with exclude_modules"
        )
