"""Periodic checkpoints of the whole training state, from which a run that was killed goes on."""

import csv
import errno
import io
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import SIGTERMException

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.files import atomic_write

FINISHED = "metrics.json"  # the last file that a run writes: a run with it is finished
RESULTS = (FINISHED, "results.json", "cross.json")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint by `atomic_write`. Lightning's own goes through /tmp, from where a move may be a copy."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if not Path(path).parent.is_dir():  # creating a moved run folder anew would split the run
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(Path(path).parent))
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with buffer.getbuffer() as content:  # released also where writing fails: Python 3.12.1 crashes when it collects one in use
            atomic_write(path, content)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Load on the CPU, and never a pickle that runs code, whatever Lightning's own would do."""
        return torch.load(path, map_location="cpu", weights_only=True)


def periodic_checkpoints(folder: str | Path) -> list[Path]:
    """List the `step_<n>.ckpt` of a run folder, newest first."""
    return sorted(Path(folder).glob("step_*.ckpt"), reverse=True)


class PeriodicCheckpoint(Checkpoint):
    """Saves the training state as `step_<n>.ckpt` every n steps and at SIGTERM, and keeps the newest files.

    It saves between two steps: after everything that belongs to the last one, a validation included, and before the next. (Lightning's
    `ModelCheckpoint(every_n_train_steps=...)` saves before the validation, which a run that goes on from there then leaves out.)

    Args:
        folder: the run folder.
        every_n_steps: optimizer steps.
        keep: number of files. With two or more, one is left when the newest is damaged.

    Attributes:
        has_trained: whether a step was taken. A training that goes on may be complete already.
    """

    def __init__(self, folder: str | Path, every_n_steps: int, keep: int = 2):
        super().__init__()
        if every_n_steps < 1 or keep < 1:
            raise InputError(f"checkpoint.every_n_steps={every_n_steps} and checkpoint.keep={keep}: expected 1 or more")
        self.folder, self.every_n_steps, self.keep = Path(folder), every_n_steps, keep
        self._saved_step = 0  # a training at step 0 has nothing to save
        self._logged: list[dict[str, str]] = []
        self.has_trained = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            for temporary in self.folder.glob(".*.ckpt.*.tmp"):  # of a process that was killed while it wrote
                temporary.unlink()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            for logger in _csv_loggers(trainer):
                logger.experiment.metrics[:0] = self._logged  # CSVLogger starts a new file and has deleted these rows
                logger.save()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove checkpoints of later steps and results: they are damaged, or of a run that this one replaces in its folder."""
        now = self.folder / f"step_{trainer.global_step:07d}.ckpt"
        outdated = [path for path in periodic_checkpoints(self.folder) if path > now]
        outdated += [self.folder / name for name in ("last.ckpt", *RESULTS)]
        if trainer.is_global_zero:
            for path in outdated:
                if path.resolve() != Path(trainer.ckpt_path or "").resolve():
                    path.unlink(missing_ok=True)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.has_trained = True
        # the step number of logged rows: after some resumptions Lightning's is one too large
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save at a stop, which takes effect between two batches; any other exception comes in the middle of one."""
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if isinstance(exception, SIGTERMException) and trainer.training and batches % trainer.accumulate_grad_batches == 0:
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Save unless this step is saved already, and remove the oldest files."""
        if trainer.global_step == self._saved_step:
            return
        self._saved_step = trainer.global_step
        for logger in _csv_loggers(trainer):
            logger.save()
        trainer.save_checkpoint(self.folder / f"step_{self._saved_step:07d}.ckpt")
        if trainer.is_global_zero:
            for old in periodic_checkpoints(self.folder)[self.keep :]:
                old.unlink()

    def clear(self, trainer: pl.Trainer) -> None:
        """Remove all files, when training is over."""
        if trainer.is_global_zero:
            for path in periodic_checkpoints(self.folder):
                path.unlink()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the position between two steps; Lightning's counts the next batch once it is fetched."""
        loops = checkpoint["loops"]["fit_loop"]
        batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
        for count in (batches["total"], batches["current"]):
            count["ready"] = count["completed"]
        if epochs["current"]["completed"] == epochs["current"]["ready"]:  # between two epochs
            batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give `ModelCheckpoint` the paths of this run folder, which may have been moved; it would lose the best checkpoint otherwise.

        From a checkpoint of another run it gets no best checkpoint: it would take that run's for its own. A `ModelCheckpoint` of
        `trainer.callbacks` that saves elsewhere stays as it is.
        """
        here = self.folder.resolve()
        before = checkpoint["callbacks"].get(self.state_key, {}).get("folder")
        of_another_run = Path(trainer.ckpt_path).resolve().parent != here
        for state in checkpoint["callbacks"].values():
            if "best_k_models" not in state or (before is not None and state["dirpath"] != before):
                continue
            if of_another_run:
                state["best_model_path"] = ""
            else:
                state["dirpath"] = str(here)
                for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
                    state[key] = state[key] and str(here / Path(state[key]).name)
                state["best_k_models"] = {str(here / Path(path).name): score for path, score in state["best_k_models"].items()}

    def state_dict(self) -> dict[str, Any]:
        """Include the rows of metrics.csv, so that a run that goes on has complete curves."""
        state = {"step": self._saved_step, "folder": str(self.folder.resolve()), "logged": []}
        path = self.folder / "metrics.csv"
        if path.is_file():
            with open(path, newline="") as file:
                state["logged"] = list(csv.DictReader(file))
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved_step, self._logged = state["step"], state["logged"]


def _csv_loggers(trainer: pl.Trainer) -> list[CSVLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
