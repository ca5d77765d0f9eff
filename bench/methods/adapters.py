"""Adapters: PEFT's LoRA at its best, at the paper's settings and at PEFT's defaults; DoRA; PiSSA; other methods of
PEFT's; a hand-fused LoRA."""

import functools
import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import base
from .base import Method, MissingPeer, Options, Prepared, adamw, decoder_linears, trained_parameters


def prepare_peft(
    model: nn.Module, options: Options, float32: bool = False, defaults: bool = False, **config: Any
) -> Prepared:
    peft = base.import_peer("peft")
    narrow = next(model.parameters()).dtype != torch.float32
    if float32 and not narrow and not defaults:
        same = "the same as with adapters in the model's dtype"
        raise MissingPeer(f"the model is float32 already: {same}")
    if defaults:  # what PEFT takes for LLaMA when nothing is said
        config["target_modules"] = ["q_proj", "v_proj"]
    else:
        alpha = options.alpha or 2 * options.rank
        config |= {"r": options.rank, "lora_alpha": alpha, "target_modules": linear_names(model)}
    prepared = _adapt(model, options, peft.LoraConfig(**config), float32)
    return replace(prepared, autocast=float32 and narrow)


def prepare_other(model: nn.Module, options: Options, kind: str, **config: Any) -> Prepared:
    """Another method of PEFT's, on all linears of the decoder blocks; ``kind``: its config's name."""
    make = getattr(base.import_peer("peft"), kind)
    return _adapt(model, options, make(target_modules=linear_names(model), **config), False)


def linear_names(model: nn.Module) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in decoder_linears(model)})


def _adapt(model: nn.Module, options: Options, config: Any, float32: bool) -> Prepared:
    peft = base.import_peer("peft")
    torch.manual_seed(options.seed)  # of the adapters' first values
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=float32)
    parameters = trained_parameters(adapted)
    optimizer, merged = adamw(parameters, options.lr), getattr(adapted, "merge_and_unload", None)
    return Prepared(adapted, optimizer, base.count(parameters), merged)


class _FusedLoRA(torch.autograd.Function):
    """The adapter's products are accumulated into the base product, and nothing but x is saved."""

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scale):
        # x [..., in], weight [out, in], down [r, in], up [out, r]
        ctx.save_for_backward(x, weight, down, up)
        ctx.scale = scale
        flat = x.reshape(-1, x.shape[-1])  # [t, in]
        y = F.linear(flat, weight, bias)
        y.addmm_(flat @ down.T, up.T, alpha=scale)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        x, weight, down, up = ctx.saved_tensors
        flat_x, flat_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dy_up = flat_dy @ up  # [t, r]
        d_up = ctx.scale * (flat_dy.T @ (flat_x @ down.T))
        d_down = ctx.scale * (dy_up.T @ flat_x)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = flat_dy @ weight
            dx.addmm_(dy_up, down, alpha=ctx.scale)
            dx = dx.view_as(x)
        return dx, None, None, d_down, d_up, None


class FusedLoRALinear(nn.Module):
    """LoRA as one autograd function, gradients written by hand: Unsloth's ``LoRA_W``, which cannot be imported without
    patching transformers for every other row of the process."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: int):
        super().__init__()
        out_features, in_features = linear.weight.shape
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.down = nn.Parameter(linear.weight.new_empty(rank, in_features))
        self.up = nn.Parameter(linear.weight.new_zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return _FusedLoRA.apply(x, self.weight, self.bias, self.down, self.up, self.scale)


def prepare_fused(model: nn.Module, options: Options) -> Prepared:
    model.requires_grad_(False)
    for name, linear in decoder_linears(model).items():
        parent, _, child = name.rpartition(".")
        fused = FusedLoRALinear(linear, options.rank, 2 * options.rank)
        setattr(model.get_submodule(parent), child, fused)
    parameters = trained_parameters(model)
    return Prepared(model, adamw(parameters, options.lr), base.count(parameters))


def _peft(name: str, title: str, **options: Any) -> Method:
    """One that starts as the plain model up to rounding."""
    return Method(name, title, functools.partial(prepare_peft, **options), ("rank",), exact=False)


LORA = Method("lora", "PEFT LoRA", prepare_peft, ("rank",))
LORA_FLOAT32 = _peft("lora-fp32", "PEFT LoRA, float32 adapters", float32=True)
LORA_DEFAULTS = replace(
    _peft("lora-defaults", "PEFT LoRA, PEFT's defaults", float32=True, defaults=True), options=()
)
DORA = _peft("dora", "PEFT DoRA", use_dora=True)
PISSA = _peft("pissa", "PEFT PiSSA", init_lora_weights="pissa_niter_4")
FUSED_LORA = Method("lora-fused", "hand-fused LoRA", prepare_fused, ("rank",))
