"""A progress bar with the time left of the whole training; Lightning's own knows the epoch only."""

import time
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar


class TrainingProgressBar(TQDMProgressBar):
    """Lightning's bar, with the time left of all epochs, validations included, beside the loss.

    The loss is that of the last of each `log_every_n_steps` steps, which is logged as well: reading it waits for a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.start_time, self.start_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            self.loss = {"train/loss": trainer.callback_metrics["train/loss"].item()}
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        shown = {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
        done = trainer.global_step - getattr(self, "start_step", trainer.global_step)
        total = trainer.estimated_stepping_batches if trainer.training else float("inf")
        if done > 0 and total != float("inf"):
            seconds = (time.monotonic() - self.start_time) / done * (total - trainer.global_step)
            shown["all done in"] = str(timedelta(seconds=round(seconds)))
        return self.loss | shown
