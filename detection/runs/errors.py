"""What a script does at an error: a message, the traceback in the log file, and in a sweep the other runs."""

import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from roi_quantization.detection.common.configuration import sweep_lines
from roi_quantization.detection.common.errors import ExpectedError, InputError
from roi_quantization.detection.common.files import atomic_write
from roi_quantization.detection.runs.distributed import is_distributed

log = logging.getLogger(__name__)

FAILED = "failed.txt"  # in the folder of a run that failed: why
OWN_FOLDER = "${hydra:runtime.output_dir}"  # `run_dir` of the configurations: the folder that Hydra gives a run


def is_in_sweep() -> bool:
    """Whether this is a run of a Hydra sweep, by `-m` or by `hydra.mode=MULTIRUN`."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


@contextmanager
def handle_errors(script: str) -> Iterator[None]:
    """End the program with the message of an expected error and status 1; any other exception is raised with its traceback.

    In a sweep an error ends its own run only: the message is logged, failed.txt has the traceback, and `FailedRunsCallback` sets the
    exit status. The exception is raised where several ranks work together, since the others wait for this one.

    The log file always has the traceback. With HYDRA_FULL_ERROR in the environment it is printed for every exception.
    """
    in_sweep = is_in_sweep()
    failed = Path(HydraConfig.get().runtime.output_dir) / FAILED if in_sweep else None
    if failed:
        failed.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        is_alone = is_expected(error) and not os.environ.get("HYDRA_FULL_ERROR")
        if is_alone or not in_sweep:  # what is raised is printed by Hydra
            log_traceback(error)
        if not in_sweep:
            if is_alone:
                sys.exit(f"{script}: {error}")
            raise
        if is_alone:
            log.error("%s: %s", script, error)
        else:
            log.exception("%s failed", script)
        write_failure(failed.parent, error)
        if is_distributed():
            raise


def is_expected(error: BaseException) -> bool:
    """Whether the user can do something about it: an error of this project, or of the system for a file that it names."""
    return isinstance(error, ExpectedError) or (isinstance(error, OSError) and error.filename is not None)


def write_failure(run_dir: Path, error: Exception) -> None:
    """Write the traceback into failed.txt of a run folder."""
    atomic_write(run_dir / FAILED, "".join(traceback.format_exception(error)).encode())


def log_traceback(error: Exception) -> None:
    """Log a traceback to the log file without printing it."""
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, "%s", (error,), (type(error), error, error.__traceback__))
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def check_sweep_folder(config: DictConfig) -> None:
    """Check that the runs of a sweep have the folders that Hydra gives them.

    Args:
        config: of the sweep, with `hydra`, as Hydra's callbacks get it.

    Raises:
        InputError: `run_dir` is set: the runs would overwrite each other's results.
    """
    value = OmegaConf.to_container(config, resolve=False).get("run_dir", OWN_FOLDER)
    given = [line for line in sweep_lines(config) if line.lstrip("+").startswith("run_dir=")]
    if given or value != OWN_FOLDER:
        raise InputError(
            f"{given[-1] if given else f'run_dir={value}'}: runs of a sweep would overwrite each other's results there. Set "
            "hydra.sweep.dir=runs/<name>, in which each run has a folder of its own"
        )


class FailedRunsCallback(Callback):
    """Ends a Hydra sweep with status 1: before it starts where `run_dir` is set, or at its end where a run has failed."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        try:
            check_sweep_folder(config)
        except InputError as error:
            sys.exit(f"{config.hydra.job.config_name}.py: {error}")  # Hydra would print any other exception of a callback as a warning
        self.start = time.time()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        found = Path(config.hydra.sweep.dir).rglob(FAILED)
        failed = sorted(str(path) for path in found if path.stat().st_mtime >= self.start - 1)
        if failed:  # Hydra would print any other exception of a callback as a warning
            runs = "1 run" if len(failed) == 1 else f"{len(failed)} runs"
            sys.exit(f"{runs} failed. {failed[0]} says why")
