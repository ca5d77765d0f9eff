"""Processes that train one model together: what they judge by is the same, and they are told when
they differ.

PyTorch's engines move gradients and weights; here is only what they cannot know: an observed
gradient must be that of all ranks, and every rank must take the same decision. Of one process every
collective is the identity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20  # DDP's: tensors up to this size travel together


class RanksDifferError(RuntimeError):
    """The processes of a run do not hold the same model, config, seed or step; raised on each."""


@dataclass(frozen=True)
class Ranks:
    """The processes that hold replicas or shards of one model.

    Args:
        group: their process group; None is this process alone.
    """

    group: "dist.ProcessGroup | None" = None

    @classmethod
    def of(cls, model: nn.Module, group: "dist.ProcessGroup | None" = None) -> "Ranks":
        """``group``, else the one of ``model``'s DistributedDataParallel, else all processes that
        were started."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        if group is None:
            replicated = isinstance(model, nn.parallel.DistributedDataParallel)
            group = model.process_group if replicated else dist.group.WORLD  # type: ignore[assignment]
        return cls(group)

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This process's number among them."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def all_reduce_mean_(self, grad: Tensor) -> Tensor:
        """``grad`` averaged over the ranks, in place, with the same bits everywhere; as DDP does,
        in its own dtype."""
        if self.size > 1:
            dist.all_reduce(grad.div_(self.size), group=self.group)
        return grad

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the ranks, in place; small ones travel together."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            if len(bucket) == 1:
                dist.all_reduce(bucket[0], group=self.group)
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat, group=self.group)
            totals = flat.split([tensor.numel() for tensor in bucket])
            for tensor, total in zip(bucket, totals, strict=True):
                tensor.copy_(total.view_as(tensor))

    def all_reduce_max_(self, tensor: Tensor) -> Tensor:
        """The largest of the ranks' values, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def total(self, count: Tensor) -> int:
        """The sum over the ranks of an integer that each has."""
        count = count.clone()
        self.all_reduce_([count])
        return int(count)

    def any_rank(self, flag: bool) -> bool:
        """Whether ``flag`` is set on at least one rank."""
        return any(self._all_gather_objects(flag))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def check_same(
        self, values: dict[str, object], fingerprints: dict[str, int | None] | None = None
    ) -> None:
        """Raise RanksDifferError, naming what and where, unless all ranks hold the same.

        Args:
            values: named in the error with what each rank has.
            fingerprints: named without; None fits any. Small, but the ranks wait for each other.
        """
        if self.size == 1:
            return
        mine = fingerprints or {}
        everyone = self._all_gather_objects((values, mine))
        names = [set(theirs[1]) for theirs in everyone]
        for name in sorted(set.union(*names) - set.intersection(*names)):
            lacking = ", ".join(str(rank) for rank, held in enumerate(names) if name not in held)
            raise RanksDifferError(
                f"the ranks hold models of different layers: {name} is not on rank {lacking}"
            )
        problems = []
        for name in values:
            held = [theirs[0].get(name) for theirs in everyone]
            if any(value != held[0] for value in held):
                each = ", ".join(f"{value!r} (rank {rank})" for rank, value in enumerate(held))
                problems.append(f"{name} is {each}")
        for name in mine:
            held = [theirs[1][name] for theirs in everyone]
            others = [rank for rank, value in enumerate(held) if value != held[0]]
            if others and None not in held:
                ranks = ", ".join(map(str, others))
                problems.append(f"{name} of rank {ranks} is not that of rank 0")
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise RanksDifferError(
                f"the ranks do not train one model: {'; '.join(problems[:5])}{more}"
            )

    def _all_gather_objects(self, value: Any) -> list:
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.group)
        return everyone


@dataclass(frozen=True)
class RowShard:
    """The rows ``start`` to ``stop`` of a ``[size, ...]`` tensor that a rank holds: all of them
    where there is one rank.

    Ranks hold ``chunk = ceil(size / ranks)`` rows each, the last ones fewer or none (torch.chunk's
    rule, and so ``fully_shard``'s).
    """

    ranks: Ranks
    size: int

    @property
    def chunk(self) -> int:
        return -(-self.size // self.ranks.size)

    @property
    def start(self) -> int:
        return min(self.chunk * self.ranks.rank, self.size)

    @property
    def stop(self) -> int:
        return min(self.start + self.chunk, self.size)

    def local(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor that is whole here."""
        return whole[self.start : self.stop]

    def reduce_scatter_mean(self, grad: Tensor) -> Tensor:
        """This rank's rows of the mean over the ranks of ``grad [size, ...]``, overwritten."""
        if self.ranks.size == 1:
            return grad
        padded = _pad(grad.div_(self.ranks.size), self.chunk * self.ranks.size)
        local = grad.new_empty(self.chunk, *grad.shape[1:])
        _reduce_scatter(local, padded, group=self.ranks.group)
        return local[: self.stop - self.start]

    def all_gather(self, local: Tensor) -> Tensor:
        """The whole ``[size, ...]`` of every rank's ``local [stop - start, ...]``."""
        if self.ranks.size == 1:
            return local
        whole = local.new_empty(self.chunk * self.ranks.size, *local.shape[1:])
        _all_gather(whole, _pad(local, self.chunk), group=self.ranks.group)
        return whole[: self.size]

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum over the ranks of ``partial``, which each has made from its own rows."""
        if self.ranks.size == 1:
            return partial
        total = partial.clone()
        self.ranks.all_reduce_([total])
        return total

    def find(self, sorted_idx: Tensor) -> tuple[slice, Tensor]:
        """Which of ``sorted_idx`` are rows that this rank holds, and their places among those.

        Of several ranks this waits for the GPU.
        """
        if self.ranks.size == 1:
            return slice(None), sorted_idx
        bounds = torch.tensor([self.start, self.stop], device=sorted_idx.device)
        here = slice(*torch.searchsorted(sorted_idx, bounds).tolist())
        return here, sorted_idx[here] - self.start


def all_gather_rows(local: Sequence[Tensor], shards: Sequence[RowShard]) -> list[Tensor]:
    """``shard.all_gather`` of several tensors of one dtype, in one collective."""
    if not local:
        return []
    ranks = shards[0].ranks
    padded = [_pad(tensor, shard.chunk) for tensor, shard in zip(local, shards, strict=True)]
    flat = torch.cat([tensor.reshape(-1) for tensor in padded])
    whole = flat.new_empty(ranks.size, flat.numel())
    _all_gather(whole.view(-1), flat, group=ranks.group)
    pieces = whole.split([tensor.numel() for tensor in padded], dim=1)  # each [ranks, chunk * ...]
    return [
        piece.reshape(-1, *tensor.shape[1:])[: shard.size]
        for piece, tensor, shard in zip(pieces, padded, shards, strict=True)
    ]


def several_processes() -> bool:
    """Whether this process is one of several that torchrun or the like started."""
    return dist.is_available() and (dist.is_initialized() or dist.is_torchelastic_launched())


def _pad(tensor: Tensor, rows: int) -> Tensor:
    if len(tensor) == rows:
        return tensor.contiguous()
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


# Both were renamed in torch 2.13.
def _reduce_scatter(local: Tensor, whole: Tensor, group: "dist.ProcessGroup | None") -> None:
    collective = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    collective(local, whole, group=group)


def _all_gather(whole: Tensor, local: Tensor, group: "dist.ProcessGroup | None") -> None:
    collective = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    collective(whole, local, group=group)


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype and device, up to BUCKET_BYTES together."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        kind = tensor.dtype, tensor.device
        full = not buckets or tensor.nbytes > room
        if full or kind != (buckets[-1][0].dtype, buckets[-1][0].device):
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(tensor)
        room -= tensor.nbytes
    return buckets
