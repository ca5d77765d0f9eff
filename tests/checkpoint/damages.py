"""What may become of one file."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def _replace(path: Path, content: bytes) -> None:
    path.unlink()  # a hard link elsewhere stays as it is
    path.write_bytes(content)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    _replace(path, bytes(content))


def _other_shape(path: Path) -> None:
    """The same kind of file, with other contents."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        save_file({name: torch.zeros(3) for name in tensors or ["x"]}, path)
    elif path.suffix in (".pt", ".pth"):
        torch.save({"other": torch.ones(2)}, path)
    else:
        _replace(path, b"[1, 2]")


DAMAGES = {
    "cut": lambda path: _replace(path, path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: _replace(path, b""),
    "zeros": lambda path: _replace(path, b"\0" * path.stat().st_size),
    "flip": _flip,
    "missing": lambda path: path.unlink(),
    "shape": _other_shape,
}
