"""The rows of training data, as they stand in a file, a folder or a data set of the hub.

JSON and JSON Lines are read line by line, so that a row is what its line says and an error names
the line; a table's columns would give every message the keys of all. The rest is read by
``datasets``.
"""

import csv
import difflib
import glob
import json
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import pandas
from fsspec.utils import infer_compression
from trl.trainer.utils import remove_none_values

from .options import InputError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TABLES: dict[
    str, tuple[str, dict[str, Any]]
] = {  # suffix: the reader of ``datasets`` and what it is told
    ".csv": ("csv", {"sep": ","}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
NEEDED = {".zst": "zstandard", ".lz4": "lz4"}  # to read these; the others are Python's own
# Columns that tables hold as JSON, for no type of theirs fits.
NESTED = ("messages", "conversations", "tools", "chat_template_kwargs")


class Row(NamedTuple):
    """One sample: its values and where it stands, for errors."""

    values: dict[str, Any]
    where: str


def read_rows(data: str, split: str = "train", config: str | None = None) -> Iterator[Row]:
    """The rows of a file, a folder or a data set of the hub, in order; blank lines are skipped.

    ``split``, ``config``: which part of what has parts.

    Raises:
        InputError: naming the file and the line, or the row, that cannot be read.
    """
    path = Path(data).expanduser()
    if data == "-" or path.exists() and not (path.is_dir() or path.is_file()) or _is_stream(data):
        raise InputError(
            f"{data} is a stream: data is read more than once, and again by --resume; write it to a file"
        )
    if path.is_dir():
        yield from _read_folder(path, split, config)
    elif path.exists() or _is_file_name(data):
        yield from _read_file(path)
    elif near := _find_near(path):
        raise InputError(f"there is no {data}; did you mean {near}?")
    else:
        yield from _read_table(data, data, name=config, split=split)


def is_local(data: str) -> bool:
    """Whether ``data`` names a file or folder here, rather than a data set of the hub."""
    return Path(data).expanduser().exists() or _is_file_name(data)


def _is_file_name(data: str) -> bool:
    known = (*JSON_SUFFIXES, *TABLES, *COMPRESSED)
    return data.startswith((".", "/", "~")) or data.count("/") > 1 or data.endswith(known)


def _is_stream(data: str) -> bool:
    return data.startswith(("/dev/", "/proc/self/fd/"))


def _find_near(path: Path) -> Path | None:
    """A file of data beside ``path`` whose name is nearly that, but for upper and lower case."""
    known = (*JSON_SUFFIXES, *TABLES)
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    names = {each.name.lower(): each for each in beside if _suffix(each) in known}
    close = difflib.get_close_matches(path.name.lower(), names, 1, 0.8)
    return names[close[0]] if close else None


def _suffix(path: Path) -> str:
    """What kind of file it is, under a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _read_file(path: Path) -> Iterator[Row]:
    if not path.exists():
        near = _find_near(path)
        hint = f"; did you mean {near}?" if near else ""
        raise InputError(f"cannot read {path}: No such file or directory{hint}")
    _check_compression(path)
    suffix = _suffix(path)
    if suffix in JSON_SUFFIXES:
        yield from _read_json(path)
    elif suffix in TABLES:
        reader, how = TABLES[suffix]
        if reader == "csv":  # all of it is text, also 007 and NA
            how = {**how, "features": _text_columns(path, **how), "keep_default_na": False}
            how["index_col"] = False  # a longer row is no row with a name
            yield from _read_local_table(reader, path, path, **how)
        else:
            with _unpacked(path) as plain:
                yield from _read_local_table(reader, path, plain, **how)
    else:
        known = ", ".join((*JSON_SUFFIXES, *TABLES))
        raise InputError(
            f"{path}: the name does not say what it holds; known are {known}, and compressed ones"
        )


def _check_compression(path: Path) -> None:
    """Raises InputError for what cannot be unpacked here, and for an archive of several files."""
    kind = path.suffix.lower()
    if kind in NEEDED and infer_compression(str(path).lower()) is None:
        raise InputError(
            f"cannot read {path}: {kind} needs {NEEDED[kind]}, which is not installed: pip install {NEEDED[kind]}"
        )
    if kind == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                held = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"cannot read {path}: {error}") from None
        if len(held) != 1:
            raise InputError(f"{path} holds {len(held)} files, expected one: unpack it in a folder")


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """The file without its compression, for readers that look at its end first."""
    if path.suffix.lower() not in COMPRESSED:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / path.stem
        try:
            with fsspec.open(str(path), "rb", compression="infer") as packed:
                with open(plain, "wb") as file:
                    shutil.copyfileobj(packed, file)
        except Exception as error:  # of a decompressor
            raise InputError(f"cannot read {path}: {_first_line(error)}") from None
        yield plain


def _text_columns(path: Path, sep: str) -> datasets.Features:
    try:
        names = pandas.read_csv(path, sep=sep, nrows=0, index_col=False).columns
        _check_lengths(path, sep, len(names))
    except InputError:
        raise
    except (ValueError, OSError, EOFError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {_first_line(error)}") from None
    return datasets.Features({name: datasets.Value("string") for name in names})


def _check_lengths(path: Path, sep: str, columns: int) -> None:
    """Raise InputError for a row with more fields than the header has names: pandas cuts it."""
    csv.field_size_limit(sys.maxsize)  # a text may be long
    how = {"compression": "infer", "newline": "", "encoding": "utf-8"}
    with fsspec.open(str(path), "rt", **how) as file:
        for number, fields in enumerate(csv.reader(file, delimiter=sep), start=1):
            if len(fields) > columns:
                raise InputError(
                    f"{path}: row {number} has {len(fields)} fields, the header {columns}: put quotes "
                    f"around a field that holds {sep!r}"
                )


def _read_folder(path: Path, split: str, config: str | None) -> Iterator[Row]:
    """A folder of ``save_to_disk``, or one of files, whose splits ``datasets`` tells apart."""
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise InputError(f"{path} has no split {split!r}, only {', '.join(saved)}")
            saved = saved[split]
        yield from _rows_of(saved, str(path))
        return
    try:
        builder = datasets.load_dataset_builder(str(path), name=config)
    except Exception as error:  # whatever a library raises about the user's files
        raise InputError(f"cannot read {path}: {_first_line(error)}") from None
    files = {str(part): list(names) for part, names in (builder.config.data_files or {}).items()}
    if split not in files:
        raise InputError(f"{path} has no split {split!r}, only {', '.join(files)}")
    others = [part for part in files if part != split]
    if others:
        warnings.warn(f"{path}: {', '.join(others)} is not read, only {split}", stacklevel=2)
    read = {Path(name).name for names in files.values() for name in names}
    known = (*JSON_SUFFIXES, *TABLES)
    unread = sorted(p.name for p in path.iterdir() if _suffix(p) in known and p.name not in read)
    if unread:
        warnings.warn(
            f"{path}: {', '.join(unread)} is not read: datasets takes files of one kind, told apart by "
            f"the split in their names",
            stacklevel=2,
        )
    for name in sorted(files[split]):
        yield from _read_file(Path(name))


def _read_json(path: Path) -> Iterator[Row]:
    """One object a line, or a list of objects."""
    try:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            text = file.read()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or _first_line(error)}") from None
    except Exception as error:  # of a decompressor
        raise InputError(f"cannot read {path}: {_first_line(error)}") from None
    text = text.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path} is UTF-16: write it as UTF-8")
    if text.lstrip()[:1] == b"[":
        values = _parse(text, str(path))
        for number, each in enumerate(values, start=1):
            yield Row(each, f"{path}: sample {number}")
        return
    if b"\n" in text.strip() and text.lstrip()[:1] == b"{" and _is_one_object(text):
        raise InputError(
            f"{path}: one object over several lines; expected one object a line, or a list of them"
        )
    for number, line in enumerate(text.split(b"\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield Row(_parse(line, where), where)


def _is_one_object(text: bytes) -> bool:
    """Whether the first line is no whole object, but all of them are."""
    for part, whole in ((text.lstrip().partition(b"\n")[0], False), (text, True)):
        try:
            json.loads(part)
            good = True
        except (ValueError, RecursionError):
            good = False
        if good != whole:
            return False
    return True


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except ValueError as error:  # UnicodeDecodeError is one too
        raise InputError(f"{where}: not valid JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: not valid JSON: nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a JSON object; the first of two values of a key would be lost without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return values


def _read_local_table(reader: str, path: Path, plain: Path, **how: Any) -> Iterator[Row]:
    """The rows of the file ``path``, whose contents lie in ``plain``: streamed, for the cache of
    ``datasets`` tells files apart by name and time and may hold what stood in it before."""
    files = glob.escape(str(plain))
    yield from _read_table(
        reader, str(path), data_files=files, split="train", streaming=True, **how
    )


def _read_table(reader: str, what: str, **how: Any) -> Iterator[Row]:
    try:
        yield from _rows_of(datasets.load_dataset(reader, **how), what)
    except InputError:
        raise
    except Exception as error:  # whatever a library raises about the user's files
        cause = error.__cause__ or error
        origin = (
            "" if reader != what else " as a data set of the hub (there is no such file or folder)"
        )
        raise InputError(f"cannot read {what}{origin}: {_first_line(cause)}") from None


def _rows_of(table: Iterable[dict[str, Any]], what: str) -> Iterator[Row]:
    for number, values in enumerate(table, start=1):
        where = f"{what}: row {number}"
        values = remove_none_values(values)  # a table has every key in every row
        for name in NESTED:
            if isinstance(values.get(name), str) and values[name].strip():
                values[name] = _parse(values[name].encode(), f"{where}, {name}")
        yield Row(values, where)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
