"""LoSiA: this package; the dense-gradient form (the paper's LoSiA, without -Pro) with this package's optimizer; a run
of the study."""

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losia_kernels import (
    LoSiAAdamW,
    LoSiAConfig,
    LoSiALinear,
    apply_losia,
    attach,
    calibrate,
    remove_losia,
)
from losia_kernels.layers.module import losia_layers
from losia_kernels.training.calibrate import start_from_frequency

from .base import Method, MissingPeer, Options, Prepared, count, trained_parameters

NEVER = 10**9  # steps
LEAN_CONFIG: dict[str, Any] = {"master": "split", "importance": "sensitivity_bfloat16"}
LEAN_OPTIMIZER: dict[str, Any] = {"moments": "int8", "in_backward": True}


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
        d_subnet = dense.index_select(0, out_idx).index_select(1, in_idx).float()
        return dx, None, None, d_subnet, None, None


class DenseGradientLinear(LoSiALinear):
    def forward(self, x: Tensor) -> Tensor:
        if self.observe_callback is not None:
            return super().forward(x)  # forms the dense gradient by itself
        operands = self.weight, self.bias, self.subnet, self.out_idx, self.in_idx
        return _DenseGradient.apply(x, *operands)


def prepare(
    model: nn.Module,
    options: Options,
    dense: bool = False,
    observing: bool = True,
    fused_loss: bool = False,
    lean: bool = False,
    captured: bool = False,
) -> Prepared:
    """A slot that never ends: one decoder block observes, as in every step of a run, and nothing is relocalized. What a
    relocalization costs is measured by the scaling suite."""
    if lean and next(model.parameters()).dtype != torch.bfloat16:
        raise MissingPeer("a remainder completes bfloat16 weights: needs a bfloat16 model")
    sizes = {"rank_factor": options.rank_factor, "output_dim_factor": options.output_dim_factor}
    form = {"period": NEVER, "fused_loss": fused_loss, **(LEAN_CONFIG if lean else {})}
    apply_losia(model, LoSiAConfig.paper(**sizes, **form))
    optimizer = LoSiAAdamW(model, lr=options.lr, **(LEAN_OPTIMIZER if lean else {}))
    timeline = optimizer.timeline
    first_block = next(i for i, name in enumerate(timeline.group_names) if "layers" in name)
    if first_block:
        timeline.clock.step = first_block * NEVER
        timeline._observe()
    layers = dict(losia_layers(model))
    for layer in layers.values():
        if not observing:
            layer.observe_(None)
        if dense:
            layer.__class__ = DenseGradientLinear
    gated = {} if lean else layers  # gradients used up in the backward cannot be compared
    trained = count(trained_parameters(model))
    made = {"subnets": gated, "captured": captured}
    return Prepared(model, optimizer, trained, lambda: remove_losia(model), **made)


# a run of the study ---------------------------------------------------------------------------------

CALIBRATION_BATCHES = 4
COUNTED_BATCHES = 64  # whose labels say which tokens are taught most often
CYCLES = 1  # how often every group moves in a run; the period follows from the number of steps
OF_THE_STUDY = ("cycles", "nearest", "bfloat16")  # changes, but no fields of LoSiAConfig


def study_config(model: nn.Module, options: Options) -> LoSiAConfig:
    changes = {name: v for name, v in options.changes.items() if name not in OF_THE_STUDY}
    turns = model.config.num_hidden_layers * options.changes.get("cycles", CYCLES)
    values = {"rank_factor": options.rank_factor, "period": max(1, int(options.steps / turns))}
    values |= {"warmup_steps": options.warmup, "seed": options.seed, "importance": "sensitivity"}
    # as the paper has it, but for the calibrated start; rates are the subnets' own
    values |= {"shape": "square", "moves": "importance", "init_subnet": "calibrated"}
    values |= {"lr_of": "subnet"}
    return LoSiAConfig(**(values | changes))


def prepare_study(model: nn.Module, options: Options) -> Prepared:
    """The paper's settings, but one cycle a run and a calibrated start."""
    if options.changes.get("bfloat16"):
        model.to(torch.bfloat16)
    config = study_config(model, options)
    apply_losia(model, config)
    calibrated = config.init_subnet == "calibrated"
    made: dict[str, Any] = {
        "period": config.period,
        "calibration_batches": CALIBRATION_BATCHES * calibrated,
    }
    if calibrated:
        calibrate(model, options.batches(), CALIBRATION_BATCHES)
    if config.output_init == "frequency":
        start_from_frequency(model, itertools.islice(options.batches(), COUNTED_BATCHES))
    # what the authors' code does: 16-bit values, no master, rounded to nearest
    if options.changes.get("nearest"):
        optimizer = torch.optim.AdamW(trained_parameters(model), lr=options.lr, weight_decay=0.0)
        attach(optimizer, model)
    else:
        optimizer = LoSiAAdamW(model, lr=options.lr)
    trained = count(trained_parameters(model))
    return Prepared(model, optimizer, trained, lambda: remove_losia(model), made=made)


def _losia(name: str, title: str, **options: bool) -> Method:
    reads = "rank_factor", "output_dim_factor"
    return Method(name, title, functools.partial(prepare, **options), reads)


OURS, OFF = "LoSiA-Pro (ours)", "outside its slot"
PRO = _losia("losia-pro", OURS)
PRO_OFF = _losia("losia-pro-off", f"{OURS}, {OFF}", observing=False)
PRO_FUSED = _losia("losia-pro-fused", f"{OURS}, loss without logits", fused_loss=True)
PRO_LEAN = _losia(
    "losia-pro-lean", f"{OURS}, least memory for float32 values", fused_loss=True, lean=True
)
PRO_CAPTURED = _losia("losia-pro-captured", f"{OURS}, one CUDA graph", captured=True)
DENSE = _losia("losia-dense", "LoSiA, dense gradient", dense=True)
DENSE_OFF = _losia("losia-dense-off", f"LoSiA, dense gradient, {OFF}", dense=True, observing=False)
