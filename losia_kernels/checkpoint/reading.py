"""Files that others may have written: nothing in them is believed before it has been looked at.

Names that stand in a file are single components and lead nowhere else; links among the side files
are refused; JSON has the shape that is expected of it; archives of tensors hold what their size
says. A ValueError names the file and what is wrong with it.
"""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

# What transformers keeps a tokenizer's named chat templates in, the one folder among side files.
CHAT_TEMPLATES = "additional_chat_templates"
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


def check_file_name(name: Any, where: str | Path) -> str:
    """``name``, read from the file ``where``, as the name of a file in a folder of ours.

    Raises ValueError for what is no single component: a path, ``..``, a drive, nothing, control
    characters.
    """
    plain = (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and name.isprintable()
        and not re.search(r"[/\\]|^[A-Za-z]:", name)
    )
    if not plain:
        raise ValueError(
            f"{where} names {ascii(name):.80}, which is not the name of a file beside it"
        )
    return name


def check_side_name(name: Any, where: str | Path) -> str:
    """The same of a side file, which is no weight; a chat template lies in a folder of that name."""
    inside = name.removeprefix(f"{CHAT_TEMPLATES}/") if isinstance(name, str) else name
    check_file_name(inside, where)
    if inside.startswith(".") or inside.endswith(NOT_SIDE_FILES):
        raise ValueError(f"{where} names {ascii(name):.80} as a file beside the weights")
    return name


def side_files(folder: Path) -> list[str]:
    """Names of what is no weight: config, tokenizer, chat templates, generation config, licence."""
    names = [path.name for path in folder.iterdir() if path.is_file() or path.is_symlink()]
    templates = folder / CHAT_TEMPLATES
    if templates.is_dir():
        check_no_link(templates, folder)
        names += [f"{CHAT_TEMPLATES}/{path.name}" for path in templates.glob("*.jinja")]
    plain = (name for name in names if not Path(name).name.startswith("."))
    return sorted(name for name in plain if not name.endswith(NOT_SIDE_FILES))


def check_no_link(path: Path, folder: Path) -> None:
    """Raises ValueError if ``path`` in ``folder`` is a link, but to the blobs of the hub's cache
    that ``folder`` is a snapshot in."""
    if not path.is_symlink():
        return
    snapshots = folder.resolve().parent
    of_the_hub = (
        snapshots.name == "snapshots" and path.resolve().parent == snapshots.parent / "blobs"
    )
    if not (of_the_hub and path.is_file()):
        raise ValueError(f"{path} is a link: put the file itself there")


def read_json(path: Path, shape: Any) -> Any:
    """The contents of a JSON file.

    Args:
        path: a regular file, UTF-8.
        shape: a type or tuple of types, ``[shape]`` of every item, ``{key: shape}`` of an object
            with at least these keys, ``{str: shape}`` of all of an object's values.

    Raises:
        ValueError: if it is missing, is no JSON, or of another shape, naming the place.
    """
    if not path.is_file():
        raise ValueError(f"{path} is {'no file' if path.exists() else 'missing'}")
    try:
        values = json.loads(path.read_bytes())
        json.dumps(values, ensure_ascii=False).encode()  # not so with half of a character
    except RecursionError:
        raise ValueError(f"{path} cannot be read: nested too deep") from None
    except UnicodeEncodeError:
        raise ValueError(f"{path} cannot be read: a text in it has half of a character") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    check_shape(values, shape, path)
    return values


def check_shape(values: Any, shape: Any, where: str | Path) -> None:
    """Raises ValueError unless ``values``, of the file ``where``, are of that shape, as in
    ``read_json``."""
    misfit = _misfit(values, shape, "")
    if misfit:
        raise ValueError(f"{where} is JSON of another shape: {misfit}")


def _misfit(value: Any, shape: Any, at: str) -> str | None:
    """What of ``value`` is not as ``shape`` says; None if all is."""
    expected = dict if isinstance(shape, dict) else list if isinstance(shape, list) else shape
    types = expected if isinstance(expected, tuple) else (expected,)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        wanted = " or ".join("null" if each is type(None) else each.__name__ for each in types)
        return f"{at or 'all of it'} is {value!r:.40}, expected {wanted}"
    if isinstance(shape, list):
        inner = [(f"{at}[{i}]", item, shape[0]) for i, item in enumerate(value)]
    elif not isinstance(shape, dict):
        return None
    elif str in shape:
        inner = [(f"{at}[{key!r}]", item, shape[str]) for key, item in value.items()]
    else:
        absent = next((key for key in shape if key not in value), None)
        if absent is not None:
            return f"{at or 'it'} has no {absent!r}"
        inner = [(f"{at}[{key!r}]", value[key], each) for key, each in shape.items()]
    return next(filter(None, (_misfit(item, each, name) for name, item, each in inner)), None)


def check_archive(file: Any, size: int, where: str | Path) -> None:
    """Raises ValueError unless ``file``, a path or an open file, is an archive of torch.save that
    holds no more than its ``size`` in bytes."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{where} cannot be read as a file of torch.save: {error}") from None
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > size:
        raise ValueError(f"{where} would take more memory than it has bytes")
