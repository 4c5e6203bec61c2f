"""The lock of a run folder: one process at a time writes into it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.files import NotWrittenError
from roi_quantization.detection.runs.distributed import is_rank_zero

try:
    import fcntl
except ImportError:  # Windows has no such locks: run folders are not locked there
    fcntl = None

_held: set[Path] = set()  # locks of this process: opening and closing such a file once more would release the lock


class RunFolderLocked(InputError):
    """Another process writes into the run folder."""


@contextmanager
def exclusive_run_folder(run_dir: str | Path) -> Iterator[None]:
    """Hold the lock of a run folder, which is created if necessary. The system releases it however the process ends.

    In a distributed run rank zero holds it for all. Inside another `with` of the same folder nothing happens.

    Raises:
        RunFolderLocked: another process holds it.
        NotWrittenError: the folder cannot be created or written to.
    """
    if fcntl is None or not is_rank_zero() or _lock_file(run_dir) in _held:
        yield
        return
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        file = open(_lock_file(run_dir), "a")  # noqa: SIM115
    except OSError as error:
        raise NotWrittenError(_lock_file(run_dir), error) from error
    with file:
        if not _try_lock(file):
            raise RunFolderLocked(
                f"another process is running in {run_dir}. Wait for it, or choose a folder with hydra.run.dir=runs/<name>"
            )
        _held.add(_lock_file(run_dir))
        try:
            yield
        finally:
            _held.remove(_lock_file(run_dir))


def is_running(run_dir: str | Path) -> bool:
    """Whether another process holds the lock of a run folder. The ranks of one training count as one process."""
    if fcntl is None or not is_rank_zero() or _lock_file(run_dir) in _held or not _lock_file(run_dir).is_file():
        return False
    try:
        with open(_lock_file(run_dir), "r+") as file:
            return not _try_lock(file)
    except OSError:  # read-only: no process writes there
        return False


def _lock_file(run_dir: str | Path) -> Path:
    return Path(run_dir).resolve() / ".lock"


def _try_lock(file: IO) -> bool:
    try:
        fcntl.lockf(
            file, fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # flock would be inherited by data-loader workers, which survive a kill for a moment
    except OSError:
        return False
    return True
