"""Atomic writing: a file is complete or not there. Reading of those that were damaged since."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from roi_quantization.detection.common.errors import ExpectedError, InputError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_PERMITTED = {errno.EACCES, errno.EPERM, errno.EROFS}
CACHE_REMEDY = "set the environment variable ROI_CACHE to a folder that can be written"  # for what is computed once


def atomic_write(path: str | os.PathLike, content: bytes) -> None:
    """Write `content` to a file by `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing, and rename it to `path` at the end. Creates the folder.

    Content and name are synced: after a power failure there is either the previous file or the complete new one.

    Raises:
        NotWrittenError: the disk is full, the folder is read-only, ...; a previous file is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise NotWrittenError(path, error) from error


def read_json(path: Path, kind: type) -> Any:
    """Read a JSON file that holds a `kind`, dict or list.

    Raises:
        InputError: it does not, or it is no JSON; the message names it.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a JSON file, or was truncated: {error}. Restore or remove it") from error
    if not isinstance(content, kind):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a {kind.__name__}. Restore or remove it")
    return content


@contextmanager
def locked_cache(lock: Path) -> Iterator[None]:
    """Hold the lock of a cache: of the processes that want the same content one computes it, and the others wait here.

    Args:
        lock: a file beside the cache; its folder is created.

    Raises:
        NotWrittenError: the folder cannot be written.
    """
    held = FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except OSError as error:
        raise NotWrittenError(lock.parent, error, CACHE_REMEDY) from error
    try:
        yield
    finally:
        held.release()


class NotWrittenError(ExpectedError, OSError):
    """A file could not be written; the message names it and says what to do."""

    def __init__(self, path: str | os.PathLike, error: OSError, other_remedy: str = ""):
        if error.errno in DISK_FULL:
            remedy = "Make room there"
        elif error.errno in NOT_PERMITTED:
            remedy = "Make its folder writable, or choose another one"
        else:
            remedy = "Check its folder"
        remedy += f", or {other_remedy}," if other_remedy else ""
        super().__init__(
            error.errno,
            f"{path} could not be written: {error.strerror or error}. No earlier file is lost. {remedy} and repeat the command, for a "
            "training with resume=auto",
        )


def _sync_folder(folder: Path) -> None:
    """Sync a folder, which holds the names of its files. Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
