"""The callback: the norm of the backbone's gradients, in metrics.csv and in every other logger."""

import pytorch_lightning as pl
import torch
from torch.optim import Optimizer


class GradientNorm(pl.Callback):
    """Logs `train/gradient_norm` before each step of the optimizer."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        gradients = [p.grad.norm() for p in pl_module.detector.backbone.parameters() if p.grad is not None]
        pl_module.log("train/gradient_norm", torch.stack(gradients).norm())
