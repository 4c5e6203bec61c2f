"""One process at a time writes into a run folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roi_quantization.detection.files import NotWrittenError
from roi_quantization.detection.runs.distributed import is_rank_zero

try:
    import fcntl
except ImportError:  # Windows: runs are not told apart there
    fcntl = None

_held: set[Path] = set()  # by this process; to open and close such a file once more would give the lock back


class RunFolderLocked(ValueError):
    """Another process has the run folder."""


@contextmanager
def exclusive_run_folder(run_dir: str | Path) -> Iterator[None]:
    """Inside, this process has the run folder to itself; the system gives it back however the process ends.

    Raises:
        AtWork: another process is at work there.
        NotWrittenError: the folder cannot be made or written to.
    """
    if fcntl is None or not is_rank_zero():  # the processes of one training share a folder: the first holds it
        yield
        return
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        file = open(_path(run_dir), "a")  # noqa: SIM115
    except OSError as error:
        raise NotWrittenError(_path(run_dir), error) from error
    with file:
        if not _taken(file):
            raise RunFolderLocked(f"another process is at work in {run_dir}. Wait, or choose another folder with hydra.run.dir=runs/<name>")
        _held.add(_path(run_dir))
        try:
            yield
        finally:
            _held.remove(_path(run_dir))


def is_running(run_dir: str | Path) -> bool:
    """Whether another process is at work in a run folder; the first one of the same training is none."""
    if fcntl is None or not is_rank_zero() or _path(run_dir) in _held or not _path(run_dir).is_file():
        return False
    try:
        with open(_path(run_dir), "r+") as file:
            return not _taken(file)
    except OSError:  # read-only: nobody writes there
        return False


def _path(run_dir: str | Path) -> Path:
    return Path(run_dir).resolve() / ".lock"


def _taken(file) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock would pass to loading processes, which outlive a kill a little
    except OSError:
        return False
    return True
