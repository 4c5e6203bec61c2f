"""Faults of a machine, for tests that let them happen."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    """Inside, the system ends each write at this place of a file with an error (EFBIG), as it does at the end of a disk (ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def power_cut() -> None:
    raise RuntimeError("as good as a power cut: nothing is saved after it")
