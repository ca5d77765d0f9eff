"""Where a weight lives: whole on every rank, or cut by rows. The only file that asks.

``Whole`` (one process, DDP) and ``Sharded`` (FSDP2) have the same methods, which is all that the
optimizer and the timeline know of it. The functions beside them take any tensor, cut or not.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .ranks import Ranks, RowShard, all_gather_rows

NO_DEEPSPEED = (
    "LoSiA does not train under DeepSpeed, whose ZeRO optimizers own flat copies of the parameters: use FSDP2 "
    "(accelerate: fsdp_version: 2) or DDP"
)


class Neurons(Protocol):
    """Which outputs and inputs a subnet has."""

    @property
    def out_idx(self) -> Tensor: ...
    @property
    def in_idx(self) -> Tensor: ...


class Layer(Protocol):
    """What a placement needs of a layer. Parameters are looked up at each use: FSDP and accelerate
    exchange them."""

    name: str
    subnet: Any
    out_idx: Tensor
    in_idx: Tensor
    out_features: int
    moves: int

    @property
    def weight(self) -> Any: ...
    @property
    def matrix(self) -> Tensor: ...
    @property
    def indices(self) -> tuple[Tensor, Tensor]: ...
    def note_agreement_(self) -> None: ...
    def write_back_(self) -> None: ...
    def move_subnet_(self, subnet: Any) -> None: ...


Moves = Sequence[tuple[Layer, Neurons]]


class Whole:
    """Every rank has whole weights: one process, or replicas of them."""

    all_at_once = True  # the update of all layers may be in memory together
    cut = False

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    @property
    def part(self) -> int:
        """The number of what is here, among the parts of a tensor."""
        return 0

    def check(self, layer: Layer) -> None:
        """Raise ValueError if the layer cannot be trained so."""

    def check_gatherable(self, what: str, *dtypes: torch.dtype) -> None:
        """Raise ValueError, naming ``what``, if tensors of these dtypes cannot be kept so."""

    def check_complete(self, missing: bool, what: str) -> None:
        """Raise ValueError, ``what``, if state that was loaded is ``missing`` a part that others
        may have; of whole state what is missing was not there."""

    def local(self, tensor: Tensor) -> Tensor:
        """The part of a subnet, or of what belongs to one, that is here, to read and to write."""
        return tensor

    def rows(self, layer: Layer) -> RowShard:
        """The outputs of the layer that are here."""
        return RowShard(Ranks(), layer.out_features)

    def keep(self, layer: Layer, grad: Tensor) -> Tensor:
        """Of a dense gradient what is to be kept here until it is judged."""
        return grad

    def mean_of_kept(self, grad: Tensor) -> Tensor:
        """Of what all ranks have kept the mean (the memory of ``grad`` may be reused)."""
        return self.ranks.all_reduce_mean_(grad)

    def observed_weight(self, layer: Layer) -> Tensor:
        """What a mean gradient is judged by: the weight's outputs that it has."""
        return layer.matrix

    def target(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """Where an update writes its new values: a matrix, ``out_idx`` and ``in_idx`` of it."""
        return layer.matrix, *layer.indices

    def finish_(self, layers: Iterable[Layer]) -> None:
        """The subnets were updated, and their values written to ``target``: now the weights have
        them."""
        for layer in layers:
            layer.note_agreement_()

    def write_back_(self, layers: Iterable[Layer]) -> None:
        """Round the subnets into the weights."""
        for layer in layers:
            layer.write_back_()

    def move_(self, moves: Moves) -> None:
        """Put each layer's subnet where it is to be."""
        for layer, subnet in moves:
            layer.move_subnet_(subnet)


class Sharded:
    """``fully_shard`` has cut weights and subnets by rows, of which each rank holds some.

    The rows of a subnet lie on other ranks than those of the weight they belong to, so new values
    travel once: k_out x k_in of the weight's dtype a layer and step. Nothing of ``[out, in]`` is
    ever whole here but in FSDP's own forward.
    """

    all_at_once = False
    cut = True

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._found: weakref.WeakKeyDictionary[Layer, tuple] = weakref.WeakKeyDictionary()

    @property
    def part(self) -> int:
        return self.ranks.rank

    def check(self, layer: Layer) -> None:
        """Raise ValueError unless weight and subnet are cut by rows, over the ranks and nothing
        else."""
        for name in ("weight", "subnet"):
            tensor = getattr(layer, name)
            where = f"{layer.name}: {name}"
            if not _is_cut(tensor):
                raise ValueError(
                    f"{where} is not sharded, but other parts of the model are: leave it to "
                    f"fully_shard too"
                )
            mesh = tensor.device_mesh
            if mesh.ndim != 1 or not tensor.placements[0].is_shard(0):
                raise ValueError(
                    f"{where} is laid out as {tensor.placements} over {mesh.ndim} dimensions; "
                    f"LoSiA trains weights that fully_shard cuts by rows over one mesh dimension: "
                    f"no tensor parallelism, no replicas beside shards"
                )
            if mesh.size() != self.ranks.size or mesh.get_local_rank() != self.ranks.rank:
                raise ValueError(
                    f"{where} is sharded over other processes than process_group holds"
                )

    def check_gatherable(self, what: str, *dtypes: torch.dtype) -> None:
        if torch.int16 in dtypes:
            raise ValueError(f"{what} is not for shards, for no backend can gather int16")

    def check_complete(self, missing: bool, what: str) -> None:
        if missing:
            raise ValueError(what)

    def local(self, tensor: Tensor) -> Tensor:
        return local(tensor)

    def rows(self, layer: Layer) -> RowShard:
        return RowShard(self.ranks, layer.out_features)

    def keep(self, layer: Layer, grad: Tensor) -> Tensor:
        """This rank's rows of the mean, at once: a whole gradient is n times as large."""
        return self.rows(layer).reduce_scatter_mean(grad)

    def mean_of_kept(self, grad: Tensor) -> Tensor:
        return grad

    def observed_weight(self, layer: Layer) -> Tensor:
        """This rank's rows, whether FSDP has the weight gathered at the moment or not."""
        weight = layer.weight
        return local(weight) if _is_cut(weight) else self.rows(layer).local(weight)

    def target(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """A copy: where the new values belong in the weight is mostly on other ranks."""
        values = local(layer.subnet).to(layer.weight.dtype, copy=True)
        k_out, k_in = (torch.arange(size, device=values.device) for size in values.shape)
        return values, k_out, k_in

    def finish_(self, layers: Iterable[Layer]) -> None:
        self.write_back_(layers)

    @torch.no_grad()
    def write_back_(self, layers: Iterable[Layer]) -> None:
        """Round this rank's rows of the subnets into the rows of the weights, wherever those are;
        one collective."""
        travelling = []
        for layer in layers:
            if layer.subnet.shape == layer.weight.shape:  # its rows lie where the weight's do
                local(layer.weight).copy_(local(layer.subnet))
            else:
                travelling.append(layer)
        values = [local(layer.subnet).to(layer.weight.dtype) for layer in travelling]
        shards = [RowShard(self.ranks, len(layer.out_idx)) for layer in travelling]
        for layer, block in zip(travelling, all_gather_rows(values, shards), strict=True):
            here, out_idx = self._outputs_here(layer)
            weight = local(layer.weight)
            weight[out_idx[:, None], layer.in_idx.to(weight.device)] = block[here]

    @torch.no_grad()
    def move_(self, moves: Moves) -> None:
        """For weights that are current: every rank brings the rows it holds."""
        blocks = []
        for layer, subnet in moves:
            layer.out_idx.copy_(subnet.out_idx)
            layer.in_idx.copy_(subnet.in_idx)
            layer.moves += 1
            here, out_idx = self._outputs_here(layer)
            weight = local(layer.weight)
            block = torch.zeros(layer.subnet.shape, dtype=layer.subnet.dtype, device=weight.device)
            values = weight[out_idx[:, None], layer.in_idx.to(weight.device)]
            block[here] = values.to(block.dtype)
            blocks.append(block)
        self.ranks.all_reduce_(blocks)
        for (layer, _), block in zip(moves, blocks, strict=True):
            local(layer.subnet).copy_(RowShard(self.ranks, len(block)).local(block))

    def _outputs_here(self, layer: Layer) -> tuple[slice, Tensor]:
        """Which of ``out_idx`` are rows that this rank holds of the weight, and their places in its
        shard.

        Waits for the GPU only where torch has counted a write to ``out_idx`` since the last call.
        """
        out_idx = layer.out_idx
        known = self._found.get(layer)
        if known is None or known[0] is not out_idx or known[1] != out_idx._version:
            here, places = self.rows(layer).find(out_idx)
            found = here, places.to(layer.weight.device)
            known = self._found[layer] = out_idx, out_idx._version, found
        return known[2]


Placement = Whole | Sharded


def find_placement(model: nn.Module, layers: Iterable[Layer], ranks: Ranks) -> Placement:
    """Where the weights of ``layers`` live, at this moment.

    Raises ValueError if ``fully_shard`` was called on a model with a layer that stores its weight
    as ``[in, out]``: its rows are no outputs.
    """
    if ranks.group is None or not _uses_fully_shard(model):
        return Whole(ranks)
    for layer in layers:
        if layer.matrix is not layer.weight:
            raise ValueError(
                f"{layer.name}: fully_shard would cut the weight of a Conv1D, stored as [in, out], "
                f"by its inputs, which LoSiA cannot train; use DDP, or leave it out with "
                f"exclude_modules"
            )
    return Sharded(ranks)


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that is here, to read and to write."""
    return tensor.detach().to_local() if _is_cut(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``; of a cut one a collective that all ranks join."""
    return tensor.full_tensor() if _is_cut(tensor) else tensor  # type: ignore[attr-defined]


def placed_as(rows: Tensor, size: int, parameter: Tensor) -> Tensor:
    """This rank's ``rows`` of a ``[size, ...]`` tensor, laid out as ``parameter`` is: a DTensor
    where that is cut, for checkpoints."""
    if not _is_cut(parameter):
        return rows
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        rows,
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=torch.Size((size, *rows.shape[1:])),
        stride=rows.stride(),
    )


def empty_placed_as(parameter: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised ``[size, ...]`` tensor, laid out as ``parameter`` is."""
    if not _is_cut(parameter):
        return torch.empty(size, dtype=dtype, device=parameter.device)
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    rows = RowShard(Ranks(mesh.get_group()), size[0])
    device = local(parameter).device
    here = torch.empty(rows.stop - rows.start, *size[1:], dtype=dtype, device=device)
    return placed_as(here, size[0], parameter)


def holds_values(*tensors: Tensor) -> bool:
    """Whether each tensor's values are all here to be read: none is cut, fake or on "meta"."""
    return not any(
        tensor.is_meta or isinstance(tensor, FakeTensor) or _is_cut(tensor) for tensor in tensors
    )


def fingerprint(tensor: Tensor) -> int | None:
    """The sum of a tensor's bits, equal for equal tensors; None where its values are not here."""
    return int(bit_sum(tensor.detach())) if holds_values(tensor) else None


def bit_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits, a scalar that nobody has waited for."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()]).sum(dtype=torch.int64)


def is_gathered_for_use(model: nn.Module, weight: Tensor) -> bool:
    """Whether ``weight`` is whole for a forward of ``model`` alone, because FSDP2 cuts it."""
    return _is_cut(weight) or any(kind.__name__ == "FSDPModule" for kind in type(model).__mro__)


def check_whole(weight: Tensor, name: str, advice: str) -> None:
    """Raise ValueError, naming the layer and what to do, if its weight is cut already."""
    if owned_by_deepspeed(weight):
        raise ValueError(f"{name}: {NO_DEEPSPEED}")
    if _is_cut(weight):
        raise ValueError(f"{name}: the weight is sharded already; {advice}")


def owned_by_deepspeed(parameter: Tensor) -> bool:
    """Cut up by ZeRO-3, or a view into the flat copies of ZeRO-1 and 2."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def cut_parameters(module: nn.Module) -> Iterator[str]:
    """Names of the module's own parameters that are cut."""
    for name, parameter in module.named_parameters(recurse=False):
        if _is_cut(parameter):
            yield name


def _is_cut(tensor: Tensor) -> bool:
    """A DTensor, as fully_shard makes of parameters. No isinstance: that import takes as long as
    torch's own."""
    return hasattr(tensor, "device_mesh")


def _uses_fully_shard(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
