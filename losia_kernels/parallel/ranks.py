"""Processes that train one model together: what they judge by is the same, and they are told when
they differ.

PyTorch's engines move gradients and weights; here is only what they cannot know: an observed
gradient must be that of all ranks, every rank must take the same decision, and which rows of a
weight are here when fully_shard has cut it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20  # DDP's: tensors up to this size travel together


class RanksDifferError(RuntimeError):
    """The processes of a run do not hold the same model, config, seed or step; raised on all of
    them."""


@dataclass(frozen=True)
class Ranks:
    """The processes that hold replicas or shards of one model; ``group`` None is this process
    alone."""

    group: "dist.ProcessGroup | None" = None

    @classmethod
    def of(cls, model: nn.Module, group: "dist.ProcessGroup | None" = None) -> "Ranks":
        """``group``, else the one of ``model``'s DistributedDataParallel, else all processes that
        were started."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        if group is None:
            group = (
                model.process_group
                if isinstance(model, nn.parallel.DistributedDataParallel)
                else dist.group.WORLD
            )
        return cls(group)

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This process's number among them."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def mean_(self, grad: Tensor) -> Tensor:
        """``grad`` averaged over the ranks, in place, with the same bits everywhere; as DDP does,
        in its own dtype."""
        if self.size > 1:
            dist.all_reduce(grad.div_(self.size), group=self.group)
        return grad

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the ranks, in place; small ones travel together."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            if len(bucket) == 1:
                dist.all_reduce(bucket[0], group=self.group)
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat, group=self.group)
            for tensor, total in zip(
                bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True
            ):
                tensor.copy_(total.view_as(tensor))

    def total(self, count: Tensor) -> int:
        """The sum over the ranks of an integer that each has."""
        count = count.clone()
        self.sum_([count])
        return int(count)

    def any(self, flags: list[bool]) -> list[bool]:
        """Which of ``flags`` are set on at least one rank."""
        return [any(ranks) for ranks in zip(*self._gather(flags), strict=True)]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def check_same(self, values: dict[str, object], fingerprints: dict[str, int | None]) -> None:
        """Raise RanksDifferError, naming what and where, unless all ranks hold the same; None fits
        any fingerprint.

        ``values`` are told in the error, ``fingerprints`` only by name. Small, but the ranks wait
        for each other.
        """
        if self.size == 1:
            return
        everyone = self._gather((values, fingerprints))
        if any(theirs[1].keys() != fingerprints.keys() for theirs in everyone):
            raise RanksDifferError("the ranks hold models of different layers")
        problems = []
        for name in values:
            told = [theirs[0].get(name) for theirs in everyone]
            if any(value != told[0] for value in told):
                problems.append(
                    f"{name} is {', '.join(f'{value!r} (rank {rank})' for rank, value in enumerate(told))}"
                )
        for name in fingerprints:
            told = [theirs[1][name] for theirs in everyone]
            others = [rank for rank, value in enumerate(told) if value != told[0]]
            if others and None not in told:
                problems.append(
                    f"{name} of rank {', '.join(map(str, others))} is not that of rank 0"
                )
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise RanksDifferError(
                f"the ranks do not train one model: {'; '.join(problems[:5])}{more}"
            )

    def _gather(self, value: object) -> list:
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.group)
        return everyone


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as fully_shard makes of parameters."""
    return hasattr(tensor, "device_mesh")  # no isinstance: that import takes as long as torch's own


@dataclass(frozen=True)
class Rows:
    """The part of a ``[size, ...]`` tensor that a rank holds under fully_shard: rows ``start`` to
    ``stop``.

    Ranks hold ``chunk = ceil(size / ranks)`` rows each, the last ones fewer or none (torch.chunk's
    rule).
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

    def of(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor that is whole here."""
        return whole[self.start : self.stop]

    def scatter_mean(self, grad: Tensor) -> Tensor:
        """This rank's rows of the mean over the ranks of ``grad [size, ...]``, which is
        overwritten."""
        padded = _pad(grad.div_(self.ranks.size), self.chunk * self.ranks.size)
        own = grad.new_empty(self.chunk, *grad.shape[1:])
        _reduce_scatter(own, padded, group=self.ranks.group)
        return own[: self.stop - self.start]

    def gather(self, own: Tensor) -> Tensor:
        """The whole ``[size, ...]`` of every rank's ``own [stop - start, ...]``."""
        whole = own.new_empty(self.chunk * self.ranks.size, *own.shape[1:])
        _all_gather(whole, _pad(own, self.chunk), group=self.ranks.group)
        return whole[: self.size]

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over the ranks of ``partial``, which each has made from its own rows."""
        total = partial.clone()
        self.ranks.sum_([total])
        return total

    def span(self, sorted_idx: Tensor) -> tuple[int, int]:
        """Where in ``sorted_idx`` this rank's rows begin and end (waits for the GPU)."""
        bounds = torch.tensor([self.start, self.stop], device=sorted_idx.device)
        first, last = torch.searchsorted(sorted_idx, bounds).tolist()
        return first, last


def gather_together(own: Sequence[Tensor], rows: Sequence[Rows]) -> list[Tensor]:
    """``rows.gather`` of several tensors of one dtype, in one collective."""
    if not own:
        return []
    ranks = rows[0].ranks
    padded = [_pad(tensor, part.chunk) for tensor, part in zip(own, rows, strict=True)]
    flat = torch.cat([tensor.reshape(-1) for tensor in padded])
    whole = flat.new_empty(ranks.size, flat.numel())
    _all_gather(whole.view(-1), flat, group=ranks.group)
    pieces = whole.split([tensor.numel() for tensor in padded], dim=1)  # each [ranks, chunk * ...]
    return [
        piece.reshape(-1, *tensor.shape[1:])[: part.size]
        for piece, tensor, part in zip(pieces, padded, rows, strict=True)
    ]


def _pad(tensor: Tensor, rows: int) -> Tensor:
    if len(tensor) == rows:
        return tensor.contiguous()
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def _reduce_scatter(own: Tensor, whole: Tensor, group: "dist.ProcessGroup | None") -> None:
    getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(
        own, whole, group=group
    )  # renamed in torch 2.13


def _all_gather(whole: Tensor, own: Tensor, group: "dist.ProcessGroup | None") -> None:
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(whole, own, group=group)


def refuse_engines(model: nn.Module) -> None:
    """Raise ValueError, naming what to use instead, for ways to split a model that LoSiA cannot
    train in."""
    if not several_processes():
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    sharded: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                "LoSiA cannot train in FSDP1, which flattens a layer's parameters into one: use FSDP2, "
                "torch.distributed.fsdp.fully_shard (accelerate: fsdp_version: 2)"
            )
        if isinstance(module, FSDPModule):
            sharded.update(module.modules())
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            where = f"{name}.{key}"
            if hasattr(parameter, "ds_id"):
                raise ValueError(
                    f"{where} belongs to DeepSpeed's ZeRO-3, which LoSiA cannot train in: use FSDP2 "
                    f"(accelerate: fsdp_version: 2) or DDP"
                )
            if is_sharded(parameter) and module not in sharded:
                raise ValueError(
                    f"{where} is split by a tensor-parallel plan, which LoSiA cannot train in: shard the "
                    f"model by FSDP2 (fully_shard) instead, after apply_losia"
                )


def refuse_join(model: nn.Module) -> None:
    """Make a DistributedDataParallel raise RuntimeError in ``join``, where a rank without data
    takes no more steps."""
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
    """The sum of a tensor's bits, equal for equal tensors; None for one that is sharded or on
    "meta"."""
    if is_sharded(tensor) or tensor.is_meta:
        return None
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
        tensor.element_size()
    ]
    return int(tensor.detach().view(integers).sum(dtype=torch.int64))


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype and device, up to BUCKET_BYTES together."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        kind = tensor.dtype, tensor.device
        if (
            not buckets
            or tensor.nbytes > room
            or kind != (buckets[-1][0].dtype, buckets[-1][0].device)
        ):
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(tensor)
        room -= tensor.nbytes
    return buckets
