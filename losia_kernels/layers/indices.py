"""Where a subnet is, kept where nobody averages it."""

from typing import Any

NAMES = ("out_idx", "in_idx")


class Indices(dict):
    """A module's buffers, of which ``items()``, and with it the ``buffers()`` of a model, leaves out
    a subnet's indices.

    What averages a model's buffers (AveragedModel, Lightning's weight averaging) would make places
    out of them that are none, and DistributedDataParallel would send them round at every forward.
    By name they are buffers for everybody.
    """

    def items(self) -> Any:
        return {name: value for name, value in dict.items(self) if name not in NAMES}.items()

    def __reduce__(self) -> tuple:
        return Indices, (dict(dict.items(self)),)
