"""New files and folders: there whole, or not there, whenever the process or the machine dies.

A folder is prepared beside its place under a name that says so, ``.NAME.losia-unfinished``, held
by a lock, and takes its name in one rename, after all of it has reached the disk. Such a name alone
makes a folder ours: there is no moment in which it is not. Who looks for ``NAME*`` does not find it.
"""

import errno
import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".losia-unfinished"  # what the name of a folder ends with that is being written
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EBADF, errno.ENOSYS)


class PlaceError(ValueError):
    """A place that cannot be written to: ``path``, and ``reason`` why."""

    def __init__(self, path: Path, reason: str | None):
        super().__init__(f"cannot write {path}: {reason}")
        self.path, self.reason = path, reason


def write_json(path: Path, values: dict) -> None:
    """``values`` as JSON at ``path``: the old file or the new one, never a part."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """``text`` at ``path``: the old file or the new one, never a part."""
    beside = path.with_name(path.name + ".tmp")
    beside.unlink(missing_ok=True)  # a link there would be written through
    try:
        with open(beside, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or what stands in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """The same of a folder with all that is in it."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def check_absent(folder: str | Path) -> None:
    """Raises ValueError if ``folder`` exists."""
    if os.path.lexists(folder):
        raise ValueError(f"{folder} exists: name a new folder")


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """``folder`` exists inside. If something fails, what had to be made for that is gone, as far as
    it is empty. Raises PlaceError if it cannot be made or written to."""
    absent = [each for each in (folder, *folder.parents) if not each.exists()]
    ours: list[Path] = []  # another process may make one of them at the same time
    try:
        for each in reversed(absent):
            with suppress(FileExistsError):
                each.mkdir()
                ours.insert(0, each)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is no folder")
        if not os.access(folder, os.W_OK | os.X_OK) or os.statvfs(folder).f_flag & os.ST_RDONLY:
            raise PermissionError(errno.EACCES, "no permission to write there")
    except OSError as error:
        _remove_empty(ours)
        raise PlaceError(folder, error.strerror) from None
    try:
        yield
    except BaseException:
        _remove_empty(ours)
        raise


def _remove_empty(folders: list[Path]) -> None:
    for each in folders:
        with suppress(OSError):
            each.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """``folder`` is this process's inside; the lock goes with the process, however that ends.

    Raises ValueError if another process holds it. Where the file system has no locks, a warning
    says so.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise ValueError(f"{folder} is no folder to write in: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is writing {folder}: wait until it is done"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(
                f"{folder} is on a file system without locks: take care that no other process writes there",
                stacklevel=3,
            )
        yield
    finally:
        os.close(handle)


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into that becomes ``folder`` when all is written, and is gone if something
    fails.

    What a killed process left of it is removed. Raises ValueError if ``folder`` exists, cannot be
    written, or is being written by another process.
    """
    folder = Path(os.path.abspath(folder))
    check_absent(folder)
    beside = beside_of(folder)
    with made(beside), locked(beside):
        check_absent(folder)  # a process that held the lock may have been done just now
        try:
            _empty(beside)
            yield beside
            sync_all(beside)
            os.rename(beside, folder)
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise


def beside_of(folder: Path) -> Path:
    """Where ``folder`` is prepared."""
    return folder.with_name(f".{folder.name}{UNFINISHED}")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
