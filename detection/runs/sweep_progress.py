"""The progress bar of a sweep, read from the files of its runs, which other processes write."""

import csv
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from roi_quantization.detection.runs.errors import FAILED
from roi_quantization.detection.runs.training_checkpoints import FINISHED


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
