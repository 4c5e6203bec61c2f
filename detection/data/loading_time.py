"""Measure how long training waits for the data loader."""

import logging
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

log = logging.getLogger(__name__)

HINT_THRESHOLD = 0.05  # share of the time above which the log line suggests a remedy


class TimedDataLoader(DataLoader):
    """A DataLoader that adds up the time its consumer waited for batches: `waiting_time`, in seconds, over all passes."""

    waiting_time = 0.0

    def __iter__(self) -> Iterator[Any]:
        start = time.perf_counter()
        batches = super().__iter__()
        for batch in batches:
            self.waiting_time += time.perf_counter() - start
            yield batch
            start = time.perf_counter()


class LoadingTimeMonitor(pl.Callback):
    """Logs `train/waiting`, the share (0 to 1) of the time in which training waited for data, over the last `log_every_n_steps` steps.

    The time is that of training steps and of waiting for their batches, without validation. A step is timed on the CPU, which a GPU
    follows with a delay of less than a step. With `num_workers=0` all loading is waiting. The training loader must be a
    `TimedDataLoader`; Lightning may replace it between epochs. Each rank logs its own share. The share of the whole training is logged
    at the end.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.waiting_time = self.step_time = 0.0
        self.recent: deque[tuple[float, float]] = deque(maxlen=max(1, trainer.log_every_n_steps))  # (waiting, step) seconds
        self.loader, self.seen = trainer.train_dataloader, trainer.train_dataloader.waiting_time

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.step_start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        waiting, step = self._waiting_since_last_step(trainer.train_dataloader), time.perf_counter() - self.step_start
        self.waiting_time, self.step_time = self.waiting_time + waiting, self.step_time + step
        self.recent.append((waiting, step))
        share = waiting_share(*map(sum, zip(*self.recent, strict=True)))
        pl_module.log("train/waiting", torch.tensor(share))  # a float would be copied to the device, which waits for it

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.step_time:
            log.info(format_waiting(waiting_share(self.waiting_time, self.step_time), trainer.train_dataloader.num_workers))

    def _waiting_since_last_step(self, loader: TimedDataLoader) -> float:
        if loader is not self.loader:  # a new loader counts from 0
            self.loader, self.seen = loader, 0.0
        before, self.seen = self.seen, loader.waiting_time
        return self.seen - before


def waiting_share(waiting_time: float, step_time: float) -> float:
    return waiting_time / (waiting_time + step_time)


def format_waiting(share: float, num_workers: int) -> str:
    """Format the share (0 to 1) of the time spent waiting as one sentence, with a remedy where it is above `HINT_THRESHOLD`."""
    sentence = f"Waited for data {share:.1%} of the training time"
    if share <= HINT_THRESHOLD:
        return sentence
    if num_workers == 0:
        return f"{sentence}: the training process loads by itself. Set data.num_workers=2 to load in parallel, where there are free cores"
    return f"{sentence}: {num_workers} data-loader workers do not keep up. Set a larger data.num_workers, where there are free cores"
