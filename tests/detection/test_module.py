import pytest
import pytorch_lightning as pl
import torch
from pycocotools.coco import COCO
from torch import nn
from torch.utils.data import DataLoader

from detection.module import DetectionModule


class Oracle(nn.Module):
    """Finds exactly what a target says is there."""

    def forward(self, images, targets):
        return [
            {name: target[name] for name in ("boxes", "labels")} | {"scores": torch.ones(len(target["boxes"]))} for target in targets
        ], {}


class TwoImages(list):
    """Image 4 with one object of category 30, label 2, and image 9 with none; image 4 comes twice, as from a distributed sampler."""

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
    assert module.metrics.stats["AP"] == pytest.approx(100)
    assert trainer.callback_metrics[f"{'val' if split == 'validate' else 'test'}/AP"] == pytest.approx(100)
