"""Observe a layer's dense gradients, then say where its subnet belongs: importance -> scores -> selection.

One observer a layer and slot. ``update`` takes the dense gradient ``[out, in]`` of one micro-batch; ``select`` gives
the new subnet; ``tensors`` is the state a checkpoint needs, made at the first update on the gradient's device. Where
fully_shard has cut the weight, ``update`` and ``tensors`` are of this rank's ``rows``, and only sums are exchanged.
"""

import torch
from torch import Tensor

from . import eager, ops
from .config import LoSiAConfig
from .distributed import Rows
from .linear import LoSiALinear
from .selection import NonFiniteScoreError, select_from_importance, select_from_marginals
from .subnet import Subnet


class SensitivityObserver:
    """Importance and uncertainty of every weight (Eqs. 3-6): two tensors ``[out, in]``."""

    def __init__(self, beta1: float, beta2: float):
        self.beta1, self.beta2 = beta1, beta2
        self.tensors: dict[str, Tensor] = {}

    def update(self, weight: Tensor, grad: Tensor, grad_scale: float, rows: Rows | None = None) -> None:
        if not self.tensors:
            dtype = eager.accumulate_dtype(weight.dtype)
            for name in ("importance", "uncertainty"):
                self.tensors[name] = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        ops.importance_update_(
            **self.tensors, weight=weight, grad=grad, beta1=self.beta1, beta2=self.beta2, grad_scale=grad_scale
        )

    def select(self, k_out: int, k_in: int, rows: Rows | None = None) -> Subnet:
        return select_from_importance(**self.tensors, k_out=k_out, k_in=k_in, rows=rows)


class GradientObserver:
    """|g| of one optimizer step (ablation GL): the sum of its micro-batches' gradients, no smoothing."""

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}

    def update(self, weight: Tensor, grad: Tensor, grad_scale: float, rows: Rows | None = None) -> None:
        if not self.tensors:
            self.tensors["gradient"] = torch.zeros_like(grad, dtype=eager.accumulate_dtype(weight.dtype))
        self.tensors["gradient"] += grad

    def select(self, k_out: int, k_in: int, rows: Rows | None = None) -> Subnet:
        return select_from_importance(self.tensors["gradient"].abs(), None, k_out, k_in, rows)


class MarginalObserver:
    """Row and column sums of the smoothed importance, ``out + in`` floats: sums of an EMA are the EMA of the sums."""

    def __init__(self, beta1: float):
        self.beta1 = beta1
        self.tensors: dict[str, Tensor] = {}

    def update(self, weight: Tensor, grad: Tensor, grad_scale: float, rows: Rows | None = None) -> None:
        sums = ops.importance_marginals(weight, grad, grad_scale=grad_scale)  # [out], [in]
        if rows is not None:
            sums = sums[0], rows.sum(sums[1])
        for name, now in zip(("out_importance", "in_importance"), sums, strict=True):
            self.tensors[name] = self.beta1 * self.tensors.get(name, 0) + (1 - self.beta1) * now

    def select(self, k_out: int, k_in: int, rows: Rows | None = None) -> Subnet:
        out_sums = self.tensors["out_importance"]
        out_sums = out_sums if rows is None else rows.gather(out_sums)
        return select_from_marginals(out_sums, self.tensors["in_importance"], k_out, k_in)


Observer = SensitivityObserver | GradientObserver | MarginalObserver


def make_observer(config: LoSiAConfig) -> Observer:
    """The observer that ``config.importance`` names."""
    if config.importance == "gradient":
        return GradientObserver()
    if config.importance == "marginal":
        return MarginalObserver(config.importance_beta1)
    return SensitivityObserver(config.importance_beta1, config.importance_beta2)


def new_subnet(layer: LoSiALinear, observer: Observer, rows: Rows | None = None) -> Subnet | None:
    """Where ``layer`` should move; None if it saw no gradient in its slot (it was not used) and stays.

    Raises NonFiniteScoreError naming the layer. Changes nothing.
    """
    if not observer.tensors:
        return None
    k_out, k_in = layer.subnet.shape
    try:
        return observer.select(k_out, k_in, rows)
    except NonFiniteScoreError as error:
        raise NonFiniteScoreError(f"{layer.name}: {error}; its subnet stays where it was") from None
