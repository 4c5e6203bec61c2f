"""A sweep: many runs in one folder, of which finished ones are skipped and failed ones repeated, with one progress bar and a report."""

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from roi_quantization.detection.common.configuration import path_setting
from roi_quantization.detection.report import write_report
from roi_quantization.detection.runs.distributed import is_distributed, is_rank_zero
from roi_quantization.detection.runs.errors import FAILED, is_expected, is_in_sweep, write_failure
from roi_quantization.detection.runs.lock import RunFolderLocked, exclusive_run_folder, is_running
from roi_quantization.detection.runs.planned_runs import (
    check_arms,
    check_configuration,
    check_data,
    earlier_runs,
    planned_runs,
    record_origin,
    sweep_folders,
)
from roi_quantization.detection.runs.resume import check_replaceable
from roi_quantization.detection.runs.sweep_progress import SweepProgress
from roi_quantization.detection.runs.training_checkpoints import FINISHED

log = logging.getLogger(__name__)

SWEEP = "ROI_SWEEP_PROCESS"  # environment variable: the process id of the sweep, which may end before its workers ask for their parent


def run_in_sweep(train: Callable[[DictConfig], dict[str, float]], cfg: DictConfig) -> dict[str, float]:
    """Call `train(cfg)` of a run with an `arm`, unless it is finished, or running in a job that has outlived the sweep that queued it.

    Its output goes to train.log. If it fails, failed.txt says why, and the callbacks of the sweep set the exit status.

    Returns:
        What `train` returns; `cfg.optimized_metric` is NaN where nothing was trained.

    Raises:
        InputError: the folder contains a finished run of another configuration.
        Exception: outside a Hydra sweep, and where several ranks train together, which wait for each other until one ends with an error.
    """
    raises = not is_in_sweep() or is_distributed()
    _exit_with_sweep()
    cfg.run_dir = path_setting(cfg.run_dir, "run_dir")
    run_dir = Path(cfg.run_dir)
    no_metrics = {cfg.optimized_metric: math.nan}
    if (run_dir / FINISHED).is_file():
        check_configuration(run_dir, OmegaConf.to_container(cfg, resolve=True))
        if not is_in_sweep():
            log.warning("Nothing was trained: %s contains this run, finished. To repeat it, remove the folder or set run_dir", run_dir)
        return no_metrics
    run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(exclusive_run_folder(run_dir))
        except RunFolderLocked as error:
            if raises:
                raise
            log.warning("%s", error)
            return no_metrics
        if is_rank_zero():
            (run_dir / FAILED).unlink(missing_ok=True)
        file = stack.enter_context(open(run_dir / "train.log", "a", buffering=1))
        stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(contextlib.redirect_stderr(file))
        try:
            metrics = train(cfg)
        except Exception as error:
            write_failure(run_dir, error)
            if raises:
                raise
            log.exception("This run failed")
            traceback.clear_frames(error.__traceback__)  # they would keep the weights of this run in memory during the next
            return no_metrics
        if is_rank_zero():
            (run_dir / "last.ckpt").unlink(missing_ok=True)  # nothing goes on from it, and there may be many runs
        return metrics


@cache
def _exit_with_sweep(every: float = 2.0) -> None:
    """In a worker of joblib, exit when the sweep does: it would survive a sweep that is killed and write into its runs."""
    if multiprocessing.current_process().name == "MainProcess":
        return
    parent = int(os.environ.get(SWEEP, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class SweepCallback(Callback):
    """Prepares the data of a Hydra sweep, checks existing runs, shows one progress bar for all runs, and writes the report.

    Args:
        reference: the arm that the report compares the others with, see `write_report`.
    """

    def __init__(self, reference: str | None = "align") -> None:
        self.reference = reference
        self.progress: SweepProgress | None = None

    def __getstate__(self) -> dict:
        return {"reference": self.reference, "progress": None}  # other processes get a copy of this callback, without the bar

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        HydraConfig.instance().set_config(config)  # Hydra does so for each run only, and the folder of the sweep has ${hydra:...} as well
        try:
            runs = planned_runs(config)
            finished = [run_dir for run_dir in runs if (run_dir / FINISHED).is_file()]
            for run_dir, run in runs.items():
                if run_dir in finished:
                    check_configuration(run_dir, run)
                elif run.get("resume") == "auto":
                    check_replaceable(run_dir, run)
            check_arms(runs)
            there = {run_dir: runs[run_dir] for run_dir in finished} | earlier_runs(runs)
            check_data(there, complete=len(finished) == len(runs))
            if len(finished) < len(runs):  # what the runs share is computed once, on all cores, and its errors are printed once
                record_origin(runs)
        except Exception as error:
            if not is_expected(error):
                traceback.print_exc()
            sys.exit(f"train.py: {error}")  # Hydra would print any other exception of a callback as a warning
        os.environ[SWEEP] = str(os.getpid())
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that joblib ends its workers
        self.progress = SweepProgress(runs)
        self.progress.start()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        self.progress.stop()
        runs = self.progress.runs
        failed = [str(path) for run_dir in runs if (path := run_dir / FAILED).is_file()]
        outcome = f"{len(failed)} of {len(runs)} runs failed; {failed[0]} says why. The same command repeats them" if failed else ""
        for folder in sweep_folders(runs):
            if not any(folder.glob(f"*_seed*/{FINISHED}")):  # of this sweep or an earlier one
                continue
            try:
                print(f"The report: {write_report(folder, self.reference)}")
            except Exception:
                traceback.print_exc()
                sys.exit(
                    f"{outcome or 'The runs are complete'}. Their report failed. Repeat it with: "
                    f"python -m roi_quantization.detection.report {folder}"
                )
        running = [str(run_dir) for run_dir in runs if not (run_dir / FINISHED).is_file() and is_running(run_dir)]
        if running:
            print(
                f"{len(running)} of {len(runs)} runs, such as {running[0]}, are still running in other processes and are not in the report"
            )
        if outcome:
            sys.exit(outcome)
