"""LoSiA: this package, and the dense-gradient form (the paper's LoSiA, without -Pro) with this package's optimizer."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losia_kernels import LoSiAAdamW, LoSiAConfig, LoSiALinear, apply_losia
from losia_kernels.linear import losia_layers

from .base import Method, Options, Prepared, count, stepper, trained_parameters


class _DenseGradient(torch.autograd.Function):
    """The whole ``dy^T x`` of every linear, of which the subnet is cut out; freed at once."""

    @staticmethod
    def forward(ctx, x, weight, bias, subnet, out_idx, in_idx):
        ctx.save_for_backward(x, weight, out_idx, in_idx)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight, out_idx, in_idx = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dense = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])  # [out, in]
        return dx, None, None, dense.index_select(0, out_idx).index_select(1, in_idx).float(), None, None


class DenseGradientLinear(LoSiALinear):
    def forward(self, x: Tensor) -> Tensor:
        if self.observe_callback is not None:
            return super().forward(x)  # forms the dense gradient by itself
        return _DenseGradient.apply(x, self.weight, self.bias, self.subnet, self.out_idx, self.in_idx)


def _prepare(
    model: nn.Module, options: Options, dense: bool = False, observing: bool = True, fused_loss: bool = False
) -> Prepared:
    # A slot that never ends: one decoder block observes, as in every step of a run, and nothing is relocalized.
    # What a relocalization costs is measured by the scaling suite.
    period = 10**9
    config = LoSiAConfig(
        rank_factor=options.rank_factor, output_dim_factor=options.output_dim_factor, period=period,
        fused_loss=fused_loss,
    )  # fmt: skip
    apply_losia(model, config)
    optimizer = LoSiAAdamW(model, lr=6e-5)
    timeline = optimizer.timeline
    first_block = next(i for i, name in enumerate(timeline.group_names) if "layers" in name)
    if first_block:
        timeline.step = first_block * period
        timeline._observe()
    layers = dict(losia_layers(model))
    if not observing:
        for layer in layers.values():
            layer.observe_(None)
    if dense:
        for layer in layers.values():
            layer.__class__ = DenseGradientLinear
    return Prepared(model, stepper(optimizer), count(trained_parameters(model)), subnets=layers)


_CONFIGURATION = "p 1/8, float32 master and moments, output layer frozen, the model's own loss"
_READS = ("rank_factor", "output_dim_factor")
PRO = Method("losia-pro", "LoSiA-Pro (ours)", f"{_CONFIGURATION}; one block observes", _prepare, _READS)
PRO_FUSED = Method(
    "losia-pro-fused", "LoSiA-Pro (ours), loss without logits", "as losia-pro with fused_loss, the package's default",
    functools.partial(_prepare, fused_loss=True), _READS,
)  # fmt: skip
DENSE = Method(
    "losia-dense", "LoSiA, dense gradient", f"{_CONFIGURATION}; one block observes",
    functools.partial(_prepare, dense=True), _READS,
)  # fmt: skip
PRO_OFF = Method(
    "losia-pro-off", "LoSiA-Pro (ours), outside its slot", f"{_CONFIGURATION}; no block observes",
    functools.partial(_prepare, observing=False), _READS,
)  # fmt: skip
DENSE_OFF = Method(
    "losia-dense-off", "LoSiA, dense gradient, outside its slot", f"{_CONFIGURATION}; no block observes",
    functools.partial(_prepare, dense=True, observing=False), _READS,
)  # fmt: skip
