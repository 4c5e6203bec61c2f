"""Does loading keep up? How long training waits for its data, measured where it waits."""

import logging
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

log = logging.getLogger(__name__)

MUCH = 0.05  # from this part of the time on it is worth a hint


class TimedDataLoader(DataLoader):
    """A DataLoader that knows how long its batches were waited for: `waited`, in seconds, since it was made."""

    waited = 0.0

    def __iter__(self) -> Iterator[Any]:
        begin = time.perf_counter()
        batches = super().__iter__()
        for batch in batches:
            self.waited += time.perf_counter() - begin
            yield batch
            begin = time.perf_counter()


class LoadingTimeMonitor(pl.Callback):
    """Logs `train/waiting`, the part (0 to 1) of the last steps' time in which training waited for data; tells that of all at the end.

    The time is that of training steps and of the waits for their batches; validations are in neither. Steps count as long as they take
    Python, which on a GPU runs ahead of the device by less than a step. Without loading processes, loading *is* waiting.
    The loader must be a `TimedDataLoader`. Each process logs its own.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.waited = self.worked = 0.0
        self.recent: deque[tuple[float, float]] = deque(maxlen=max(1, trainer.log_every_n_steps))  # (waited, worked) of each step, seconds
        self.before = trainer.train_dataloader.waited

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = trainer.train_dataloader.waited
        waited, worked = now - self.before, time.perf_counter() - self.began
        self.before = now
        self.waited, self.worked = self.waited + waited, self.worked + worked
        self.recent.append((waited, worked))
        pl_module.log("train/waiting", share(*map(sum, zip(*self.recent, strict=True))))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.worked:
            log.info(tell(share(self.waited, self.worked), trainer.train_dataloader.num_workers))


def share(waited: float, worked: float) -> float:
    return waited / (waited + worked)


def tell(waiting: float, num_workers: int) -> str:
    """One sentence, with a hint where much of the time (0 to 1) was waited."""
    told = f"Waited for data {waiting:.1%} of the training time"
    if waiting <= MUCH:
        return told
    if num_workers == 0:
        return f"{told}: the training process loads by itself. data.num_workers=2 loads beside it, where there are cores to spare"
    return f"{told}: {num_workers} processes do not keep up. A larger data.num_workers helps, where there are cores to spare"
