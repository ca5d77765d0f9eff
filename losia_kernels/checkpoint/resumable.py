"""Checkpoints through torch.distributed.checkpoint: every rank writes and reads what it holds.

A checkpoint is a folder that is whole or not there. One process, DDP and FSDP2 read each other's,
on any number of ranks, bit for bit.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from ..layers.convert import export_state_dict
from ..layers.module import losia_layers
from ..parallel.placement import empty_placed_as, whole
from ..parallel.ranks import Ranks
from ..training.checks import parameters_of
from ..training.importance import OBSERVERS
from ..training.timeline import Timeline
from .checksums import FILES, all_files, checksums, find_damage, read_sealed, write_sealed
from .folder import MARKER
from .reading import check_archive
from .shards import ShardReader
from .writing import beside_of, new_folder

# parameter groups, clock, and what else is no tensor of the model's or optimizer's
RUN = "losia.pt"


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: Any = None,
    timeline: Timeline | None = None,
) -> None:
    """Save model, optimizer and clock; call it on all ranks, which share the file system.

    Args:
        folder: the new folder.
        model: converted, and wrapped or not.
        optimizer: a LoSiAAdamW, or one that ``attach`` was given.
        extra: tensors and plain Python that ``load_checkpoint`` gives back (a scheduler's state,
            the place in the data), rank 0's.
        timeline: what ``attach`` returned; a LoSiAAdamW has its own.

    Raises:
        FileExistsError: if ``folder`` exists.
        ValueError: for a PEFT model, and if ``folder`` cannot be written.
    """
    folder = Path(folder)
    beside = beside_of(folder)
    ranks = (timeline or optimizer.timeline).ranks  # type: ignore[attr-defined]
    first = ranks.rank == 0
    if ranks.any_rank(first and folder.exists()):
        raise FileExistsError(f"{folder} exists: name a new folder")
    tensors = {f"model.{name}": tensor for name, tensor in _model_tensors(model).items()}
    names = _names(model, optimizer)
    state_dict = optimizer.state_dict()
    for i, state in state_dict["state"].items():
        tensors |= {
            f"optimizer.{names[i]}:{kind}": value
            for kind, value in state.items()
            if isinstance(value, Tensor)
        }
    run = {"param_groups": state_dict["param_groups"], "names": names, "extra": extra}
    with ExitStack() as stack:
        failure: Exception | None = None
        try:
            if first:
                stack.enter_context(new_folder(folder))
                torch.save(run, beside / RUN)
        except (OSError, ValueError, RuntimeError) as error:
            failure = error
        if ranks.any_rank(failure is not None):
            raise failure or OSError(f"the first process cannot write {folder}")
        dcp.save(
            tensors, checkpoint_id=beside, process_group=ranks.group, no_dist=ranks.group is None
        )
        ranks.barrier()
        if first:
            write_sealed(beside / MARKER, {"files": checksums(beside, all_files(beside))})
    ranks.barrier()


def load_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    timeline: Timeline | None = None,
) -> Any:
    """Restore what ``save_checkpoint`` saved, on any number of ranks; call it on all of them.

    Args:
        folder: the checkpoint.
        model: converted, and wrapped or not.
        optimizer: new, of the kind that was saved.
        timeline: what ``attach`` returned; a LoSiAAdamW has its own.

    Returns:
        The ``extra`` that was saved.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it is damaged, or of another model, config or parameter groups.
    """
    folder = Path(folder)
    timeline = timeline or optimizer.timeline  # type: ignore[attr-defined]
    _check_files(folder, timeline.ranks)
    check_archive(folder / RUN, (folder / RUN).stat().st_size, folder / RUN)
    run = torch.load(folder / RUN, weights_only=True)
    if not isinstance(run, dict) or run.keys() != {"param_groups", "names", "extra"}:
        raise ValueError(f"{folder / RUN} is of another kind")
    names = _names(model, optimizer)
    reader = ShardReader(folder)
    saved = reader.read_metadata().state_dict_metadata
    targets = {f"model.{name}": tensor for name, tensor in _model_tensors(model).items()}
    others = sorted(targets.keys() ^ {key for key in saved if key.startswith("model.")})
    if others or names != run["names"]:
        raise ValueError(
            f"{folder} is of another model or of other parameter groups; one side lacks {others[:4]}"
        )
    parameters = dict(zip(names, parameters_of(optimizer), strict=True))
    for key, entry in saved.items():
        if key.startswith("optimizer."):
            name, _, kind = key.removeprefix("optimizer.").rpartition(":")
            if name not in parameters:
                raise ValueError(f"{folder} has a state of {name}, which the optimizer has not")
            targets[key] = _empty(entry, kind, parameters[name])
    dcp.load(
        targets,
        storage_reader=reader,
        process_group=timeline.ranks.group,
        no_dist=timeline.ranks.group is None,
    )
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in targets.items():
        if key.startswith("optimizer."):
            name, _, kind = key.removeprefix("optimizer.").rpartition(":")
            state.setdefault(names.index(name), {})[kind] = value
    optimizer.load_state_dict({"state": state, "param_groups": run["param_groups"]})
    return run["extra"]


def _check_files(folder: Path, ranks: Ranks) -> None:
    """Raises ValueError, on every rank, if a file of the checkpoint is not as it was saved; each
    rank reads its share."""
    if not (folder / RUN).exists():
        raise FileNotFoundError(f"no checkpoint {folder}: it has no {RUN}")
    files = read_sealed(folder / MARKER, {"files": FILES})["files"]
    share = {name: files[name] for name in sorted(files)[ranks.rank :: ranks.size]}
    damage = find_damage(folder, share, folder / MARKER)
    if ranks.any_rank(damage is not None):
        raise ValueError(f"{folder}: {damage or 'damaged, as another process says'}")


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The plain model's state dict with every tensor whole, on rank 0's CPU; call it on all ranks.

    Args:
        model: converted, and wrapped or not. Its shards are gathered one tensor at a time: a GPU
            never holds more of the model than its shards and one weight.

    Returns:
        What ``export_state_dict`` names on rank 0, nothing on the others.
    """
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    tied = {
        _plain(name): id(value) for name, value in model.named_parameters(remove_duplicate=False)
    }
    gathered: dict[int | str, Any] = {}  # once for all names of a tied weight
    named = {}
    for name, tensor in export_state_dict(model).items():
        key = tied.get(name, name)
        if key not in gathered:
            tensor = whole(tensor)
            gathered[key] = tensor.detach().to("cpu", copy=True) if first else None
        if first:
            named[name] = gathered[key]
    return named


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors by the keys of its state dict: loading writes to them. Raises
    ValueError for one that is made for the state dict."""
    kept = {
        *dict(model.named_parameters(remove_duplicate=False)),
        *dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, _ in losia_layers(model):
        kept |= {f"{name}.{key}".removeprefix(".") for key in ("out_idx", "in_idx")}
    tensors = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            continue
        if name not in kept:
            raise ValueError(
                f"{name} is no parameter or buffer, so nothing could be loaded into it; of a PEFT model "
                f"save the adapter (save_pretrained) and optimizer.state_dict()"
            )
        tensors[_plain(name)] = value.detach()
    return tensors


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in its order."""
    named = {id(parameter): _plain(name) for name, parameter in model.named_parameters()}
    return [named[id(parameter)] for parameter in parameters_of(optimizer)]


def _plain(name: str) -> str:
    """A name without what DDP and torch.compile add to it."""
    return name.removeprefix("module.").replace("_orig_mod.", "")


def _is_replicated(kind: str) -> bool:
    """Whether every rank holds that part of an optimizer's state whole."""
    names = {name for observer in OBSERVERS.values() for name in observer.replicated}
    return kind == "step" or kind.removeprefix("losia_") in names


def _empty(entry: Any, kind: str, parameter: Tensor) -> Tensor:
    """Where to load a tensor of ``parameter``'s state to: laid out as the parameter is now."""
    size, dtype = entry.size, entry.properties.dtype
    if not _is_replicated(kind):
        return empty_placed_as(parameter, size, dtype)
    return torch.empty(size, dtype=dtype, device=parameter.device if len(size) else "cpu")
