"""A layer's weight and its subnet hold the same values in two tensors: who has written which of
them since, and what the next use is to see."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..ops.adamw import write_subnet_
from ..parallel.placement import bit_sum, holds_values
from .subnet import Subnet

# which subnet, where it lies, writes to it; the same of the weight; which indices, writes to them
Counts = tuple[int, ...]


def trained_beside(name: str) -> str:
    """What is said of a weight that was set to train beside its subnet."""
    return (
        f"{name}: its weight requires a gradient, as after requires_grad_(True), and would be trained "
        f"beside its subnet: set weight.requires_grad_(False); modules_to_save trains modules in full"
    )


def computed(name: str, what: str = "weight") -> str:
    """What is said of a weight, or a subnet, that is no parameter any more."""
    return (
        f"{name}: its {what} is computed (by a parametrization such as spectral_norm, by weight_norm "
        f"or pruning), so that no subnet of it can be trained; remove that first"
    )


class Agreement:
    """What torch's counts of writes say of ``weight`` and ``subnet`` since they last agreed.

    ``unsure``: values are to be compared, whatever the counts say (a weight's ``.data`` is not
    counted). ``stepped_by``: the optimizer that has stepped the subnet and not written it back.
    ``before_access``: whether they agreed when somebody reached for the subnet's ``.data``, a bool
    tensor that nobody has waited for. ``left``: right after a move, where the subnet was and what
    it has left there.

    Args:
        buffers: the layer's, which have the indices.
    """

    def __init__(self, weight: Tensor, subnet: Tensor, buffers: Mapping[str, Any]):
        self._buffers = buffers
        self.note(weight, subnet)
        self.unsure = True

    def note(self, weight: Tensor, subnet: Tensor) -> None:
        """They agree now."""
        self._counts = self._count(weight, subnet)
        self._subnet_written = self._weight_written = self.unsure = False
        self.stepped_by: str | None = None
        self.before_access: Tensor | None = None
        self.left: tuple[Subnet, Tensor] | None = None

    def subnet_holds(self, subnet: Tensor) -> bool:
        """Whether the subnet has not been written."""
        then, now = self._counts, self._count(subnet, subnet)
        return then is not None and now is not None and then[:3] == now[:3]

    def indices_written(self, weight: Tensor, subnet: Tensor) -> bool:
        """Whether the indices were, by somebody who is none of the layer's methods."""
        then, now = self._counts, self._count(weight, subnet)
        return then is not None and now is not None and then[6:] != now[6:]

    def holds(self, weight: Tensor, subnet: Tensor) -> bool:
        """Whether neither has been written."""
        return not self.unsure and self._counts == self._count(weight, subnet)

    def written(self, weight: Tensor, subnet: Tensor) -> tuple[bool, bool] | None:
        """Whether the subnet, and whether the weight or the place in it; None of tensors that stand in for the layer's
        own for a while: those that FSDP gathers, ``functional_call``'s, and what is made in
        inference mode, where nothing is counted."""
        then, now = self._counts, self._count(weight, subnet)
        if then is None or now is None or then[0] != now[0] or not isinstance(weight, nn.Parameter):
            return None
        return (
            self._subnet_written or then[1:3] != now[1:3],
            self._weight_written or then[3:] != now[3:],
        )

    def carry(self, written: tuple[bool, bool] | None, weight: Tensor, subnet: Tensor) -> None:
        """The tensors are others than before, or were loaded: ``written`` is what had been or now
        was."""
        stepped_by = self.stepped_by
        self.note(weight, subnet)
        self._subnet_written, self._weight_written = written or (False, False)
        self.unsure, self.stepped_by = True, stepped_by

    def _count(self, weight: Tensor, subnet: Tensor) -> Counts | None:
        out_idx, in_idx = self._buffers["out_idx"], self._buffers["in_idx"]
        try:
            return (
                *(id(subnet), _place(subnet), subnet._version),
                *(id(weight), _place(weight), weight._version),
                *(id(out_idx), out_idx._version, id(in_idx), in_idx._version),
            )
        except RuntimeError:  # inference tensors
            return None


class InAgreement(nn.Module):
    """The half of a SubnetModule that keeps ``weight`` and ``subnet`` in agreement."""

    weight: Any
    matrix: Any
    out_idx: Tensor
    in_idx: Tensor
    subnet: nn.Parameter
    name: str
    alignment: int
    out_features: int
    in_features: int
    used_in: int
    moves: int
    _agreement: Agreement

    def held(self, name: str) -> Any:
        """The parameter of that name, in a third of the time that torch's own search takes."""
        parameters = self._parameters
        return parameters[name] if name in parameters else getattr(self, name)

    @property
    def indices(self) -> tuple[Tensor, Tensor]:
        """``out_idx`` and ``in_idx``, as fast as ``held``."""
        return self._buffers["out_idx"], self._buffers["in_idx"]  # type: ignore[return-value]

    def lies_at(self) -> tuple[int, ...]:
        """Differs once any of the layer's tensors is another one, or lies elsewhere."""
        tensors = self.held("weight"), self.held("subnet"), *self.indices
        return tuple(number for each in tensors for number in (id(each), _place(each)))

    @property
    def current_subnet(self) -> Subnet:
        """The neurons being trained (shares the indices)."""
        return Subnet(self.out_idx, self.in_idx)

    def note_agreement_(self) -> None:
        """Weight and subnet hold the same values now: whoever has written both says so."""
        self._agreement.note(self.held("weight"), self.held("subnet"))

    def note_stepped_(self, optimizer: str) -> None:
        """An optimizer of that name has stepped the subnet, and nobody has written it back."""
        self._check_not_computed()
        self._agreement.stepped_by = optimizer

    def stands_in(self, subnet: Tensor) -> bool:
        """Whether ``subnet``, a tensor that is no parameter, has taken the own one's place for a while,
        alone, as ``functional_call`` gives it: then the weight does not have its values.

        Raises RuntimeError if the layer has none of its own any more. Compiled code asks nothing.
        """
        if torch.compiler.is_compiling():
            return False
        if "subnet" not in self._parameters and not hasattr(self, "_is_replica"):  # DataParallel's
            raise RuntimeError(computed(self.name, "subnet"))
        return type(subnet) is Tensor and type(self.held("weight")) is not Tensor

    def matrix_with(self, subnet: Tensor) -> Tensor:
        """``matrix`` with ``subnet`` in its place, differentiable for it as often as asked."""
        matrix = self.matrix.detach()
        return matrix.index_put((self.out_idx[:, None], self.in_idx), subnet.to(matrix.dtype))

    def _check_not_computed(self) -> None:
        if type(self.held("weight")) is Tensor:
            raise ValueError(computed(self.name))

    @torch.no_grad()
    def note_access_(self) -> None:
        """Somebody is about to write the subnet past torch. If the weight has other values by now,
        it was written too, before, as where a model changes places with an average of it."""
        weight, subnet, agreement = self.weight, self.subnet, self._agreement
        here = holds_values(weight, subnet) and weight.device == subnet.device
        if here and agreement.subnet_holds(subnet):
            block = self.current_subnet.gather(self.matrix)
            agreed = (block == subnet.detach().to(block.dtype)).all()
            if agreement.left is not None:
                place, values = agreement.left
                agreed &= bit_sum(place.gather(self.matrix)) == values
            agreement.before_access = agreed

    def _note_left_(self, place: Subnet) -> None:
        """The subnet has moved from ``place``. Where nothing was trained yet an average of the weight
        is the weight, and only what was left shows that the weight was written."""
        self._agreement.left = place, bit_sum(place.gather(self.matrix.detach()))

    def _subnet_counts(self) -> bool | None:
        """What the next use is to see, where the two differ: whether the subnet, else the weight.
        What was written alone counts, and of both the weight. None: they agree.

        Values are compared, and the GPU waited for, only after writes by others.
        """
        weight, subnet, agreement = self.held("weight"), self.held("subnet"), self._agreement
        if agreement.holds(weight, subnet):
            return None
        written = agreement.written(weight, subnet)
        if written is None or not holds_values(weight, subnet):
            return None
        if self._agree(self.matrix, subnet, self.current_subnet):
            self.note_agreement_()
            return None
        agreed = agreement.before_access
        return written == (True, False) and (agreed is None or bool(agreed))

    def sync_(self, finish: bool = False) -> None:
        """Make weight and subnet agree where others have written one of them, or moved the subnet
        by writing its indices.

        Args:
            finish: also write back what an optimizer has stepped that does not do so itself.

        Raises:
            RuntimeError: there is such a step, without ``finish``.
            ValueError: the indices are none.
        """
        subnet_counts, optimizer = self._subnet_counts(), self._agreement.stepped_by
        if subnet_counts is None:
            return
        if not subnet_counts:
            if self._agreement.indices_written(self.held("weight"), self.held("subnet")):
                features = self.out_features, self.in_features
                self.current_subnet.check(features, self.name, self.alignment)
                self.moves += 1
                self.subnet.grad = None  # of the old place
            self.read_subnet_()
        elif finish or optimizer is None:
            self.write_back_()
        else:
            raise RuntimeError(
                f"{self.name}: an optimizer has stepped the subnet, but its values are not in the "
                f"weight, with which the model computes: {optimizer} alone does not write them back; "
                f"use LoSiAAdamW, attach(optimizer, model), or write_back_() after each step"
            )

    def sync_before_use_(self, training: bool) -> None:
        """``sync_``, but an evaluation warns where training would raise, and compiled code asks
        nothing."""
        if torch.compiler.is_compiling():
            return
        # not by torch's own setting, which first looks among parameters, buffers and modules
        self.__dict__["used_in"] = torch._C._current_graph_task_id()
        optimizer = self._agreement.stepped_by
        if training or optimizer is None or not self._subnet_counts():
            self.sync_()
        else:
            warnings.warn(
                f"LoSiA: {optimizer} has stepped subnets, and nobody has written them back: this "
                f"evaluation computes with the weights of before that step",
                stacklevel=3,
            )

    @staticmethod
    def _agree(matrix: Tensor, values: Tensor, subnet: Subnet) -> bool:
        """Nothing differs where nothing can be read."""
        readable = holds_values(matrix, values)
        return not readable or torch.equal(subnet.gather(matrix), values.to(matrix.dtype))

    @torch.no_grad()
    def current_weight(self) -> Tensor:
        """The weight as a use would find it: itself, or a copy with the subnet's values where those
        count and are not in it yet. Changes nothing."""
        if not self._subnet_counts():
            return self.weight.detach()
        copied = self.weight.detach().clone()
        matrix = copied if self.matrix is self.weight else copied.T
        matrix[self.out_idx[:, None], self.in_idx] = self.subnet.to(matrix.dtype)
        return copied

    @torch.no_grad()
    def write_back_(self) -> None:
        """Round ``subnet`` into ``weight``: after the step of an optimizer that knows nothing of
        the weight. Raises ValueError for a weight that is computed."""
        self._check_not_computed()
        write_subnet_(self.matrix, self.out_idx, self.in_idx, self.subnet)
        self.note_agreement_()

    @torch.no_grad()
    def read_subnet_(self) -> None:
        """Fill ``subnet`` from ``weight``: after something else has written the weight."""
        self.subnet.copy_(self.current_subnet.gather(self.matrix))
        self.note_agreement_()


def _place(tensor: Tensor) -> int:
    return 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()
