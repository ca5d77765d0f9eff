"""A ``save_pretrained`` folder, read and written one tensor at a time: never a whole model in
memory.

Needs safetensors (the extra ``hf``), and nothing of transformers.
"""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from .reading import (
    check_file_name,
    check_no_link,
    check_side_name,
    read_json,
    side_files,
)
from .writing import write_json

WEIGHTS = "model.safetensors"
MARKER = "losia.json"  # of a run's checkpoint, written last: one without it was interrupted
INDEX = "model.safetensors.index.json"
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
            index = read_json(self.path / INDEX, {"weight_map": {str: str}})
            files = sorted(set(index["weight_map"].values()))
            for file in files:
                check_file_name(file, self.path / INDEX)
                if not file.endswith(".safetensors"):
                    raise ValueError(f"{self.path / INDEX} names {file}, which is no .safetensors")
        else:
            raise ValueError(
                f"{path} is no model folder: it has neither {WEIGHTS} nor {INDEX}{self._hint()}"
            )
        self.files = {file: Tensors(self.path / file) for file in files}
        self.in_parts = WEIGHTS not in files
        self._holder = {name: tensors for tensors in self.files.values() for name in tensors.specs}

    def _hint(self) -> str:
        """What else the folder is, and where the model would be."""
        if (self.path / "run.json").exists():
            if (self.path / "model").is_dir():
                return f"; it is a run, whose model is {self.path / 'model'}"
            return "; it is a run that is not finished: finetune --resume goes on with it"
        if any(self.path.glob(f"checkpoint-*/{MARKER}")):
            return "; it holds checkpoints: name one of them, or the run"
        if (self.path / "delta.json").exists():
            return "; it is a delta: apply it to its base first"
        if (self.path / "adapter_config.json").exists():
            return "; it holds an adapter of PEFT, which is no model"
        if any(self.path.glob("pytorch_model*.bin")):
            return "; its weights are torch's: load and save it once with transformers"
        if (self.path / ".metadata").exists():
            return "; it is a checkpoint that load_checkpoint reads"
        if any(self.path.glob("*/.metadata")):  # of torch.distributed.checkpoint
            return (
                "; it holds several processes' shards: finetune --resume makes a model of the run"
            )
        return ""

    @property
    def specs(self) -> dict[str, Spec]:
        """Name -> dtype and shape, sorted by name; from the headers alone."""
        return {name: self._holder[name].specs[name] for name in sorted(self._holder)}

    def get(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        return self._holder[name].get(name)

    def side_files(self) -> list[str]:
        """What is no weight: config, tokenizer, chat templates, generation config, licence."""
        return side_files(self.path)


def copy_side_file(name: str, folder: Path, into: Path) -> None:
    """Copy a file that is no weight, under the same name. Raises ValueError for a link."""
    check_side_name(name, folder)
    check_no_link(folder / name, folder)
    check_no_link((folder / name).parent, folder)
    (into / name).parent.mkdir(exist_ok=True)
    shutil.copyfile(folder / name, into / name)


class Tensors:
    """One .safetensors file. Raises ValueError if it is missing, damaged, or holds a dtype that
    torch has not."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        try:
            if not path.is_file():  # of a pipe or a device nothing would come, or no end
                raise OSError("no such file" if not path.exists() else "not a regular file")
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            pointer = path.is_file() and path.open("rb").read(20).startswith(b"version https://git")
            problem = "it is a pointer of Git LFS (git lfs pull)" if pointer else str(error).strip()
            raise ValueError(f"{path} cannot be read as safetensors: {problem}") from None
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
    aliases: dict[str, str] | None = None,
) -> None:
    """The tensors of ``specs`` into the existing ``folder``, each in the file in which ``like`` has
    its name, or has that of which it is one of the ``aliases``."""
    weight_map: dict[str, str] = {}
    for file, tensors in like.files.items():
        also = [name for name, other in (aliases or {}).items() if other in tensors.specs]
        part = {name: specs[name] for name in [*tensors.specs, *also] if name in specs}
        weight_map |= dict.fromkeys(part, file)
        write_tensors(folder / file, part, get, {"format": "pt", **tensors.metadata}, track)
    if like.in_parts:
        index = {
            "metadata": {"total_size": size_of(specs.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(folder / INDEX, index)


def check_pair(base: ModelFolder, trained: ModelFolder) -> tuple[list[str], list[dict[str, str]]]:
    """Names that both have, and for each of the two, of what it has besides, which of these it is.

    Raises ValueError unless both hold tensors of the same names and shapes, but for other names of
    the same weights (a tied output layer, saved twice); floating-point dtypes may differ.
    """
    subnets = next((name for name in trained.specs if name.endswith(".subnet")), None)
    if subnets is not None:
        raise ValueError(
            f"{trained.path} holds subnets, it is a checkpoint: write its plain model first (export)"
        )
    common = [name for name in base.specs if name in trained.specs]
    aliases = [_aliases(base, common), _aliases(trained, common)]
    for (one, known), other in zip(
        zip((base, trained), aliases, strict=True), (trained, base), strict=True
    ):
        absent = sorted(one.specs.keys() - other.specs.keys() - known.keys())
        if absent:
            raise ValueError(
                f"{other.path} lacks {absent[0]} and {len(absent) - 1} more that {one.path} has; if these are other "
                f"names of the same weights, load and save the base once with transformers"
            )
    for name in common:
        dtype, shape = base.specs[name]
        trained_dtype, trained_shape = trained.specs[name]
        floats = dtype.is_floating_point and trained_dtype.is_floating_point
        if shape != trained_shape or (dtype != trained_dtype and not floats):
            raise ValueError(
                f"{name} is {describe_spec(dtype, shape)} in {base.path} and "
                f"{describe_spec(trained_dtype, trained_shape)} in {trained.path}: these are not base and result of "
                f"one training"
            )
    return common, aliases


def _aliases(folder: ModelFolder, common: list[str]) -> dict[str, str]:
    """Tensors that ``folder`` has besides ``common``, each with the one of these that it is, bit for
    bit."""
    found: dict[str, str] = {}
    for name in folder.specs.keys() - set(common):
        alike = [each for each in common if folder.specs[each] == folder.specs[name]]
        if alike:
            tensor = folder.get(name)
            same = [each for each in alike if raw_bytes(folder.get(each)) == raw_bytes(tensor)]
            if same:
                found[name] = same[0]
    return found


def describe_spec(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """Dtype and shape for an error's text."""
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
