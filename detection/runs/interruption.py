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

from roi_quantization.detection.common.errors import ExpectedError, InputError, MissingFileError
from roi_quantization.detection.common.files import DISK_FULL, NotWrittenError, atomic_write
from roi_quantization.detection.model.optim import is_fused
from roi_quantization.detection.runs.step_flags import StepFlags
from roi_quantization.detection.runs.training_checkpoints import periodic_checkpoints

log = logging.getLogger(__name__)


REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2) if hasattr(signal, "SIGUSR1") else ()  # of clusters, before a job's time is up


class GracefulStop(pl.Callback):
    """Stops training at SIGTERM, Ctrl-C and a cluster's SIGUSR1 and SIGUSR2: the step ends, `PeriodicCheckpoint` saves, the process exits.

    A second Ctrl-C exits at once. Several ranks agree in each step (`TerminateOnNonFiniteLoss` asks them) and stop after it, or after the
    next one, whichever of them got the signal: one that stopped alone would leave the others waiting. (Lightning's own handling
    communicates between ranks inside the signal handlers, which run at different moments.) The exit status is the shell's for the signal
    (143, 130, ...) on rank zero and 0 on the others; Lightning's 0 would read as success.

    Attributes:
        signal: the one that this process got.
        is_agreed: whether the ranks know of a signal that one of them got.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.is_agreed = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, *REQUEUE_SIGNALS):
                signal.signal(number, self._on_signal)  # Lightning restores the previous handlers at the end
        if trainer.world_size > 1:
            # in each step Lightning would wait for rank zero to say whether it got a signal, which only this callback knows
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def _on_signal(self, number: int, _: Any) -> None:
        self.signal = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            log.warning("Ctrl-C: stopping after this step. Press it again to stop at once and go on from the last checkpoint")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        is_signalled = self.is_agreed if trainer.world_size > 1 else self.signal is not None
        if is_signalled and batch_idx % trainer.accumulate_grad_batches == 0:
            raise SIGTERMException

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_signalled = self.signal is not None
        if trainer.world_size > 1:
            is_signalled = trainer.strategy.reduce_boolean_decision(is_signalled, all=False)
        if is_signalled:
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
    """Ends training at the first loss that is NaN or infinite, and writes the batch into nan_loss.json.

    On a CPU this is before the loss changes the weights. A GPU is not waited for: it notices by itself, and the host reads so in the next
    step, or before a validation or a checkpoint. So no file gets weights of such a loss. A fused optimizer leaves out the update itself.

    All ranks end together: one that ended alone would leave the others waiting for its gradients. They agree in one reduction a step, on
    signals as well.

    Args:
        folder: the run folder.
        seed: of the run; with the epoch and the image ids it determines the flips and the sampled RoIs.
        stop: is told whether any rank got a signal.
    """

    def __init__(self, folder: str | Path, seed: int, stop: GracefulStop):
        self.folder, self.seed, self.stop, self.flags = Path(folder), seed, stop, StepFlags()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.batch, self.batch_idx = batch, batch_idx

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._check(trainer, pl_module)  # the step before
        loss, signalled = loss.detach(), torch.full((), self.stop.signal is not None, device=loss.device)
        flags = self.flags.send(torch.stack([~loss.isfinite(), signalled]).int(), trainer.world_size)
        self.loss = loss
        self.found = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "batch": self.batch_idx,
            "rank": trainer.global_rank,
            "image_ids": [int(target["image_id"]) for target in self.batch[1]],
            "seed": self.seed,
            "lr": [group["lr"] for group in trainer.optimizers[0].param_groups],
        }
        if not self.flags.is_late:
            self._check(trainer, pl_module)
        elif getattr(trainer.precision_plugin, "scaler", None) is None and is_fused(trainer.optimizers[0]):
            trainer.optimizers[0].found_inf = flags[0].float()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(trainer, pl_module)

    on_train_end = on_validation_start = on_train_epoch_end

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check(trainer, pl_module)

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the flags of the last step, if they were not read yet.

        Raises:
            NonFiniteLossError: the loss was not finite.
        """
        is_bad, is_signalled = self.flags.read() or (False, False)
        self.stop.is_agreed |= is_signalled
        if not is_bad:
            return
        found, path = self.found, self.folder / "nan_loss.json"
        if math.isfinite(self.loss.item()):
            raise NonFiniteLossError(f"the loss of another rank is not finite in step {found['step']}. {path} names its batch")
        largest = torch.stack([weight.detach().abs().max() for weight in pl_module.parameters()]).max().item()
        found |= {"loss": f"{self.loss.item()}", "largest_weight": f"{largest:.3g}"}  # JSON has no NaN
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

    Likewise where `trainer.val_check_interval` is longer than an epoch, which Lightning notices only when training begins.

    Where SIGTERM ends an evaluation the exit status is 143; Lightning's 0 would read as success.
    """
    try:
        yield
    except SIGTERMException as stop:
        if stop.code is None:
            stop.code = 128 + signal.SIGTERM
        raise
    except ValueError as error:
        if "val_check_interval" not in str(error):
            raise
        raise InputError(f"trainer.val_check_interval: {error}") from error
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
