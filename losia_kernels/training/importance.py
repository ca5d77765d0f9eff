"""Observe a layer's dense gradients, then say where its subnet belongs: importance -> scores ->
selection. A kind of importance is one class here.
"""

from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..config import IMPORTANCES, LoSiAConfig
from ..layers.module import SubnetModule
from ..layers.subnet import Subnet
from ..ops.rounding import accumulate_dtype
from ..parallel.ranks import RowShard
from .selection import NonFiniteScoreError, select_from_importance, select_from_marginals

ALL = slice(None)
OBSERVERS: dict[str, type["Observer"]] = {}


class Observer:
    """What the gradients of one layer in one slot say of its weights.

    A kind is a subclass, ``class Mine(Observer, kind="mine")``, which ``config.importance="mine"``
    then names. Of a weight that is cut, all tensors are of the rows here, and only sums are
    exchanged.

    Attributes:
        last_step_only: it looks at the last step of the slot alone.
        replicated: names of the tensors that every rank holds whole.
        bytes_per_weight: of its state.
        tensors: the state that a checkpoint needs; made by the first gradient.
        seen: whether there was a gradient.
    """

    last_step_only: ClassVar[bool] = False
    replicated: ClassVar[tuple[str, ...]] = ()
    bytes_per_weight: ClassVar[int]

    def __init_subclass__(cls, kind: str | None = None):
        if kind is None:  # a base of kinds
            return
        known = OBSERVERS.get(kind)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"importance {kind!r} is {known.__qualname__}'s; name {cls} otherwise")
        OBSERVERS[kind] = cls
        if known is None:  # else a cell that was run again
            IMPORTANCES.append(kind)

    def __init__(self, config: LoSiAConfig):
        self.beta1, self.beta2 = config.importance_beta1, config.importance_beta2
        self.tensors: dict[str, Tensor] = {}
        self.seen = False

    def make_state(self, weight: Tensor) -> dict[str, Tensor]:
        """``tensors`` before the first gradient, zeros, for ``weight [out, in]``."""
        raise NotImplementedError

    def update(
        self, weight: Tensor, grad: Tensor, grad_scale: float, rows: RowShard, outputs: slice
    ) -> None:
        """Take the gradient of one micro-batch into ``tensors``: what of it is not finite has no effect
        on them, and nobody waits for the GPU.

        Args:
            weight: ``[out, in]``, whose outputs are ``rows`` of the layer's.
            grad: ``[out, in]``; the output layer's comes in blocks, from the first output to the
                last.
            grad_scale: what undoes a scaling of the loss: importance is not linear in the gradient.
            outputs: those that ``grad`` has.
        """
        raise NotImplementedError

    def select(self, k_out: int, k_in: int, rows: RowShard, alignment: int) -> Subnet:
        """Where the subnet belongs."""
        raise NotImplementedError

    def observe(
        self,
        weight: Tensor,
        grad: Tensor,
        grad_scale: float,
        rows: RowShard,
        outputs: slice = ALL,
    ) -> None:
        """``update``, with state from the first gradient on: zeros that were loaded before are made
        anew, for the weight may have been cut since."""
        if not self.seen:
            self.tensors = self.make_state(weight)
        self.seen = True
        self.update(weight, grad, grad_scale, rows, outputs)


class SensitivityObserver(Observer, kind="sensitivity"):
    """Importance and uncertainty of every weight (Eqs. 3-6): two float32 tensors ``[out, in]``
    (float64 of a float64 weight)."""

    bytes_per_weight = 8
    dtype: ClassVar[torch.dtype | None] = None

    def make_state(self, weight: Tensor) -> dict[str, Tensor]:
        dtype = self.dtype or accumulate_dtype(weight.dtype)
        return {
            name: torch.zeros(weight.shape, dtype=dtype, device=weight.device)
            for name in ("importance", "uncertainty")
        }

    def update(
        self, weight: Tensor, grad: Tensor, grad_scale: float, rows: RowShard, outputs: slice
    ) -> None:
        ops.importance_update_(
            self.tensors["importance"][outputs],
            self.tensors["uncertainty"][outputs],
            weight=weight[outputs],
            grad=grad,
            beta1=self.beta1,
            beta2=self.beta2,
            grad_scale=grad_scale,
        )

    def select(self, k_out: int, k_in: int, rows: RowShard, alignment: int) -> Subnet:
        return select_from_importance(
            **self.tensors, k_out=k_out, k_in=k_in, rows=rows, alignment=alignment
        )


class Bfloat16Observer(SensitivityObserver, kind="sensitivity_bfloat16"):
    """The same in half the memory."""

    bytes_per_weight = 4
    dtype = torch.bfloat16


class GradientObserver(Observer, kind="gradient"):
    """|g| of one optimizer step (ablation GL): the sum of its micro-batches' gradients, no
    smoothing."""

    last_step_only = True
    bytes_per_weight = 4

    def make_state(self, weight: Tensor) -> dict[str, Tensor]:
        dtype = accumulate_dtype(weight.dtype)
        return {"gradient": torch.zeros(weight.shape, dtype=dtype, device=weight.device)}

    def update(
        self, weight: Tensor, grad: Tensor, grad_scale: float, rows: RowShard, outputs: slice
    ) -> None:
        self.tensors["gradient"][outputs] += torch.where(grad.isfinite(), grad, 0)

    def select(self, k_out: int, k_in: int, rows: RowShard, alignment: int) -> Subnet:
        size = self.tensors["gradient"].abs()
        return select_from_importance(size, None, k_out, k_in, rows, alignment)


class MarginalObserver(Observer, kind="marginal"):
    """Row and column sums of the smoothed importance, ``out + in`` floats: sums of an EMA are the
    EMA of the sums."""

    replicated = ("in_importance",)
    bytes_per_weight = 0
    left_out: Tensor | bool = False  # whether a gradient was, as not finite

    def make_state(self, weight: Tensor) -> dict[str, Tensor]:
        dtype = accumulate_dtype(weight.dtype)
        return {
            name: torch.zeros(size, dtype=dtype, device=weight.device)
            for name, size in zip(("out_importance", "in_importance"), weight.shape, strict=True)
        }

    def update(
        self, weight: Tensor, grad: Tensor, grad_scale: float, rows: RowShard, outputs: slice
    ) -> None:
        out_sums, in_sums = ops.importance_marginals(weight[outputs], grad, grad_scale=grad_scale)
        in_sums = rows.all_reduce(in_sums)
        finite = in_sums.isfinite().all()  # what is not finite in a row is so in some column
        self.left_out = ~finite | self.left_out
        for name, sums, held in (
            ("out_importance", out_sums, self.tensors["out_importance"][outputs]),
            ("in_importance", in_sums, self.tensors["in_importance"]),
        ):
            # of the column sums the first block: those of the others add to it
            kept = held if name == "in_importance" and outputs.start else self.beta1 * held
            held.copy_(torch.where(finite, kept + (1 - self.beta1) * sums, held))

    def select(self, k_out: int, k_in: int, rows: RowShard, alignment: int) -> Subnet:
        out_sums = rows.all_gather(self.tensors["out_importance"])
        in_sums = self.tensors["in_importance"]
        subnet = select_from_marginals(out_sums, in_sums, k_out, k_in, alignment)
        if in_sums.any():
            return subnet
        return Subnet(subnet.out_idx, subnet.in_idx, captured=in_sums.new_tensor(torch.nan))


def make_observer(config: LoSiAConfig) -> Observer:
    """The observer that ``config.importance`` names."""
    return OBSERVERS[config.importance](config)


def new_subnet(layer: SubnetModule, observer: Observer, rows: RowShard) -> Subnet | None:
    """Where ``layer`` should move. Changes nothing.

    Returns:
        None if it stays: its slot had no gradient (it was not used), or an importance of zero
        everywhere, as a weight has that is zero.

    Raises:
        NonFiniteScoreError: naming the layer.
    """
    if not observer.seen:
        return None
    k_out, k_in = layer.subnet.shape
    try:
        subnet = observer.select(k_out, k_in, rows, layer.alignment)
    except NonFiniteScoreError as error:
        raise NonFiniteScoreError(f"{layer.name}: {error}; its subnet stays where it was") from None
    subnet.check((layer.out_features, layer.in_features), layer.name, layer.alignment)
    if subnet.shape != (k_out, k_in):
        raise ValueError(f"{layer.name}: {subnet.shape} was selected for a subnet of {k_out, k_in}")
    nothing = subnet.captured is not None and bool(subnet.captured.isnan())  # 0 / 0
    return None if nothing else subnet
