"""Checkpoints of torch.distributed.checkpoint that others may have written.

torch unpickles their ``.metadata``, and of what is no tensor the bytes, which runs whatever code
stands in them. Here an unpickler that knows only what such a file needs reads it first, and what it
says of sizes and places is held to the files before anything is allocated.
"""

import io
import math
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

from .reading import check_archive, check_file_name, check_no_link

METADATA = ".metadata"
# What pickle writes for strings, numbers, tuples, lists, dicts and objects, and nothing else.
OPCODES = """APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINUNICODE BUILD EMPTY_DICT EMPTY_LIST
EMPTY_TUPLE FRAME LONG1 LONG_BINGET MARK MEMOIZE NEWFALSE NEWOBJ NEWTRUE NONE PROTO REDUCE SETITEM
SETITEMS SHORT_BINUNICODE STACK_GLOBAL STOP TUPLE TUPLE1 TUPLE2 TUPLE3""".split()
CLASSES = (
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.TensorProperties,
    metadata.StorageMeta,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    torch.Size,
)
GLOBALS: dict[tuple[str, str], Any] = {
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{(each.__module__, each.__qualname__): each for each in CLASSES},
    # of the folder that was written to, which is not opened
    **{(f"pathlib{of}", "PosixPath"): pathlib.PurePosixPath for of in ("", "._local")},
    **{(f"pathlib{of}", "WindowsPath"): pathlib.PureWindowsPath for of in ("", "._local")},
}


IN_PYTHON: Any = pickle._Unpickler  # of whose operations some can be taken away


class _Unpickler(IN_PYTHON):
    dispatch = {
        code: function
        for code, function in IN_PYTHON.dispatch.items()
        if code in {getattr(pickle, name)[0] for name in OPCODES}
    }

    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        found = dtype if isinstance(dtype, torch.dtype) else GLOBALS.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it would load {module}.{name}")
        return found

    def load_build(self) -> None:
        state, built = self.stack[-1], self.stack[-2]
        expected = tuple if isinstance(built, metadata.TensorProperties) else dict
        if not isinstance(built, CLASSES) or not isinstance(state, expected):
            raise pickle.UnpicklingError(f"it would change {type(built).__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def read_metadata(folder: Path) -> metadata.Metadata:
    """The ``.metadata`` of a checkpoint, held to its files.

    Raises ValueError if it holds anything else than tensors and bytes in files beside it, as large
    as the files are.
    """
    path = folder / METADATA
    check_no_link(path, folder)
    try:
        found = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except Exception as error:  # whatever a damaged pickle makes of Python's objects
        raise ValueError(f"{path} is damaged, or no checkpoint's: {error!r:.200}") from None
    try:
        _check(found, folder)
    except (KeyError, TypeError, AttributeError, OSError, OverflowError) as error:
        raise ValueError(f"{path} does not fit the files beside it: {error!r:.200}") from None
    return found


def _check(found: Any, folder: Path) -> None:
    def demand(good: bool, what: Any) -> None:
        if not good:
            raise ValueError(f"{folder / METADATA} does not fit the files beside it: {what!r:.80}")

    demand(isinstance(found, metadata.Metadata), found)
    sizes: dict[str, int] = {}
    for index, info in found.storage_data.items():
        name = check_file_name(info.relative_path, folder / METADATA)
        if name not in sizes:
            check_no_link(folder / name, folder)
            sizes[name] = (folder / name).stat().st_size
        demand(type(info.offset) is int and type(info.length) is int, info)
        demand(info.offset >= 0 <= info.length <= sizes[name] - info.offset, info)
        demand(not info.transform_descriptors, info)
        with open(folder / name, "rb") as file:
            file.seek(info.offset)
            check_archive(_Slice(file, info.offset, info.length), info.length, folder / name)
        demand(isinstance(found.state_dict_metadata[index.fqn], metadata.STORAGE_TYPES), index)
    for key, entry in found.state_dict_metadata.items():
        demand(isinstance(key, str), key)
        if isinstance(entry, metadata.BytesStorageMetadata):
            continue
        held = 0
        for chunk in entry.chunks:
            info = found.storage_data[metadata.MetadataIndex(key, chunk.offsets)]
            demand(len(chunk.sizes) == len(chunk.offsets) == len(entry.size), key)
            demand(min((*chunk.sizes, *chunk.offsets), default=0) >= 0, key)
            demand(math.prod(chunk.sizes) * entry.properties.dtype.itemsize <= info.length, key)
            held += math.prod(chunk.sizes)
        demand(held == math.prod(entry.size) and min(entry.size, default=0) >= 0, key)


class _Slice(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, file: Any, start: int, length: int):
        self.file, self.start, self.length, self.at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, offset + (0, self.at, self.length)[whence])
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.at)
        wanted = max(0, min(len(buffer), self.length - self.at))
        count = self.file.readinto(memoryview(buffer)[:wanted])
        self.at += count
        return count


class ShardReader(dcp.FileSystemReader):
    """torch's reader, of tensors alone, with the metadata that was looked at."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        found = read_metadata(Path(self.path))
        other = next(
            (
                key
                for key, entry in found.state_dict_metadata.items()
                if isinstance(entry, metadata.BytesStorageMetadata)
            ),
            None,
        )
        if other is not None:
            raise ValueError(f"{self.path}: {other} is no tensor")
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


def check_shards(folder: Path) -> None:
    """Raises ValueError unless torch's own reader may be given this checkpoint: its bytes are
    tensors and plain Python as well."""
    found = read_metadata(folder)
    for index, info in found.storage_data.items():
        if isinstance(found.state_dict_metadata[index.fqn], metadata.BytesStorageMetadata):
            with open(folder / info.relative_path, "rb") as file:
                file.seek(info.offset)
                content = io.BytesIO(file.read(info.length))
            try:
                torch.load(content, weights_only=True)
            except Exception as error:
                raise ValueError(
                    f"{folder / info.relative_path}: {index.fqn} is no plain value: {error!r:.120}"
                ) from None
