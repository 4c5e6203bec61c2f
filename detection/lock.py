"""One process at a time writes into a run folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detection.evaluation.files import NotWrittenError

try:
    import fcntl
except ImportError:  # Windows: runs are not told apart there
    fcntl = None


@contextmanager
def only_process(run_dir: str | Path) -> Iterator[None]:
    """Inside, this process has the run folder to itself; the system gives it back however the process ends.

    Raises:
        ValueError: another process is at work there.
        NotWrittenError: the folder cannot be made or written to.
    """
    if fcntl is None or int(os.environ.get("LOCAL_RANK", 0)) > 0:  # the processes of one training share a folder: the first holds it
        yield
        return
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        file = open(_path(run_dir), "a")  # noqa: SIM115
    except OSError as error:
        raise NotWrittenError(_path(run_dir), error) from error
    with file:
        if not _taken(file):
            raise ValueError(f"another process is at work in {run_dir}. Wait, or choose another folder with hydra.run.dir=runs/<name>")
        yield


def is_running(run_dir: str | Path) -> bool:
    """Whether another process is at work in a run folder."""
    if fcntl is None or not _path(run_dir).is_file():
        return False
    try:
        with open(_path(run_dir), "r+") as file:
            return not _taken(file)
    except OSError:  # read-only: nobody writes there
        return False


def _path(run_dir: str | Path) -> Path:
    return Path(run_dir) / ".lock"


def _taken(file) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock would pass to loading processes, which outlive a kill a little
    except OSError:
        return False
    return True
