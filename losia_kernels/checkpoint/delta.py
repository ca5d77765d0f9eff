"""Deltas: what a training changed of its base, exactly, in a folder of the size of what it touched.

    delta.json            SHA-256 of every tensor of base and trained model, and what is stored of it;
                          of every other file of the delta
    blocks.safetensors    where they differ: per tensor, blocks of outputs x inputs
    trained/              values.safetensors: the final values of these blocks; files beside the weights that differ
    base/                 the same of the base; only ``subtract_delta`` needs it, so it may be deleted

Blocks are found by comparing bits, so nothing has to be recorded while training; ``blocks`` says
what they are.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .blocks import bits, find_blocks, put_, take
from .checksums import FILES, all_files, checksums, find_damage, read_sealed, write_sealed
from .folder import (
    DTYPES,
    ModelFolder,
    Spec,
    Tensors,
    Track,
    check_pair,
    copy_side_file,
    describe_spec,
    raw_bytes,
    sha256,
    size_of,
    untracked,
    write_model,
    write_tensors,
)
from .reading import check_no_link, check_side_name, read_json
from .writing import new_folder

RECORD, BLOCKS, VALUES = "delta.json", "blocks.safetensors", "values.safetensors"
VERSION = 1
SIDES = "base", "trained"
NAMED = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
_OF_SIDES = dict.fromkeys(SIDES, str)
SHAPE = {  # of delta.json
    "sha256": _OF_SIDES,
    "files": dict.fromkeys(SIDES, [str]),
    "aliases": dict.fromkeys(SIDES, {str: str}),
    "tensors": {str: {"shape": [int], "dtype": _OF_SIDES, "sha256": _OF_SIDES}},
    "checksums": FILES,
}


def make_delta(
    base: str | Path, trained: str | Path, output: str | Path, track: Track = untracked
) -> None:
    """Write what turns the model in ``base`` into the one in ``trained``, bit for bit.

    Args:
        base: the model before the training, a ``save_pretrained`` folder with safetensors.
        trained: the model after it. Where its dtype is another, the delta is to the base converted
            to that dtype.
        output: the new folder. In memory are one tensor of each model, and the delta.
        track: goes through the tensors' names, and may show how far it is.

    Raises:
        ValueError: if they are not base and result of one training, or ``output`` exists.
    """
    folders = {"base": ModelFolder(base), "trained": ModelFolder(trained)}
    names, aliases = check_pair(*folders.values())
    record: dict[str, Any] = {"format": "losia_kernels delta", "version": VERSION}
    record |= {
        "sha256": {},
        "files": {},
        "tensors": {},
        "aliases": dict(zip(SIDES, aliases, strict=True)),
    }
    blocks: dict[str, Tensor] = {}
    values: dict[str, dict[str, Tensor]] = {side: {} for side in folders}
    with new_folder(output) as beside:
        for name in track(names, "comparing"):
            record["tensors"][name], where, changed = _compare(name, folders)
            blocks |= {f"{name}.{part}": indices for part, indices in where.items()}
            for side, flat in changed.items():
                values[side][name] = flat
        _write_all(beside / BLOCKS, blocks)
        for side, folder in folders.items():
            record["sha256"][side] = _combined(record, side)
            record["files"][side] = folder.side_files()
            (beside / side).mkdir()
            _write_all(beside / side / VALUES, values[side])
            other = folders["base" if side == "trained" else "trained"].path
            for file in record["files"][side]:
                if (
                    not (other / file).is_file()
                    or (other / file).read_bytes() != (folder.path / file).read_bytes()
                ):
                    copy_side_file(file, folder.path, beside / side)
        record["checksums"] = checksums(beside, all_files(beside))
        write_sealed(beside / RECORD, record)


def verify_delta(base: str | Path, delta: str | Path, track: Track = untracked) -> str:
    """Hold a model to the base that a delta was made from.

    Args:
        base: a ``save_pretrained`` folder with safetensors.
        delta: a folder that ``make_delta`` wrote.
        track: goes through the tensors' names, and may show how far it is.

    Returns:
        The SHA-256 of the base's tensors, in hexadecimal digits.

    Raises:
        ValueError: if ``base`` is another model, naming the first tensor that differs.
    """
    opened = _Delta(delta)
    opened.check(ModelFolder(base), "base", track)
    return opened.record["sha256"]["base"]


def apply_delta(
    base: str | Path, delta: str | Path, output: str | Path, track: Track = untracked
) -> None:
    """Write base + delta, which is the trained model bit for bit.

    Args:
        base: the model that the delta was made from; it is verified before anything is written.
        delta: a folder that ``make_delta`` wrote; every changed tensor is held to its hash.
        output: the new folder.
        track: goes through the tensors' names, and may show how far it is.

    Raises:
        ValueError: for another base, a damaged delta, or if ``output`` exists.
    """
    _convert(base, delta, output, "base", "trained", track)


def subtract_delta(
    trained: str | Path, delta: str | Path, output: str | Path, track: Track = untracked
) -> None:
    """Write trained - delta, which is the base bit for bit.

    Args:
        trained: the trained model that the delta was made from; it is verified first.
        delta: a folder that ``make_delta`` wrote, with its ``base/``.
        output: the new folder.
        track: goes through the tensors' names, and may show how far it is.

    Raises:
        ValueError: as ``apply_delta``, if the delta's ``base/`` was deleted, and if the base's
            dtype held more than the trained one does: what rounding lost is not in the delta.
    """
    _convert(trained, delta, output, "trained", "base", track)


def describe_delta(delta: str | Path) -> str:
    """What a delta holds, as text: its base, its size beside the full model's, and every kind of
    tensor."""
    opened = _Delta(delta)
    tensors = opened.record["tensors"]
    changed = {name: entry for name, entry in tensors.items() if "blocks" in entry}
    full = size_of(opened.specs("trained").values())
    base = _folder_size(opened.path / "base") if (opened.path / "base").exists() else None
    size = _folder_size(opened.path) - (base or 0)
    lines = [
        f"base     sha256 {opened.record['sha256']['base']}",
        f"trained  sha256 {opened.record['sha256']['trained']}",
        f"size     {_mb(size)}, {100 * size / full:.2f} % of the model's {_mb(full)}; "
        + (
            f"and {_mb(base)} in base/, which only subtract needs"
            if base is not None
            else "without base/"
        ),
        f"changed  {len(changed)} of {len(tensors)} tensors, {sum(e['values'] for e in changed.values()):,} of "
        f"{sum(int(np.prod(e['shape'])) for e in tensors.values()):,} values",
        "",
    ]
    kinds: dict[tuple, list[dict]] = {}
    for name, entry in changed.items():
        kinds.setdefault((re.sub(r"\.\d+\.", ".*.", name), *entry["shape"]), []).append(entry)
    for (name, *shape), entries in kinds.items():
        share = sum(entry["values"] for entry in entries) / (len(entries) * np.prod(shape))
        blocks = sorted({entry["blocks"] for entry in entries})
        counts = f"{blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else blocks[0]
        lines.append(
            f"{len(entries):4} x {name}  {' x '.join(map(str, shape))}  {counts} blocks, {100 * share:.2f} %"
        )
    return "\n".join(lines)


def _compare(
    name: str, folders: dict[str, ModelFolder]
) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """What delta.json says of one tensor, and, if it has changed, where, and its values there on
    both sides."""
    tensors = {side: folder.get(name) for side, folder in folders.items()}
    entry = {
        "shape": list(tensors["base"].shape),
        "dtype": {
            side: str(tensor.dtype).removeprefix("torch.") for side, tensor in tensors.items()
        },
        "sha256": {side: sha256(name, tensor) for side, tensor in tensors.items()},
    }
    changed = bits(tensors["base"].to(tensors["trained"].dtype)) != bits(tensors["trained"])
    if not changed.any():
        return entry, {}, {}
    where = find_blocks(changed)
    values = {side: take(tensor, where) for side, tensor in tensors.items()}
    return (
        entry | {"blocks": len(where["out_counts"]), "values": len(values["base"])},
        where,
        values,
    )


def _convert(
    source: str | Path, delta: str | Path, output: str | Path, here: str, there: str, track: Track
) -> None:
    with new_folder(output) as beside:
        opened, folder = _Delta(delta), ModelFolder(source)
        if not (opened.path / there / VALUES).exists():
            raise ValueError(
                f"{delta} has no {there}/{VALUES}, from which the {there} model's values would come"
            )
        if there == "base":
            opened.check_reversible()
        opened.check(folder, here, track)
        values = Tensors(opened.path / there / VALUES)
        write_model(
            beside,
            folder,
            opened.specs(there),
            lambda name: opened.result(name, folder, values, there),
            track,
            opened.record["aliases"][there],
        )
        for file in opened.record["files"][there]:
            kept = opened.path / there
            origin = next((each for each in (kept, folder.path) if (each / file).is_file()), None)
            if origin is None:
                raise ValueError(f"{file} is neither in {kept} nor in {folder.path}")
            copy_side_file(file, origin, beside)


class _Delta:
    """An open delta folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / RECORD).is_file():
            raise ValueError(f"{path} is no delta: it has no {RECORD}")
        version = read_json(self.path / RECORD, {"version": (int, str)})["version"]
        if version != VERSION:
            raise ValueError(f"{path} is a delta of version {version}, this is for {VERSION}")
        self.record = read_sealed(self.path / RECORD, SHAPE)
        self._check_record()
        self.blocks = Tensors(self.path / BLOCKS)

    def _check_record(self) -> None:
        """Raises ValueError for names that lead elsewhere, dtypes that are none, links, damaged
        files."""
        where = self.path / RECORD
        for side in SIDES:
            for name in self.record["files"][side]:
                check_side_name(name, where)
            check_no_link(self.path / side, self.path)
            for alias, name in self.record["aliases"][side].items():
                if alias in self.record["tensors"] or name not in self.record["tensors"]:
                    raise ValueError(f"{where} says that {alias!r:.80} is {name!r:.80}")
        for name, entry in self.record["tensors"].items():
            if (
                not set(entry["dtype"].values()) <= NAMED.keys()
                or min(entry["shape"], default=0) < 0
            ):
                raise ValueError(f"{where} has no such tensor: {name!r:.80} {entry!r:.80}")
        kept = {  # the base's may have been deleted
            name: expected
            for name, expected in self.record["checksums"].items()
            if not name.startswith("base/") or (self.path / "base").exists()
        }
        damage = find_damage(self.path, kept, where)
        if damage:
            raise ValueError(f"{self.path} is damaged: {damage}")

    def specs(self, side: str) -> dict[str, Spec]:
        specs = {
            name: (NAMED[entry["dtype"][side]], tuple(entry["shape"]))
            for name, entry in self.record["tensors"].items()
        }
        return specs | {alias: specs[name] for alias, name in self.record["aliases"][side].items()}

    def check(self, folder: ModelFolder, side: str, track: Track) -> None:
        expected, found = self.specs(side), folder.specs
        problem = f"{folder.path} is not the {side} model of {self.path}:"
        for name in sorted(expected.keys() | found.keys()):
            if name not in found or name not in expected:
                raise ValueError(
                    f"{problem} it {'lacks' if name in expected else 'has besides'} {name}"
                )
            if found[name] != expected[name]:
                raise ValueError(
                    f"{problem} {name} is {describe_spec(*found[name])}, not {describe_spec(*expected[name])}"
                )
        for name in track(list(self.record["tensors"]), "verifying"):
            if sha256(name, folder.get(name)) != self.record["tensors"][name]["sha256"][side]:
                raise ValueError(f"{problem} the values of {name} differ")
        for alias, name in self.record["aliases"][side].items():
            if raw_bytes(folder.get(alias)) != raw_bytes(folder.get(name)):
                raise ValueError(f"{problem} the values of {alias} are not those of {name}")

    def check_reversible(self) -> None:
        for name, entry in self.record["tensors"].items():
            base, trained = (NAMED[entry["dtype"][side]] for side in SIDES)
            if torch.promote_types(base, trained) != trained:
                raise ValueError(
                    f"the base cannot be given back: {name} was {entry['dtype']['base']} and was rounded to "
                    f"{entry['dtype']['trained']} before training"
                )

    def result(self, name: str, folder: ModelFolder, values: Tensors, there: str) -> Tensor:
        """The tensor on the side ``there``, made from the one in ``folder`` and held to its
        hash."""
        name = self.record["aliases"][there].get(name, name)
        entry = self.record["tensors"][name]
        tensor = folder.get(name).to(NAMED[entry["dtype"][there]])
        damaged = f"{self.path} is damaged: {name} does not come out as recorded"
        if "blocks" in entry:
            try:
                parts = ("out_idx", "out_counts", "in_idx", "in_mask")
                put_(
                    tensor,
                    {part: self.blocks.get(f"{name}.{part}") for part in parts},
                    values.get(name),
                )
            except Exception as error:
                raise ValueError(damaged) from error
        if (
            len(set(entry["sha256"].values())) > 1
            and sha256(name, tensor) != entry["sha256"][there]
        ):
            raise ValueError(damaged)
        return tensor


def _write_all(path: Path, tensors: dict[str, Tensor]) -> None:
    write_tensors(
        path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, tensors.__getitem__
    )


def _combined(record: dict, side: str) -> str:
    lines = [
        f"{name} {entry['sha256'][side]}\n" for name, entry in sorted(record["tensors"].items())
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _folder_size(folder: Path) -> int:
    return sum(os.path.getsize(path) for path in folder.rglob("*") if path.is_file())


def _mb(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"
