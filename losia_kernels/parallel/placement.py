"""Layers that ``fully_shard`` (FSDP2) has cut: weight and subnet are DTensors of which each rank
holds some rows.

The rows of a subnet lie on other ranks than those of the weight they belong to, so new values
travel once: k_out x k_in of the weight's dtype a layer and step. Nothing of ``[out, in]`` is ever
whole here but in FSDP's own forward. Parameters are looked up on the layers at each use: FSDP and
accelerate exchange them.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers.linear import LoSiAConv1D, LoSiALinear, losia_layers
from ..layers.subnet import Subnet
from .ranks import Ranks, Rows, gather_together, is_sharded

_OWN_OUTPUTS: "weakref.WeakKeyDictionary[LoSiALinear, tuple]" = (
    weakref.WeakKeyDictionary()
)  # found before


def uses_fully_shard(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has been called on the model or a part of it.

    Raises ValueError if a layer then stores its weight as ``[in, out]``: its rows are no outputs.
    """
    from torch.distributed.fsdp import FSDPModule

    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return False
    for name, layer in losia_layers(model):
        if isinstance(layer, LoSiAConv1D):
            raise ValueError(
                f"{name}: fully_shard would cut the weight of a Conv1D, stored as [in, out], by its "
                f"inputs, which LoSiA cannot train; use DDP, or leave it out with exclude_modules"
            )
    return True


def check_shards(layer: LoSiALinear, ranks: Ranks) -> None:
    """Raise ValueError unless weight and subnet are cut by rows, over ``ranks`` and nothing
    else."""
    for name in ("weight", "subnet"):
        tensor = getattr(layer, name)
        where = f"{layer.name}: {name}"
        if not is_sharded(tensor):
            raise ValueError(
                f"{where} is not sharded, but other parts of the model are: leave it to fully_shard too"
            )
        if tensor.device_mesh.ndim != 1 or not tensor.placements[0].is_shard(0):
            raise ValueError(
                f"{where} is laid out as {tensor.placements} over {tensor.device_mesh.ndim} dimensions; LoSiA trains "
                f"weights that fully_shard cuts by rows over one mesh dimension: no tensor parallelism, no replicas "
                f"beside shards"
            )
        if (
            tensor.device_mesh.size() != ranks.size
            or tensor.device_mesh.get_local_rank() != ranks.rank
        ):
            raise ValueError(f"{where} is sharded over other processes than process_group holds")


def own(tensor: Tensor) -> Tensor:
    """This rank's rows of a parameter, to read and to write."""
    return tensor.detach().to_local()  # type: ignore[attr-defined]


def as_shard(rows: Tensor, size: int, parameter: Tensor) -> Tensor:
    """This rank's ``rows`` of a ``[size, ...]`` tensor as a DTensor laid out as ``parameter``, for
    checkpoints."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        rows,
        parameter.device_mesh,
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=torch.Size((size, *rows.shape[1:])),
        stride=rows.stride(),
    )


@torch.no_grad()
def write_back_(layers: Sequence[LoSiALinear], ranks: Ranks) -> None:
    """Round this rank's rows of the subnets into the rows of the weights, wherever those are; one
    collective."""
    travelling = []
    for layer in layers:
        if layer.subnet.shape == layer.weight.shape:  # its rows lie where the weight's do
            own(layer.weight).copy_(own(layer.subnet))
        else:
            travelling.append(layer)
    values = [own(layer.subnet).to(layer.weight.dtype) for layer in travelling]
    blocks = gather_together(values, [Rows(ranks, len(layer.out_idx)) for layer in travelling])
    for layer, block in zip(travelling, blocks, strict=True):
        first, last, out_idx = _own_outputs(layer, ranks)
        weight = own(layer.weight)
        weight[out_idx[:, None], layer.in_idx.to(weight.device)] = block[first:last]


@torch.no_grad()
def move_subnets_(moves: Sequence[tuple[LoSiALinear, Subnet]], ranks: Ranks) -> None:
    """``move_subnet_`` for sharded layers whose weights are current: every rank brings the rows it
    holds."""
    blocks = []
    for layer, subnet in moves:
        layer.out_idx.copy_(subnet.out_idx)
        layer.in_idx.copy_(subnet.in_idx)
        first, last, out_idx = _own_outputs(layer, ranks)
        weight = own(layer.weight)
        block = torch.zeros(layer.subnet.shape, dtype=layer.subnet.dtype, device=weight.device)
        block[first:last] = weight[out_idx[:, None], layer.in_idx.to(weight.device)].to(block.dtype)
        blocks.append(block)
    ranks.sum_(blocks)
    for (layer, _), block in zip(moves, blocks, strict=True):
        own(layer.subnet).copy_(Rows(ranks, len(block)).of(block))


def _own_outputs(layer: LoSiALinear, ranks: Ranks) -> tuple[int, int, Tensor]:
    """Which of ``out_idx`` (from, to) are rows that this rank holds of the weight, and their places
    in its shard.

    Waits for the GPU only where torch has counted a write to ``out_idx`` since the last call.
    """
    out_idx = layer.out_idx
    known = _OWN_OUTPUTS.get(layer)
    if known is None or known[0] is not out_idx or known[1] != out_idx._version:
        rows = Rows(ranks, layer.out_features)
        first, last = rows.span(out_idx)
        places = (out_idx[first:last] - rows.start).to(layer.weight.device)
        known = _OWN_OUTPUTS[layer] = out_idx, out_idx._version, (first, last, places)
    return known[2]
