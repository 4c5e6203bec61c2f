"""A sweep: many runs in one folder, of which finished ones are skipped and failed ones repeated, with one progress bar and a report."""

import contextlib
import csv
import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm import tqdm

from roi_quantization.detection.common.configuration import (
    differences,
    differences_beside_seeds,
    path_setting,
    read_configuration,
    shorten,
    sweep_lines,
)
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.renamed_targets import upgrade_config
from roi_quantization.detection.data.data_fingerprint import NAME as DATA
from roi_quantization.detection.data.data_fingerprint import digest
from roi_quantization.detection.data.module import DetectionData, describe
from roi_quantization.detection.model.build import instantiate
from roi_quantization.detection.report import write_report
from roi_quantization.detection.report.origin import add_origin
from roi_quantization.detection.runs.composition import hydra_config
from roi_quantization.detection.runs.distributed import is_distributed, is_rank_zero
from roi_quantization.detection.runs.errors import FAILED, is_expected, is_in_sweep, write_failure
from roi_quantization.detection.runs.lock import RunFolderLocked, exclusive_run_folder, is_running
from roi_quantization.detection.runs.resume import check_replaceable
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


def check_configuration(run_dir: Path, config: dict) -> None:
    """Check that the finished run in `run_dir` has the resolved configuration `config`.

    Raises:
        InputError: it has another; the message lists the differences.
    """
    differ = differences(_read_configuration(run_dir), config)
    if differ:
        raise InputError(
            f"{run_dir} contains a finished run of another configuration: {shorten(differ)}. Choose another folder for this sweep with "
            "hydra.sweep.dir=runs/<name>, or remove that run"
        )


def _read_configuration(run_dir: Path) -> dict:
    return upgrade_config(OmegaConf.to_container(read_configuration(run_dir / "config.yaml")))


def check_arms(runs: Mapping[Path, dict]) -> None:
    """Check that runs of one arm, which a report averages, differ in seeds alone, those that an earlier sweep left in the folder included.

    Args:
        runs: folder of each run of this sweep -> its resolved configuration.

    Raises:
        InputError: two differ in something else; the message lists it.
    """
    known: dict[tuple[Path, str], tuple[Path, dict]] = {}
    for folder in sweep_folders(runs):
        for path in sorted(folder.glob(f"*_seed*/{FINISHED}")):
            if path.parent not in runs and (path.parent / "config.yaml").is_file():
                config = _read_configuration(path.parent)
                known.setdefault((folder, str(config.get("arm"))), (path.parent, config))
    for run_dir, run in runs.items():
        other, config = known.setdefault((run_dir.parent, str(run["arm"])), (run_dir, run))
        if differ := differences_beside_seeds(config, run):
            raise InputError(
                f"{other} and {run_dir} are runs of one arm, of which the report gives the mean, and differ in more than their seeds: "
                f"{shorten(differ)}. Set `arm` to what differs, or choose another folder with hydra.sweep.dir=runs/<name>"
            )


def check_data(runs: Mapping[Path, dict], complete: bool) -> None:
    """Check that finished runs had the data of this sweep, as they are now.

    Where a run of an earlier version did not record its data, and `data.root` is another folder than it was, a warning names both.

    Args:
        runs: folder of each finished run -> its resolved configuration in this sweep.
        complete: whether no other run remains, so that nothing is trained on the data; then they are compared only where they have moved.

    Raises:
        InputError: the data are others; the message names both folders.
    """
    digests, warned = {}, set()
    for run_dir, run in runs.items():
        roots = [config["data"].get("root") for config in (read_configuration(run_dir / "config.yaml"), run)]
        before, now = (Path(path_setting(root, "data.root")) for root in roots)
        moved = before.resolve() != now.resolve()
        if complete and not moved:
            continue
        said = f"{run_dir} contains a finished run with data.root={before}, and this sweep has data.root={now}"
        if not (run_dir / DATA).is_file():
            if moved and (before, now) not in warned:
                log.warning("%s. Whether these are the same data is not known: earlier versions did not record it", said)
            warned.add((before, now))
            continue
        key = _data_key(run)
        if key not in digests:
            digests[key] = digest(_set_up(run["data"]))
        recorded = json.loads((run_dir / DATA).read_bytes())
        if others := [split for split in {**recorded, **digests[key]} if recorded.get(split) != digests[key].get(split)]:
            what = f"other images, annotations or proposals ({', '.join(others)})"
            raise InputError(
                (f"{said}, which has {what}. " if moved else f"{now} has {what} than when {run_dir} was trained. ")
                + "Choose another folder for this sweep with hydra.sweep.dir=runs/<name>, or remove that run"
            )


def record_origin(runs: Mapping[Path, dict]) -> None:
    """Prepare the data of all runs, which computes what they lack, and write each sweep folder's origin with a description of its data.

    Args:
        runs: folder of each run -> its resolved configuration.
    """
    described = {key: _describe(settings) for key, settings in {_data_key(run): run["data"] for run in runs.values()}.items()}
    for folder in sweep_folders(runs):
        own = [run for run_dir, run in runs.items() if run_dir.parent == folder]
        words: dict[str, dict[str, None]] = {}  # split -> its descriptions
        for run in own:
            for split, text in described[_data_key(run)].items():
                words.setdefault(split, {})[text] = None
        data = {split: " or ".join(texts) for split, texts in words.items()}
        add_origin(folder, data, [(str(run["arm"]), run["seed"]) for run in own])


def _describe(settings: dict) -> dict[str, str]:
    data = _set_up(settings)
    return {name: describe(split) for name in ("train", "val", "test") if (split := getattr(data, name)) is not None}


def _data_key(run: Mapping) -> str:
    return json.dumps({**run["data"], "seed": None})  # runs that differ in their seed have the same images


def _set_up(settings: dict) -> DetectionData:
    data = instantiate(OmegaConf.create({"data": settings}).data)  # an error names data.<key>
    data.prepare_data()
    data.setup()
    return data


def planned_runs(config: DictConfig) -> dict[Path, dict]:
    """List the run folders that a Hydra sweep is going to fill, each with its resolved configuration.

    Args:
        config: of the sweep, with `hydra`, as Hydra's callbacks get it.

    Raises:
        InputError: two runs would fill the same folder, or an `arm` is no name of a folder.
    """
    loader = GlobalHydra.instance().config_loader()
    overrides = OverridesParser.create(loader).parse_overrides(sweep_lines(config))
    ((*jobs,),) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    runs = {}
    for job in jobs:
        cfg = loader.load_sweep_config(config, job)
        with hydra_config(cfg), open_dict(cfg):
            run_dir = Path(cfg.hydra.sweep.dir) / cfg.hydra.sweep.subdir
            cfg.run_dir = str(run_dir)
            del cfg["hydra"]
            run = OmegaConf.to_container(cfg, resolve=True)
        if "/" in str(run.get("arm")) or os.sep in str(run.get("arm")):
            raise InputError(f"arm={run['arm']} is a part of the name of a folder. Write another character in the place of {os.sep}")
        if run_dir in runs:
            differ = shorten(differences(runs[run_dir], run)) or "they are the same"
            raise InputError(
                f"two runs of this sweep have the folder {run_dir}: {differ}. It is named by `arm` and `seed`: set `arm` to what differs, "
                "such as 'arm=${hydra:runtime.choices.roi}_${roi.sampling_ratio}'"
            )
        runs[run_dir] = run
    return runs


def sweep_folders(runs: Mapping[Path, dict]) -> list[Path]:
    """List the folders that contain the runs: one, or several where its name contains what is swept, such as the stride."""
    return list(dict.fromkeys(run_dir.parent for run_dir in runs))


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
            check_data({run_dir: runs[run_dir] for run_dir in finished}, complete=len(finished) == len(runs))
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


class SweepProgress:
    """A progress bar that counts finished and failed runs, and running ones by their epochs or steps."""

    def __init__(self, runs: Mapping[Path, dict], every: float = 2.0):
        self.runs = runs
        self.every = every  # seconds
        for run_dir in runs:
            (run_dir / FAILED).unlink(missing_ok=True)  # it is repeated
        shown = "{l_bar}{bar}| {n:.1f} of {total} runs, {elapsed}, {remaining} left{postfix}"
        self.bar = tqdm(total=len(runs), initial=self.done(), bar_format=shown)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()
        self._show()
        self.bar.close()

    def done(self) -> float:
        return sum(share_done(run_dir, config["trainer"]) for run_dir, config in self.runs.items())

    def _watch(self) -> None:
        while not self.stopped.wait(self.every):
            self._show()

    def _show(self) -> None:
        failed = sum((run_dir / FAILED).is_file() for run_dir in self.runs)
        if failed:
            self.bar.set_postfix_str(f"{failed} failed", refresh=False)
        self.bar.n = self.done()
        self.bar.refresh()


def share_done(run_dir: Path, trainer: Mapping[str, Any]) -> float:
    """Return how much of a run is done, 0 to 1.

    A running one counts by the last epoch or step in its metrics.csv, whichever of the limits of `trainer` is nearer. Evaluation counts as
    a tenth of the training.
    """
    if any((run_dir / name).is_file() for name in (FINISHED, FAILED)):
        return 1.0
    logged = run_dir / "metrics.csv"
    if not logged.is_file():
        return 0.0
    with open(logged, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {"max_epochs": "epoch", "max_steps": "step"}
    shares = [
        max((int(row[column]) for row in rows if (row.get(column) or "").isdigit()), default=0) / trainer[limit]
        for limit, column in columns.items()
        if (trainer.get(limit) or -1) > 0
    ]
    return min(max(shares, default=0.0), 1.0) / 1.1
