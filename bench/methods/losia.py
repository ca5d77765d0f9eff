"""LoSiA: this package, and the dense-gradient form (the paper's LoSiA, without -Pro) with this
package's optimizer."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losia_kernels import LoSiAAdamW, LoSiAConfig, LoSiALinear, apply_losia
from losia_kernels.layers.module import losia_layers

from .base import Method, MissingPeer, Options, Prepared, count, stepper, trained_parameters


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
        return (
            dx,
            None,
            None,
            dense.index_select(0, out_idx).index_select(1, in_idx).float(),
            None,
            None,
        )


class DenseGradientLinear(LoSiALinear):
    def forward(self, x: Tensor) -> Tensor:
        if self.observe_callback is not None:
            return super().forward(x)  # forms the dense gradient by itself
        return _DenseGradient.apply(
            x, self.weight, self.bias, self.subnet, self.out_idx, self.in_idx
        )


def _prepare(
    model: nn.Module,
    options: Options,
    dense: bool = False,
    observing: bool = True,
    fused_loss: bool = False,
    lean: bool = False,
) -> Prepared:
    if lean and next(model.parameters()).dtype != torch.bfloat16:
        raise MissingPeer("a remainder completes bfloat16 weights: needs a bfloat16 model")
    # A slot that never ends: one decoder block observes, as in every step of a run, and nothing is
    # relocalized. What a relocalization costs is measured by the scaling suite.
    period = 10**9
    config = LoSiAConfig(
        rank_factor=options.rank_factor,
        output_dim_factor=options.output_dim_factor,
        period=period,
        fused_loss=fused_loss,
        **(LEAN_CONFIG if lean else {}),
    )
    apply_losia(model, config)
    optimizer = LoSiAAdamW(model, lr=6e-5, **(LEAN_OPTIMIZER if lean else {}))
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
    gated = (
        {} if lean else layers
    )  # gradients that are used up inside the backward cannot be compared
    return Prepared(model, stepper(optimizer), count(trained_parameters(model)), subnets=gated)


LEAN_CONFIG: dict[str, Any] = {"master_weights": False, "importance": "sensitivity_bfloat16"}
LEAN_OPTIMIZER: dict[str, Any] = {"moments": "int8", "remainder": True, "in_backward": True}


_CONFIGURATION = "p 1/8, float32 master and moments, output layer frozen, the model's own loss"
_READS = ("rank_factor", "output_dim_factor")
PRO = Method(
    "losia-pro", "LoSiA-Pro (ours)", f"{_CONFIGURATION}; one block observes", _prepare, _READS
)
PRO_FUSED = Method(
    "losia-pro-fused",
    "LoSiA-Pro (ours), loss without logits",
    "as losia-pro with fused_loss, the package's default",
    functools.partial(_prepare, fused_loss=True),
    _READS,
)
PRO_LEAN = Method(
    "losia-pro-lean",
    "LoSiA-Pro (ours), least memory for float32 values",
    "as losia-pro-fused, float32 values as bfloat16 and remainder, int8 moments, bfloat16 importance, updates in the "
    "backward",
    functools.partial(_prepare, fused_loss=True, lean=True),
    _READS,
)
DENSE = Method(
    "losia-dense",
    "LoSiA, dense gradient",
    f"{_CONFIGURATION}; one block observes",
    functools.partial(_prepare, dense=True),
    _READS,
)
PRO_OFF = Method(
    "losia-pro-off",
    "LoSiA-Pro (ours), outside its slot",
    f"{_CONFIGURATION}; no block observes",
    functools.partial(_prepare, observing=False),
    _READS,
)
DENSE_OFF = Method(
    "losia-dense-off",
    "LoSiA, dense gradient, outside its slot",
    f"{_CONFIGURATION}; no block observes",
    functools.partial(_prepare, dense=True, observing=False),
    _READS,
)
