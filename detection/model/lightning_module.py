"""The LightningModule that trains and evaluates a detector."""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from roi_quantization.detection.common.errors import InputError, named_setting
from roi_quantization.detection.data.masks import encode
from roi_quantization.detection.evaluation.coco import CocoEvaluation, Metrics, to_coco_results
from roi_quantization.detection.evaluation.protocol import COCO_MAX_DETECTIONS
from roi_quantization.detection.model.optim import build_optimizer

log = logging.getLogger(__name__)

Batch = tuple[list[Tensor], list[dict]]
LOGGED = ("AP", "AP50", "AP75", "loss", "loss_classifier", "loss_box")  # in each validation
LOGGED_OF_MASKS = ("segm_AP", "segm_AP50", "segm_AP75", "segm_AP90", "loss_mask")  # where there are any


class DetectionModule(pl.LightningModule):
    """Trains a detector. After each pass over a validation or test set it has the detections and COCO's metrics of them.

    Args:
        detector: `(images, targets) -> (detections, losses)`, see `FastRCNN`. Losses in evaluation are logged where it has them. Where it
            has a method `sample_rois`, this gets the targets of a training step before they leave the CPU.
        groups: `model -> parameter groups`.
        optimizer: `groups -> Optimizer`.
        schedule: `(optimizer, total_steps) -> LRScheduler`, stepped once a training step; None keeps the rate.
        categories: `{"id", "name"}` of the data, in the order of the labels 1..C. Stored in checkpoints.
        config: plain containers from which the detector can be built again. Stored in checkpoints.
        seed: of the random draws of a training step, with the epoch and the step.
        coco_eval: computes COCO's metrics; None: by pycocotools with COCO's IoU thresholds and sizes.
        average: `detector -> AveragedModel`, updated after each optimizer step. Its weights are evaluated in place of the detector's.

    Attributes:
        evaluated: the detector that validation and test use: `detector` itself, or the averaged one.
        results: detections of the last evaluation in COCO's results format, in pixels of the original images.
        metrics: of the same detections; None before an evaluation. See `roi_quantization.detection.evaluation.coco`.
    """

    def __init__(
        self,
        detector: nn.Module,
        groups: Callable[[nn.Module], Iterable[dict]] | None = None,
        optimizer: Callable[[Iterable[dict]], Optimizer] | None = None,
        schedule: Callable[[Optimizer, int], LRScheduler] | None = None,
        categories: list[dict] = (),
        config: dict[str, Any] | None = None,
        seed: int = 0,
        coco_eval: CocoEvaluation | None = None,
        average: Callable[[nn.Module], AveragedModel] | None = None,
    ):
        super().__init__()
        self.detector = detector
        self.averaged = None if average is None else average(detector).requires_grad_(False)
        self.groups, self.optimizer, self.schedule = groups, optimizer, schedule
        self.categories = [{"id": int(category["id"]), "name": str(category["name"])} for category in categories]
        self.config = config or {}
        self.seed = seed
        self.coco_eval = coco_eval or CocoEvaluation()
        self.detections: dict[int, dict[str, Any]] = {}
        self.losses: dict[int, tuple[int, dict[str, float]]] = {}
        self.results: list[dict] = []
        self.metrics: Metrics | None = None

    @property
    def evaluated(self) -> nn.Module:
        return self.detector if self.averaged is None else self.averaged.module

    def configure_optimizers(self) -> Any:
        groups = self.groups(self.detector)
        with named_setting("optim.optimizer"):
            optimizer = build_optimizer(self.optimizer, groups, self._may_fuse())
        steps, wanted = self.trainer.estimated_stepping_batches, self.trainer.max_steps
        if steps < wanted:
            raise InputError(
                f"trainer.max_steps={wanted}: with trainer.max_epochs={self.trainer.max_epochs} training would end after {steps} steps. "
                "Set trainer.max_epochs=-1, or leave out trainer.max_steps"
            )
        if self.schedule is None:
            return optimizer
        if math.isinf(steps):
            raise InputError(
                "optim.schedule needs the length of the training. Set trainer.max_epochs or trainer.max_steps, or optim.schedule=null"
            )
        with named_setting("optim.schedule"):
            scheduler = self.schedule(optimizer, total_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _may_fuse(self) -> bool:
        """Lightning's mixed precision clips no gradients for a fused optimizer, and float16 scales them."""
        precision = self.trainer.precision_plugin
        return not isinstance(precision, MixedPrecision) or (precision.scaler is None and not self.trainer.gradient_clip_val)

    def on_train_start(self) -> None:
        if self.averaged is not None and self.trainer.world_size == 1:  # DDP takes buffers of one device
            self.averaged.n_averaged = self.averaged.n_averaged.cpu()  # it asks in each step whether this is 0

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Let the detector sample its RoIs on the CPU, while a GPU is still at the step before."""
        images, targets = batch
        if self.trainer.training:
            self.detector.roi_heads.epoch = self.current_epoch
            if hasattr(self.detector, "sample_rois"):
                targets = self.detector.sample_rois(targets)
        return images, targets

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        # the draws of a step (dropout) depend on its position, not on earlier draws: a run that goes on draws the same
        torch.manual_seed(hash((self.seed, self.current_epoch, batch_idx, self.global_rank)))
        _, losses = self.detector(images, targets)
        loss = sum(losses.values())
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, batch_size=len(images))
        self.log("train/loss", loss, batch_size=len(images))  # with prog_bar Lightning would read it in each step
        self.log("train/lr", torch.as_tensor(self.optimizers().param_groups[0]["lr"]), batch_size=len(images))  # stays on the CPU
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.averaged is not None:
            self.averaged.update_parameters(self.detector)

    def on_validation_epoch_start(self) -> None:
        self.detections, self.losses = {}, {}

    def validation_step(self, batch: Batch, _: int) -> None:
        self._step(batch)

    def on_validation_epoch_end(self) -> None:
        self._evaluate("val", self.trainer.val_dataloaders.dataset)

    on_test_epoch_start = on_validation_epoch_start

    def test_step(self, batch: Batch, _: int) -> None:
        self._step(batch)

    def on_test_epoch_end(self) -> None:
        self._evaluate("test", self.trainer.test_dataloaders.dataset)

    def predict_step(self, batch: Batch, _: int) -> dict[int, dict[str, Any]]:
        """Return the detections of images without annotations, by image id. See `to_cpu`."""
        images, targets = batch
        detections, _ = self.evaluated(images, targets)
        return {int(target["image_id"]): to_cpu(detection) for target, detection in zip(targets, detections, strict=True)}

    def _step(self, batch: Batch) -> None:
        images, targets = batch
        detections, losses = self.evaluated(images, targets)
        for target, detection in zip(targets, detections, strict=True):
            self.detections[int(target["image_id"])] = to_cpu(detection)
        if losses:
            losses = {name: float(value) for name, value in losses.items()}
            self.losses[int(targets[0]["image_id"])] = len(images), losses | {"loss": sum(losses.values())}

    def _evaluate(self, split: str, dataset: Any) -> None:
        """Compute losses and metrics of a pass over a split.

        Detections are keyed by image id, and losses by the first image of a batch: what was evaluated twice counts once (see
        `WholeBatchSampler`). Every rank computes the same, and the same as one process alone: sums are in the order of the ids.
        """
        if self.trainer.world_size > 1:
            parts = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, (self.detections, self.losses))
            for detections, losses in parts:
                self.detections |= detections
                self.losses |= losses
        batches = [self.losses[first] for first in sorted(self.losses)]
        images = sum(count for count, _ in batches)
        names = batches[0][1] if batches else ()
        losses = {f"{split}/{name}": sum(count * loss[name] for count, loss in batches) / images for name in names}
        self.results = to_coco_results(self.detections, dataset.label_to_category_id)
        self.metrics = self.coco_eval(
            dataset.coco,
            self.results,
            sorted(self.detections),
            max_detections=max(COCO_MAX_DETECTIONS, self.evaluated.roi_heads.detections_per_img),  # none that was kept is left out
            of=len(dataset.coco.imgs),
            masks=dataset.masks,
        )
        recalled = [found["best_overlap"] for found in self.detections.values() if "best_overlap" in found]
        if recalled:
            best = torch.cat(recalled)
            recall = {iou: (best >= iou).double().mean().item() for iou in (0.5, 0.75)}
            log.info("%s: proposals with recall %s", split, ", ".join(f"{share:.3f} at IoU {iou}" for iou, share in recall.items()))
            losses |= {f"{split}/R{100 * iou:.0f}": 100 * share for iou, share in recall.items()}
        key_of = self.metrics.protocol.logged
        shown = {key_of(f"{split}/{name}"): value for name, value in self.metrics.stats.items() if name in (*LOGGED, *LOGGED_OF_MASKS)}
        together = {"sync_dist": True, "reduce_fx": "max"}  # equal on all ranks, so their maximum is each; Lightning warns without it
        self.log_dict(losses, **together)
        self.log_dict(shown, prog_bar=True, **together)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"], checkpoint["categories"] = self.config, self.categories


def to_cpu(detection: dict[str, Any]) -> dict[str, Any]:
    """Return the detections of an image to keep: float32 on the CPU, and `masks` as a list of RLEs, see `encode`."""
    return {name: encode(value) if name == "masks" else value.float().cpu() for name, value in detection.items()}
