from functools import partial
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pycocotools.coco import COCO
from torch import nn
from torch.utils.data import DataLoader

from roi_quantization.detection.data.annotations import as_coco
from roi_quantization.detection.model.lightning_module import DetectionModule
from roi_quantization.detection.model.optim import parameter_groups
from roi_quantization.detection.model.vgg16 import VGG16
from tests.detection.model.test_fast_rcnn import batch, make


class Oracle(nn.Module):
    """Finds exactly what a target says is there."""

    def __init__(self, detections_per_image=100):
        super().__init__()
        self.roi_heads = SimpleNamespace(detections_per_img=detections_per_image)

    def forward(self, images, targets):
        return [
            {name: target[name] for name in ("boxes", "labels")} | {"scores": torch.ones(len(target["boxes"]))} for target in targets
        ], {}


class TwoImages(list):
    """Image 4 with one object of category 30, label 2, and image 9 with none; image 4 comes twice, as from a distributed sampler."""

    masks = False
    label_to_category_id = {1: 10, 2: 30}  # noqa: RUF012

    def __init__(self):
        image = torch.zeros(3, 8, 8, dtype=torch.uint8)
        found = {"boxes": torch.tensor([[1.0, 2.0, 5.0, 8.0]]), "labels": torch.tensor([2]), "image_id": 4}
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "image_id": 9}
        super().__init__([(image, found), (image, nothing), (image, found)])
        self.coco = COCO()
        self.coco.dataset = {
            "images": [{"id": 4, "width": 8, "height": 8}, {"id": 9, "width": 8, "height": 8}],
            "categories": [{"id": 10, "name": "disc"}, {"id": 30, "name": "star"}],
            "annotations": [{"id": 1, "image_id": 4, "category_id": 30, "bbox": [1, 2, 4, 6], "area": 24, "iscrowd": 0}],
        }
        self.coco.createIndex()


@pytest.mark.parametrize("split", ["validate", "test"])
def test_each_image_counts_once(split, tmp_path):
    loader = DataLoader(TwoImages(), batch_size=2, collate_fn=lambda items: tuple(map(list, zip(*items, strict=True))))
    module = DetectionModule(Oracle())
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", default_root_dir=tmp_path)
    getattr(trainer, split)(module, loader, verbose=False)
    assert module.results == [{"image_id": 4, "category_id": 30, "bbox": [1.0, 2.0, 4.0, 6.0], "score": 1.0}]
    assert set(module.detections) == {4, 9}
    assert module.metrics.image_ids == (4, 9) and not module.metrics.is_partial
    assert module.metrics.stats["AP"] == pytest.approx(100)
    assert trainer.callback_metrics[f"{'val' if split == 'validate' else 'test'}/AP"] == pytest.approx(100)


class ManyObjects(list):
    """One image with 300 objects of one class."""

    masks = False
    label_to_category_id = {1: 10}  # noqa: RUF012

    def __init__(self):
        corners = torch.cartesian_prod(torch.arange(20.0), torch.arange(15.0)) * 10
        boxes = torch.cat([corners, corners + 8], dim=1)
        super().__init__([(torch.zeros(3, 8, 8), {"boxes": boxes, "labels": torch.ones(300, dtype=torch.int64), "image_id": 1})])
        annotations = [
            {"id": i, "image_id": 1, "category_id": 10, "bbox": [*corner, 8, 8], "area": 64, "iscrowd": 0}
            for i, corner in enumerate(corners.tolist(), 1)
        ]
        self.coco = as_coco({"images": [{"id": 1}], "categories": [{"id": 10, "name": "cell"}], "annotations": annotations})


@pytest.mark.parametrize(("kept", "ap"), [(50, 100 * 34 / 101), (100, 100 * 34 / 101), (300, 100)])
def test_all_detections_that_the_heads_keep_are_evaluated(kept, ap, tmp_path):
    """COCO looks at 100 of them: a third of 300 objects, 34 of the 101 recall levels. (The Oracle finds 300 whatever it may keep.)"""
    loader = DataLoader(ManyObjects(), batch_size=None, collate_fn=lambda item: ([item[0]], [item[1]]))
    module = DetectionModule(Oracle(detections_per_image=kept))
    pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", default_root_dir=tmp_path).test(module, loader, verbose=False)
    assert module.metrics.stats["AP"] == pytest.approx(ap)
    assert module.metrics.max_detections == max(100, kept)
    assert not module.metrics.is_partial


class Gradients(pl.Callback):
    """Those that the optimizer was given, by step."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({name: p.grad.clone() for name, p in pl_module.detector.named_parameters() if p.grad is not None})


def fit(detector, batches, tmp_path, weight_decay=0.0, **options):
    """Trains on these batches, one epoch; -> the gradients of each step."""
    gradients = Gradients()
    groups = partial(parameter_groups, lr=0.1, weight_decay=weight_decay, bias_lr_factor=2.0, decay_biases_and_norms=False)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[gradients], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, **options,
    )  # fmt: skip
    trainer.fit(DetectionModule(detector, groups, torch.optim.SGD), DataLoader(batches, batch_size=None))
    return gradients.steps


@pytest.mark.parametrize("rois", [(3, 3), (3, 2)], ids=["as many RoIs of each image", "not as many"])
def test_accumulated_gradients(tmp_path, rois):
    """Two batches of one image, accumulated, weigh the images alike; one batch of two weighs the RoIs alike.

    Losses are means over the RoIs of a batch. So both are the same where each image gives as many, as it does when it has enough proposals.
    """
    images, targets = batch((64, 64), (64, 64))
    targets[1]["proposals"] = targets[1]["proposals"][: rois[1] - 1]  # the object itself is one more
    (one,), (other,) = (fit(make(), [(images[i : i + 1], targets[i : i + 1])], tmp_path) for i in (0, 1))
    (accumulated,) = fit(make(), [(images[i : i + 1], targets[i : i + 1]) for i in (0, 1)], tmp_path, accumulate_grad_batches=2)
    (together,) = fit(make(), [(images, targets)], tmp_path)
    assert one.keys() == accumulated.keys() == together.keys()
    for name in one:
        torch.testing.assert_close(accumulated[name], (one[name] + other[name]) / 2, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(together[name], (rois[0] * one[name] + rois[1] * other[name]) / sum(rois), rtol=1e-4, atol=1e-6)
    apart = max((accumulated[name] - together[name]).abs().max() for name in one)
    assert (apart < 1e-5) == (rois[0] == rois[1])


def test_frozen_blocks_get_no_gradient_and_stay_to_the_bit(tmp_path):
    """In spite of a weight decay, and of batch norm: two blocks are four convolutions."""
    detector = make(backbone=VGG16(width=0.0625, norm="batch", frozen_blocks=2))
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    steps = fit(detector, [batch((64, 64), (64, 64))] * 2, tmp_path, weight_decay=0.5)
    changed = {name for name, value in detector.state_dict().items() if not torch.equal(value, before[name])}
    convolutions = [i for i, layer in enumerate(detector.backbone.features) if isinstance(layer, nn.Conv2d)]
    first = convolutions[4]
    frozen = {name for name in before if name.startswith("backbone.features.") and int(name.split(".")[2]) < first}
    assert len(frozen) == 4 * (2 + 5), "weight and bias, and what batch norm has"
    assert not frozen & changed and not any(frozen & step.keys() for step in steps)
    assert {f"backbone.features.{first}.weight", f"backbone.features.{first + 1}.running_mean"} <= changed, "what follows learns"
