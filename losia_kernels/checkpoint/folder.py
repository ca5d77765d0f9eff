"""A ``save_pretrained`` folder, read and written one tensor at a time: never a whole model in
memory.

Needs safetensors (the extra ``hf``), and nothing of transformers.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

WEIGHTS = "model.safetensors"
UNFINISHED = ".unfinished"  # in a folder that is being written
MARKER = "losia.json"  # of a run's checkpoint, written last: one without it was interrupted
INDEX = "model.safetensors.index.json"
NOT_SIDE_FILES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".index.json",
)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
Spec = tuple[torch.dtype, tuple[int, ...]]
# Goes through names, and may show how far it is.
Track = Callable[[Iterable[str], str], Iterable[str]]


def untracked(names: Iterable[str], doing: str) -> Iterable[str]:
    """A ``Track`` that shows nothing."""
    return names


class ModelFolder:
    """The safetensors of a model's folder, sharded or not: ``specs`` by name, and ``get(name)``.

    Raises ValueError if ``path`` is no such folder, or a shard is missing or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{path} is no folder")
        if (self.path / WEIGHTS).exists():
            files = [WEIGHTS]
        elif (self.path / INDEX).exists():
            try:
                files = sorted(
                    set(json.loads((self.path / INDEX).read_text())["weight_map"].values())
                )
            except (ValueError, KeyError):
                raise ValueError(
                    f"{self.path / INDEX} cannot be read as an index of shards"
                ) from None
        else:
            shards = any(self.path.glob("*/.metadata"))  # of torch.distributed.checkpoint
            hint = (
                "; it holds several processes' shards: finetune --resume makes a model of the run"
                if shards
                else ""
            )
            raise ValueError(
                f"{path} is no model folder: it has neither {WEIGHTS} nor {INDEX}{hint}"
            )
        self.files = {file: Tensors(self.path / file) for file in files}
        self.in_parts = WEIGHTS not in files
        self._holder = {name: tensors for tensors in self.files.values() for name in tensors.specs}

    @property
    def specs(self) -> dict[str, Spec]:
        """Name -> dtype and shape, sorted by name; from the headers alone."""
        return {name: self._holder[name].specs[name] for name in sorted(self._holder)}

    def get(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        return self._holder[name].get(name)

    def side_files(self) -> list[str]:
        """What is no weight: config, tokenizer, generation config, licence."""
        return sorted(
            path.name
            for path in self.path.iterdir()
            if path.is_file()
            and not path.name.startswith(".")
            and not path.name.endswith(NOT_SIDE_FILES)
        )


class Tensors:
    """One .safetensors file. Raises ValueError if it is missing, damaged, or holds a dtype that
    torch has not."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} cannot be read as safetensors: {str(error).strip()}"
            ) from None
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}
        unknown = next(
            (name for name, part in slices.items() if part.get_dtype() not in DTYPES), None
        )
        if unknown is not None:
            raise ValueError(
                f"{path}: {unknown} is of dtype {slices[unknown].get_dtype()}, which is not supported"
            )
        self.specs = {
            name: (DTYPES[part.get_dtype()], tuple(part.get_shape()))
            for name, part in slices.items()
        }
        self.metadata = self._file.metadata() or {}

    def get(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        return self._file.get_tensor(name)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values as they lie in memory, without a copy if it is contiguous."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def sha256(name: str, tensor: Tensor) -> str:
    """Of the tensor's name, dtype, shape and bits, as hexadecimal digits."""
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def size_of(specs: Iterable[Spec]) -> int:
    """Bytes of tensors of these dtypes and shapes."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in specs)


def write_tensors(
    path: Path,
    specs: dict[str, Spec],
    get: Callable[[str], Tensor],
    metadata: dict[str, str] | None = None,
    track: Track = untracked,
) -> None:
    """A .safetensors file of the tensors that ``get`` gives for each name of ``specs``, one at a
    time."""
    # large dtypes first: all stay aligned
    names = sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))
    code = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, dict] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in names:
        dtype, shape = specs[name]
        start, end = end, end + size_of([specs[name]])
        header[name] = {"dtype": code[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in track(names, f"writing {path.name}"):
            tensor = get(name)
            if (tensor.dtype, tuple(tensor.shape)) != specs[name]:
                raise AssertionError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}, announced as {specs[name]}"
                )
            file.write(raw_bytes(tensor))


def write_model(
    folder: Path,
    like: ModelFolder,
    specs: dict[str, Spec],
    get: Callable[[str], Tensor],
    track: Track = untracked,
) -> None:
    """The tensors of ``specs`` into the existing ``folder``, each in the file in which ``like`` has
    its name."""
    weight_map: dict[str, str] = {}
    for file, tensors in like.files.items():
        part = {name: specs[name] for name in tensors.specs if name in specs}
        weight_map |= dict.fromkeys(part, file)
        write_tensors(folder / file, part, get, {"format": "pt", **tensors.metadata}, track)
    if like.in_parts:
        index = {
            "metadata": {"total_size": size_of(specs.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(folder / INDEX, index)


def write_json(path: Path, values: dict) -> None:
    """``values`` as JSON at ``path``: the old file or the new one, never a part."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(beside, path)


def check_pair(base: ModelFolder, trained: ModelFolder) -> None:
    """Raises ValueError unless both hold tensors of the same names and shapes; floating-point
    dtypes may differ."""
    subnets = next((name for name in trained.specs if name.endswith(".subnet")), None)
    if subnets is not None:
        raise ValueError(
            f"{trained.path} holds subnets, it is a checkpoint: write its plain model first (export)"
        )
    for one, other in ((base, trained), (trained, base)):
        absent = sorted(one.specs.keys() - other.specs.keys())
        if absent:
            raise ValueError(
                f"{other.path} lacks {absent[0]} and {len(absent) - 1} more that {one.path} has; if these are other "
                f"names of the same weights, load and save the base once with transformers"
            )
    for name, (dtype, shape) in base.specs.items():
        trained_dtype, trained_shape = trained.specs[name]
        floats = dtype.is_floating_point and trained_dtype.is_floating_point
        if shape != trained_shape or (dtype != trained_dtype and not floats):
            raise ValueError(
                f"{name} is {describe_spec(dtype, shape)} in {base.path} and "
                f"{describe_spec(trained_dtype, trained_shape)} in {trained.path}: these are not base and result of "
                f"one training"
            )


def describe_spec(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """Dtype and shape for an error's text."""
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def check_absent(folder: str | Path) -> None:
    """Raises ValueError if ``folder`` exists."""
    if Path(folder).exists():
        raise ValueError(f"{folder} exists: name a new folder")


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into that becomes ``folder`` when all is written, and is gone if something
    fails.

    What a killed process of ours left beside is removed. Raises ValueError if ``folder`` exists, or
    beside it one of that name which is not ours.
    """
    check_absent(folder)
    folder = Path(folder)
    beside = begin_beside(folder)
    try:
        yield beside
        finish_beside(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def begin_beside(folder: Path) -> Path:
    """The new folder ``folder.tmp``, marked as ours; one that a killed process left is removed, any
    other is an error."""
    beside = folder.with_name(folder.name + ".tmp")
    if (beside / UNFINISHED).exists():
        shutil.rmtree(beside)
    elif beside.exists():
        raise ValueError(f"{beside} exists, where {folder} would be prepared: move it away")
    beside.mkdir(parents=True)
    (beside / UNFINISHED).touch()
    return beside


def finish_beside(beside: Path, folder: Path) -> None:
    """All is written: it becomes ``folder``."""
    (beside / UNFINISHED).unlink()
    os.replace(beside, folder)
