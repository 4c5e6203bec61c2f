"""Runs with one seed differ in the operator alone: that is what makes their differences paired."""

import pytest
import torch

from roi_quantization.detection.model.fast_rcnn import FastRCNN
from roi_quantization.roi_heads import FastRCNNHeads
from roi_quantization.scripts.train import train
from tests.configuration import composed
from tests.trainings import TINY


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """A function `(roi, seed) -> what a short training with it saw`: initial weights, images, their objects, and the RoIs sampled."""
    forward, predict = FastRCNN.forward, FastRCNNHeads.predict

    def run(roi, seed=0):
        seen = {"weights": None, "images": [], "objects": [], "rois": []}

        def watched_forward(self, images, targets):
            if seen["weights"] is None:
                seen["weights"] = [value.clone() for value in self.state_dict().values()]
            if self.training:
                seen["images"] += images
                seen["objects"] += [target["boxes"] for target in targets]
            return forward(self, images, targets)

        def watched_predict(self, features, proposals, image_shapes):
            if self.training:
                seen["rois"] += proposals
            return predict(self, features, proposals, image_shapes)

        monkeypatch.setattr(FastRCNN, "forward", watched_forward)
        monkeypatch.setattr(FastRCNNHeads, "predict", watched_predict)
        overrides = [*TINY, f"run_dir={tmp_path / roi}{seed}", f"data.root={tmp_path / 'data'}", f"roi={roi}", f"seed={seed}"]
        train(composed("train", *overrides, "trainer.max_epochs=2"))
        return seen

    return run


def same(some, others):
    return len(some) == len(others) and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_within_a_seed_every_arm_starts_alike_and_sees_the_same(recorded):
    align, pool = recorded("align"), recorded("pool")
    assert len(align["images"]) == len(align["rois"]) == 16, "8 images, 2 epochs"
    for what in ("weights", "images", "objects", "rois"):
        assert same(align[what], pool[what]), what
    other = recorded("align", seed=1)
    for what in ("weights", "images", "objects", "rois"):
        assert not same(align[what], other[what]), f"{what} are another draw with another seed"
