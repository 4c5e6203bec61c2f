"""How a training ends before its time: at a signal between two steps, at a loss that is no number before it reaches the weights, by what
its machine does to it."""

import json
import logging
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from roi_quantization.detection.files import FULL, NotWrittenError, atomic_write
from roi_quantization.detection.runs.training_checkpoints import periodic_checkpoints

log = logging.getLogger(__name__)


REQUEUE = (signal.SIGUSR1, signal.SIGUSR2) if hasattr(signal, "SIGUSR1") else ()  # of clusters, some time before a job has to go


class GracefulStop(pl.Callback):
    """SIGTERM, Ctrl-C and a cluster's SIGUSR1 and SIGUSR2: the step ends, `PeriodicCheckpoint` saves, the process leaves. A second Ctrl-C
    leaves at once.

    Several processes agree on it before each step, whichever of them was told: one that stopped alone would leave the others waiting.
    Lightning's own way has each of them speak to the others from inside its signal handler, at different moments.
    The exit status is the shell's for the signal (143, 130, ...), not Lightning's 0, which would read as success; it is that of the
    first process, the others leave with 0.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, *REQUEUE):
                signal.signal(number, self._told)  # Lightning puts the handlers before it back at the end

    def _told(self, number: int, _: Any) -> None:
        self.signal = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            log.warning("Ctrl-C: stops after this step; once more: stops at once, to go on from the last checkpoint")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop(trainer)

    def _stop(self, trainer: pl.Trainer) -> None:
        told = self.signal is not None
        if trainer.strategy.reduce_boolean_decision(told, all=False) if trainer.world_size > 1 else told:
            raise SIGTERMException

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):
            number = self.signal or signal.SIGTERM
            exception.code = 128 + number if trainer.is_global_zero else 0
            if trainer.is_global_zero:
                log.warning("Stopped by %s after step %d; resume=auto goes on", number.name, trainer.global_step)


@contextmanager
def reraise_signal() -> Iterator[None]:
    """A SIGUSR1 or SIGUSR2 that has stopped the training inside goes on to who waited for it before: submitit, to queue the job again."""
    try:
        yield
    except SIGTERMException as stop:
        if stop.code is not None and stop.code - 128 in REQUEUE and callable(signal.getsignal(stop.code - 128)):
            signal.raise_signal(stop.code - 128)
        raise


class TerminateOnNonFiniteLoss(pl.Callback):
    """Ends training at the first loss that is no number, before it reaches the weights, and writes nan_loss.json: which batch it was.

    Several processes end together, whichever of them met it: one that ended alone would leave the others waiting for its gradients.

    Args:
        folder: the run folder.
        seed: of the run; with epoch and image ids it says which flips and RoIs were drawn.
    """

    def __init__(self, folder: str | Path, seed: int):
        self.folder, self.seed = Path(folder), seed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.batch, self.batch_idx = batch, batch_idx

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        finite, path = math.isfinite(loss.item()), self.folder / "nan_loss.json"
        if trainer.strategy.reduce_boolean_decision(finite, all=True) if trainer.world_size > 1 else finite:
            return
        if finite:
            step = trainer.global_step
            raise FloatingPointError(f"the loss of another process is no number in step {step}; {path} says which batch it was")
        _, targets = self.batch
        largest = torch.stack([weight.detach().abs().max() for weight in pl_module.parameters()]).max().item()
        found = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "batch": self.batch_idx,
            "rank": trainer.global_rank,
            "image_ids": [int(target["image_id"]) for target in targets],
            "seed": self.seed,
            "lr": [group["lr"] for group in trainer.optimizers[0].param_groups],
            "loss": f"{loss.item()}",  # json has no nan
            "largest_weight": f"{largest:.3g}",
        }
        again = "the same command comes to this batch again"
        if periodic_checkpoints(self.folder):
            again = f"the same command with resume={self.folder} comes to this batch again from the last checkpoint"
        atomic_write(path, (json.dumps(found, indent=2) + "\n").encode())
        raise FloatingPointError(
            f"the loss is {found['loss']} in step {found['step']} (epoch {found['epoch']}, batch {found['batch']}, images "
            f"{found['image_ids']}), the largest weight {found['largest_weight']}. {path} has the whole of it, and {again}. If weights are "
            "large, a lower optim.groups.lr or trainer.gradient_clip_val=10 helps (which in 16 bits wants optim.optimizer.fused=null); if "
            "not, look at these images"
        )


@contextmanager
def explain_errors(run_dir: str | Path) -> Iterator[None]:
    """Around training and evaluation: what to do about a loading process that died, a full disk, and a run folder that is gone.

    Where SIGTERM ends an evaluation the exit status is 143 and not Lightning's 0, which would read as success.
    """
    try:
        yield
    except SIGTERMException as stop:
        if stop.code is None:
            stop.code = 128 + signal.SIGTERM
        raise
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise RuntimeError(
            f"a process that loads images died: {error}. Nearly always memory has run out, of the machine (`dmesg` tells of a process that "
            "was killed) or of /dev/shm (in Docker: --shm-size). A smaller data.num_workers, 0 in the end, and a smaller data.batch_size "
            "need less. The same command with resume=auto goes on from the last checkpoint, and data.num_workers may differ"
        ) from error
    except OSError as error:
        if not Path(run_dir).is_dir():
            raise FileNotFoundError(
                f"the run folder {run_dir} is gone since this began: moved, removed, or its disk is. Where it is now are its checkpoints "
                "too: resume=<that folder> goes on from there"
            ) from error
        if error.errno in FULL and not isinstance(error, NotWrittenError):
            raise NotWrittenError(error.filename or f"a file in {run_dir}", error) from error
        raise
