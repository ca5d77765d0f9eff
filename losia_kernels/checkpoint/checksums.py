"""SHA-256 of files, kept beside them, so that damage of the same size is found and named.

It takes a third of a second for 500 MB on one core with SHA instructions.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .reading import check_file_name, read_json
from .writing import write_json

CHUNK_BYTES = 2**20
FILES = {str: {"size": int, "sha256": str}}  # the shape of ``checksums`` in JSON
SEAL = "checksum"


def checksum(path: Path) -> str:
    """Of a file's contents, as hexadecimal digits."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb") as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def checksums(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What ``find_damage`` holds the files ``names`` of ``folder`` to."""
    return {
        name: {"size": (folder / name).stat().st_size, "sha256": checksum(folder / name)}
        for name in sorted(names)
    }


def all_files(folder: Path) -> list[str]:
    """Names of the files in a folder and the folders in it."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def find_damage(folder: Path, files: dict[str, dict[str, Any]], where: str | Path) -> str | None:
    """The first file that is not as ``checksums`` found it, and how; None if all are. The sizes are
    looked at first.

    ``where``: the file that ``files`` stand in. Raises ValueError for names that lead out of
    ``folder``.
    """
    for name in files:
        for part in name.split("/"):
            check_file_name(part, where)
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != expected["size"]:
            return f"{name} has {size:,} bytes instead of {expected['size']:,}"
    for name, expected in files.items():
        if checksum(folder / name) != expected["sha256"]:
            return f"{name} is damaged: it does not have the checksum that it was written with"
    return None


def write_sealed(path: Path, values: dict) -> None:
    """``values`` as JSON with a checksum of their own."""
    write_json(path, {**values, SEAL: _seal(values)})


def read_sealed(path: Path, shape: dict) -> dict:
    """What ``write_sealed`` wrote, of that shape. Raises ValueError if it is not what was written;
    without a checksum it is taken as it is."""
    values = read_json(path, shape)
    if values.pop(SEAL, None) not in (None, _seal(values)):
        raise ValueError(f"{path} is damaged or was edited: it does not have the checksum in it")
    return values


def _seal(values: dict) -> str:
    as_read = json.loads(json.dumps(values))  # keys and tuples as JSON has them
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()
