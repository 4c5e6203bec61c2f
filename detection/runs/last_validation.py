"""A validation after the last step, wherever this falls between two regular ones."""

from typing import Any

import pytorch_lightning as pl


class ValidateAtEnd(pl.Callback):
    """Validates the last weights too: most often they are the best ones, and without it best.ckpt could not hold them."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        ends_by_steps = 0 < trainer.max_steps <= trainer.global_step
        ends_by_epochs = trainer.is_last_batch and 0 < (trainer.max_epochs or -1) <= trainer.current_epoch + 1
        if ends_by_steps or ends_by_epochs:
            trainer.should_stop = True  # Lightning validates before it stops, if it does in this epoch
            if trainer.check_val_every_n_epoch is not None:
                trainer.check_val_every_n_epoch = 1
