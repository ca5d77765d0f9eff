"""LoRA as one autograd function a linear, gradients written by hand: what Unsloth's ``LoRA_W``
does.

Unsloth itself patches transformers when it is imported, for every other row of the process too, so
its function is rebuilt here: the adapter's products are accumulated into the base product, and
nothing but x is saved.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import (
    Method,
    Options,
    Prepared,
    adamw,
    count,
    decoder_linears,
    stepper,
    trained_parameters,
)


class _FusedLoRA(torch.autograd.Function):
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
    def __init__(self, linear: nn.Linear, rank: int, alpha: int):
        super().__init__()
        out_features, in_features = linear.weight.shape
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.down = nn.Parameter(linear.weight.new_empty(rank, in_features))
        self.up = nn.Parameter(linear.weight.new_zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return _FusedLoRA.apply(x, self.weight, self.bias, self.down, self.up, self.scale)


def _prepare(model: nn.Module, options: Options) -> Prepared:
    model.requires_grad_(False)
    for name, linear in decoder_linears(model).items():
        parent, _, child = name.rpartition(".")
        setattr(
            model.get_submodule(parent),
            child,
            FusedLoRALinear(linear, options.rank, 2 * options.rank),
        )
    parameters = trained_parameters(model)
    return Prepared(model, stepper(adamw(parameters, lr=2e-4)), count(parameters))


FUSED_LORA = Method(
    "lora-fused",
    "hand-fused LoRA",
    "r 64, alpha 128, all linears, adapters in the model's dtype; Unsloth's LoRA_W rebuilt",
    _prepare,
    ("rank",),
)
