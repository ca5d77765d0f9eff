"""Processes that train one model together: what they judge by is the same, and they are told when they differ.

PyTorch's engines move gradients and weights; here is only what they cannot know: an observed gradient must be that of
all ranks, and every rank must take the same decision.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20  # DDP's: tensors up to this size travel together


class RanksDifferError(RuntimeError):
    """The processes of a run do not hold the same model, config, seed or step; raised on all of them."""


@dataclass(frozen=True)
class Ranks:
    """The processes that hold replicas or shards of one model; ``group`` None is this process alone."""

    group: "dist.ProcessGroup | None" = None

    @classmethod
    def of(cls, model: nn.Module, group: "dist.ProcessGroup | None" = None) -> "Ranks":
        """``group``, else the one of ``model``'s DistributedDataParallel, else all processes that were started."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        if group is None:
            group = model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else dist.group.WORLD
        return cls(group) if dist.get_world_size(group) > 1 else cls()

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def mean_(self, grad: Tensor) -> Tensor:
        """``grad`` averaged over the ranks, in place, with the same bits everywhere; as DDP does, in its own dtype."""
        if self.group is not None:
            dist.all_reduce(grad.div_(self.size), group=self.group)
        return grad

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the ranks, in place; small ones travel together."""
        if self.group is None:
            return
        for bucket in _buckets(tensors):
            if len(bucket) == 1:
                dist.all_reduce(bucket[0], group=self.group)
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat, group=self.group)
            for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def any(self, flags: list[bool]) -> list[bool]:
        """Which of ``flags`` are set on at least one rank."""
        return [any(ranks) for ranks in zip(*self._gather(flags), strict=True)]

    def check_same(self, values: dict[str, object], fingerprints: dict[str, int | None]) -> None:
        """Raise RanksDifferError, naming what and where, unless all ranks hold the same; None fits any fingerprint.

        ``values`` are told in the error, ``fingerprints`` only by name. Small, but the ranks wait for each other.
        """
        if self.group is None:
            return
        everyone = self._gather((values, fingerprints))
        if any(theirs[1].keys() != fingerprints.keys() for theirs in everyone):
            raise RanksDifferError("the ranks hold models of different layers")
        problems = []
        for name in values:
            told = [theirs[0].get(name) for theirs in everyone]
            if any(value != told[0] for value in told):
                problems.append(f"{name} is {', '.join(f'{value!r} (rank {rank})' for rank, value in enumerate(told))}")
        for name in fingerprints:
            told = [theirs[1][name] for theirs in everyone]
            others = [rank for rank, value in enumerate(told) if value != told[0]]
            if others and None not in told:
                problems.append(f"{name} of rank {', '.join(map(str, others))} is not that of rank 0")
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise RanksDifferError(f"the ranks do not train one model: {'; '.join(problems[:5])}{more}")

    def _gather(self, value: object) -> list:
        if self.group is None:
            return [value]
        everyone = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.group)
        return everyone


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as fully_shard makes of parameters."""
    return hasattr(tensor, "device_mesh")  # no isinstance: that import takes as long as torch's own


def refuse_join(model: nn.Module) -> None:
    """Make a DistributedDataParallel raise RuntimeError in ``join``, where a rank without data takes no more steps."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.register_forward_pre_hook(_refuse_join)


def _refuse_join(model: nn.parallel.DistributedDataParallel, args: tuple) -> None:
    if model._join_config.enable:
        raise RuntimeError(
            "LoSiA: a rank that DDP's join lets run out of data would keep its old subnets and optimizer state; give "
            "every rank as many batches (DistributedSampler does), or repeat one with its loss multiplied by 0"
        )


def several_processes() -> bool:
    """Whether this process is one of several that torchrun or the like started."""
    return dist.is_available() and (dist.is_initialized() or dist.is_torchelastic_launched())


def fingerprint(tensor: Tensor) -> int | None:
    """The sum of a tensor's bits, equal for equal tensors; None for one that is sharded or on "meta"."""
    if is_sharded(tensor) or tensor.is_meta:
        return None
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().view(integers).sum(dtype=torch.int64))


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype and device, up to BUCKET_BYTES together."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        kind = tensor.dtype, tensor.device
        if not buckets or tensor.nbytes > room or kind != (buckets[-1][0].dtype, buckets[-1][0].device):
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(tensor)
        room -= tensor.nbytes
    return buckets
