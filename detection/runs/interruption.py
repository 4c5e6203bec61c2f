"""What ends a training early: signals, a non-finite loss, and failures of the machine."""

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

from roi_quantization.detection.common.errors import ExpectedError, MissingFileError
from roi_quantization.detection.common.files import DISK_FULL, NotWrittenError, atomic_write
from roi_quantization.detection.runs.training_checkpoints import periodic_checkpoints

log = logging.getLogger(__name__)


REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2) if hasattr(signal, "SIGUSR1") else ()  # of clusters, before a job's time is up


class GracefulStop(pl.Callback):
    """Stops training at SIGTERM, Ctrl-C and a cluster's SIGUSR1 and SIGUSR2: the step ends, `PeriodicCheckpoint` saves, the process exits.

    A second Ctrl-C exits at once. The ranks agree before each step, whichever of them got the signal: one that stopped alone would leave
    the others waiting. (Lightning's own handling communicates between ranks inside the signal handlers, which run at different moments.)
    The exit status is the shell's for the signal (143, 130, ...) on rank zero and 0 on the others; Lightning's 0 would read as success.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, *REQUEUE_SIGNALS):
                signal.signal(number, self._on_signal)  # Lightning restores the previous handlers at the end

    def _on_signal(self, number: int, _: Any) -> None:
        self.signal = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            log.warning("Ctrl-C: stopping after this step. Press it again to stop at once and go on from the last checkpoint")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._stop_if_signalled(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_if_signalled(trainer)

    def _stop_if_signalled(self, trainer: pl.Trainer) -> None:
        signalled = self.signal is not None
        if trainer.world_size > 1:
            signalled = trainer.strategy.reduce_boolean_decision(signalled, all=False)
        if signalled:
            raise SIGTERMException

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):
            number = self.signal or signal.SIGTERM
            exception.code = 128 + number if trainer.is_global_zero else 0
            if trainer.is_global_zero:
                log.warning("Stopped by %s after step %d. resume=auto goes on from there", number.name, trainer.global_step)


@contextmanager
def reraise_signal() -> Iterator[None]:
    """Raise a SIGUSR1 or SIGUSR2 that has stopped the training again for the handler before it: submitit's, which requeues the job."""
    try:
        yield
    except SIGTERMException as stop:
        if stop.code is not None and stop.code - 128 in REQUEUE_SIGNALS and callable(signal.getsignal(stop.code - 128)):
            signal.raise_signal(stop.code - 128)
        raise


class NonFiniteLossError(ExpectedError, FloatingPointError):
    """The loss is NaN or infinite; the message names the step and the images."""


class TerminateOnNonFiniteLoss(pl.Callback):
    """Ends training at the first loss that is NaN or infinite, before it changes the weights, and writes the batch into nan_loss.json.

    All ranks end together: one that ended alone would leave the others waiting for its gradients.

    Args:
        folder: the run folder.
        seed: of the run; with the epoch and the image ids it determines the flips and the sampled RoIs.
    """

    def __init__(self, folder: str | Path, seed: int):
        self.folder, self.seed = Path(folder), seed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.batch, self.batch_idx = batch, batch_idx

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        is_finite, path = math.isfinite(loss.item()), self.folder / "nan_loss.json"
        if trainer.strategy.reduce_boolean_decision(is_finite, all=True) if trainer.world_size > 1 else is_finite:
            return
        if is_finite:
            raise NonFiniteLossError(f"the loss of another rank is not finite in step {trainer.global_step}. {path} names its batch")
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
            "loss": f"{loss.item()}",  # JSON has no NaN
            "largest_weight": f"{largest:.3g}",
        }
        repeat = "the same command comes to this batch again"
        if periodic_checkpoints(self.folder):
            repeat = f"the same command with resume={self.folder} comes to this batch again from the last checkpoint"
        atomic_write(path, (json.dumps(found, indent=2) + "\n").encode())
        raise NonFiniteLossError(
            f"the loss is {found['loss']} in step {found['step']} (epoch {found['epoch']}, batch {found['batch']}, images "
            f"{found['image_ids']}), the largest weight {found['largest_weight']}. {path} has the details, and {repeat}. If weights are "
            "large, set a lower optim.groups.lr or trainer.gradient_clip_val=10 (in 16 bits with optim.optimizer.fused=null). If not, look "
            "at these images"
        )


class WorkerDiedError(ExpectedError, RuntimeError):
    """A data-loader worker was killed; the message says why that happens."""


@contextmanager
def explain_errors(run_dir: str | Path) -> Iterator[None]:
    """Say what to do when a data-loader worker dies, the disk is full or the run folder is gone during training or evaluation.

    Where SIGTERM ends an evaluation the exit status is 143; Lightning's 0 would read as success.
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
        raise WorkerDiedError(
            f"a data-loader worker died: {error}. The usual cause is that memory has run out, of the machine (see `dmesg`) or of /dev/shm "
            "(in Docker: --shm-size). Set a smaller data.num_workers (0 loads in the training process) or data.batch_size. The same "
            "command with resume=auto goes on from the last checkpoint, also with another data.num_workers"
        ) from error
    except OSError as error:
        if not Path(run_dir).is_dir():
            raise MissingFileError(
                f"the run folder {run_dir} is gone: it was moved or removed, or its disk is no longer there. Its checkpoints are with it: "
                "resume=<the folder> goes on from them"
            ) from error
        if error.errno in DISK_FULL and not isinstance(error, NotWrittenError):
            raise NotWrittenError(error.filename or f"a file in {run_dir}", error) from error
        raise
