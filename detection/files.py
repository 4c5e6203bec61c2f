"""Files that are there whole or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def atomic_write(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write that lies beside `path` and is moved there at the end, so that nobody ever reads half of it. Makes the folder.

    Content and name are on the disk afterwards: a machine that loses power keeps the file before it or this one.

    Raises:
        NotWrittenError: the disk is full, the folder read-only, ...; the message says what to do, and what was there before is there still.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(beside, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
            _sync_folder(path.parent)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise NotWrittenError(path, error) from error


class NotWrittenError(OSError):
    """`error`, with the file and what to do in its message."""

    def __init__(self, path: str | os.PathLike, error: OSError):
        if error.errno in FULL:
            remedy = "Make room there"
        elif error.errno in FORBIDDEN:
            remedy = "Make its folder writable, or choose another one"
        else:
            remedy = "See that its folder is there and works"
        super().__init__(
            error.errno,
            f"{path} could not be written: {error.strerror or error}. Nothing that was there before is lost. {remedy} and give the same "
            "command again, for a training with resume=auto",
        )


def _sync_folder(folder: Path) -> None:
    """The name of a file is written with its folder; Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
