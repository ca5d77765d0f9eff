"""Observe a layer's dense gradients, then say where its subnet belongs: importance -> scores ->
selection.

One observer a layer and slot. ``update`` takes the dense gradient ``[out, in]`` of one micro-batch;
``select`` gives the new subnet; ``tensors`` is the state a checkpoint needs, made at the first
update on the gradient's device. Where fully_shard has cut the weight, ``update`` and ``tensors``
are of this rank's ``rows``, and only sums are exchanged. The output layer's gradient comes in
blocks ``[outputs, in]``, from the first output to the last.
"""

import torch
from torch import Tensor

from .. import ops
from ..config import LoSiAConfig
from ..layers.linear import LoSiALinear
from ..layers.subnet import Subnet
from ..ops.rounding import accumulate_dtype
from ..parallel.ranks import Rows
from .selection import NonFiniteScoreError, select_from_importance, select_from_marginals

ALL = slice(None)


class SensitivityObserver:
    """Importance and uncertainty of every weight (Eqs. 3-6): two tensors ``[out, in]`` of
    ``dtype``.

    ``dtype`` None is float32 (float64 of a float64 weight).
    """

    def __init__(self, beta1: float, beta2: float, dtype: torch.dtype | None = None):
        self.beta1, self.beta2, self.dtype = beta1, beta2, dtype
        self.tensors: dict[str, Tensor] = {}

    def update(
        self,
        weight: Tensor,
        grad: Tensor,
        grad_scale: float,
        rows: Rows | None = None,
        outputs: slice = ALL,
    ) -> None:
        if not self.tensors:
            dtype = self.dtype or accumulate_dtype(weight.dtype)
            for name in ("importance", "uncertainty"):
                self.tensors[name] = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        ops.importance_update_(
            self.tensors["importance"][outputs],
            self.tensors["uncertainty"][outputs],
            weight=weight[outputs],
            grad=grad,
            beta1=self.beta1,
            beta2=self.beta2,
            grad_scale=grad_scale,
        )

    def select(self, k_out: int, k_in: int, rows: Rows | None = None, alignment: int = 1) -> Subnet:
        return select_from_importance(
            **self.tensors, k_out=k_out, k_in=k_in, rows=rows, alignment=alignment
        )


class GradientObserver:
    """|g| of one optimizer step (ablation GL): the sum of its micro-batches' gradients, no
    smoothing."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def update(
        self,
        weight: Tensor,
        grad: Tensor,
        grad_scale: float,
        rows: Rows | None = None,
        outputs: slice = ALL,
    ) -> None:
        if not self.tensors:
            dtype = accumulate_dtype(weight.dtype)
            self.tensors["gradient"] = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        self.tensors["gradient"][outputs] += grad

    def select(self, k_out: int, k_in: int, rows: Rows | None = None, alignment: int = 1) -> Subnet:
        return select_from_importance(
            self.tensors["gradient"].abs(), None, k_out, k_in, rows, alignment
        )


class MarginalObserver:
    """Row and column sums of the smoothed importance, ``out + in`` floats: sums of an EMA are the
    EMA of the sums."""

    def __init__(self, beta1: float):
        self.beta1 = beta1
        self.tensors: dict[str, Tensor] = {}

    def update(
        self,
        weight: Tensor,
        grad: Tensor,
        grad_scale: float,
        rows: Rows | None = None,
        outputs: slice = ALL,
    ) -> None:
        out_sums, in_sums = ops.importance_marginals(weight[outputs], grad, grad_scale=grad_scale)
        if rows is not None:
            in_sums = rows.sum(in_sums)
        if not self.tensors:
            sizes = {"out_importance": weight.shape[0], "in_importance": weight.shape[1]}
            self.tensors = {name: out_sums.new_zeros(size) for name, size in sizes.items()}
        self.tensors["out_importance"][outputs] *= self.beta1
        self.tensors["out_importance"][outputs] += (1 - self.beta1) * out_sums
        if not outputs.start:  # the first block: the column sums of the others add to it
            self.tensors["in_importance"] *= self.beta1
        self.tensors["in_importance"] += (1 - self.beta1) * in_sums

    def select(self, k_out: int, k_in: int, rows: Rows | None = None, alignment: int = 1) -> Subnet:
        out_sums = self.tensors["out_importance"]
        out_sums = out_sums if rows is None else rows.gather(out_sums)
        return select_from_marginals(
            out_sums, self.tensors["in_importance"], k_out, k_in, alignment
        )


Observer = SensitivityObserver | GradientObserver | MarginalObserver


def make_observer(config: LoSiAConfig) -> Observer:
    """The observer that ``config.importance`` names."""
    if config.importance == "gradient":
        return GradientObserver()
    if config.importance == "marginal":
        return MarginalObserver(config.importance_beta1)
    dtype = torch.bfloat16 if config.importance == "sensitivity_bfloat16" else None
    return SensitivityObserver(config.importance_beta1, config.importance_beta2, dtype)


def new_subnet(layer: LoSiALinear, observer: Observer, rows: Rows | None = None) -> Subnet | None:
    """Where ``layer`` should move; None if it stays: its slot had no gradient (it was not used), or
    an importance of zero everywhere, as a weight has that is zero.

    Raises NonFiniteScoreError naming the layer. Changes nothing.
    """
    if not observer.tensors:
        return None
    k_out, k_in = layer.subnet.shape
    try:
        subnet = observer.select(k_out, k_in, rows, layer.alignment)
    except NonFiniteScoreError as error:
        raise NonFiniteScoreError(f"{layer.name}: {error}; its subnet stays where it was") from None
    if subnet.captured is None:
        scored = observer.tensors["in_importance"].any()
    else:
        scored = ~subnet.captured.isnan()  # 0 / 0 else
    return subnet if bool(scored) else None
