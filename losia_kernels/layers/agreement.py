"""A layer's weight and its subnet hold the same values in two tensors: who has written which of
them since."""

from torch import Tensor, nn

Counts = tuple[int, int, int, int]  # which subnet, writes to it, which weight, writes to it


class Agreement:
    """What torch's counts of writes say of ``weight`` and ``subnet`` since they last agreed.

    ``unsure``: values are to be compared, whatever the counts say (``tensor.data`` is not counted).
    ``loaded``: what was written came out of a file.
    """

    def __init__(self, weight: Tensor, subnet: Tensor):
        self.note(weight, subnet)
        self.unsure = True

    def note(self, weight: Tensor, subnet: Tensor) -> None:
        """They agree now."""
        self._counts = _count(weight, subnet)
        self._stepped = self._edited = self.unsure = self.loaded = False

    def holds(self, weight: Tensor, subnet: Tensor) -> bool:
        """Whether neither has been written."""
        return not self.unsure and self._counts == _count(weight, subnet)

    def written(self, weight: Tensor, subnet: Tensor) -> tuple[bool, bool] | None:
        """Whether the subnet, and whether the weight; None of tensors that stand in for the layer's
        own for a while: those that FSDP gathers, ``functional_call``'s, and what is made in
        inference mode, where nothing is counted."""
        then, now = self._counts, _count(weight, subnet)
        if then is None or now is None or then[0] != now[0] or not isinstance(weight, nn.Parameter):
            return None
        return self._stepped or then[1] != now[1], self._edited or then[2:] != now[2:]

    def carry(
        self,
        written: tuple[bool, bool] | None,
        weight: Tensor,
        subnet: Tensor,
        loaded: bool = False,
    ) -> None:
        """The tensors are others than before, or were loaded: ``written`` is what had been or now
        was."""
        loaded = loaded or self.loaded
        self.note(weight, subnet)
        self._stepped, self._edited = written or (False, False)
        self.unsure, self.loaded = True, loaded


def _count(weight: Tensor, subnet: Tensor) -> Counts | None:
    try:
        return id(subnet), subnet._version, id(weight), weight._version
    except RuntimeError:  # inference tensors
        return None
