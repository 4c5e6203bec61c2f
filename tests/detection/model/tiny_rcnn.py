"""A small Faster R-CNN with a feature pyramid, registered as torchvision registers its own, and weights of it with random numbers."""

from collections import OrderedDict
from typing import Any, Optional

import pytest
from torch import nn
from torchvision.models import ResNet50_Weights
from torchvision.models._api import BUILTIN_MODELS, Weights, WeightsEnum
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _validate_trainable_layers
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from roi_quantization.detection.model import torchvision_detector

NAMES = ["__background__", "disc", "N/A", "star", "square"]


class TinyWeights(WeightsEnum):
    COCO_V1 = Weights(url="https://nowhere.invalid/tiny-01234567.pth", transforms=None, meta={"categories": NAMES})
    OTHER = Weights(url="https://nowhere.invalid/other-01234567.pth", transforms=None, meta={"categories": NAMES})
    DEFAULT = COCO_V1


class Spread(FastRCNNPredictor):
    """Its random scores are far apart, so that there are detections."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__(in_channels, num_classes)
        nn.init.normal_(self.cls_score.weight, std=20.0)


def tiny_rcnn(
    *,
    weights: Optional[TinyWeights] = None,  # noqa: UP045 -- as torchvision writes it
    progress: bool = True,
    num_classes: Optional[int] = None,  # noqa: UP045
    weights_backbone: Optional[ResNet50_Weights] = None,  # noqa: UP045
    trainable_backbone_layers: Optional[int] = None,  # noqa: UP045
    **kwargs: Any,
) -> FasterRCNN:
    is_trained = weights is not None or weights_backbone is not None
    norm = FrozenBatchNorm2d if is_trained else nn.BatchNorm2d
    num_classes = len(NAMES) if weights is not None else num_classes
    layers, channels = OrderedDict(), 3
    for level in range(4):  # strides 4 to 32
        stride = 4 if level == 0 else 2
        layers[f"layer{level}"] = nn.Sequential(nn.Conv2d(channels, 8, 3, stride, padding=1), norm(8), nn.ReLU())
        channels = 8
    for level in range(4 - _validate_trainable_layers(is_trained, trainable_backbone_layers, 4, 3)):
        layers[f"layer{level}"].requires_grad_(False)
    returned = {f"layer{level}": str(level) for level in range(4)}
    model = FasterRCNN(
        BackboneWithFPN(nn.Sequential(layers), returned, [8] * 4, 8),
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((1.0,),) * 5),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2, canonical_scale=64),
        box_head=TwoMLPHead(8 * 49, 16),
        box_predictor=Spread(16, num_classes),
        **{"min_size": 96, "max_size": 160, "box_detections_per_img": 20} | kwargs,
    )
    if weights is not None:
        model.load_state_dict(weights.get_state_dict(progress=progress))
        if weights == TinyWeights.COCO_V1:
            overwrite_eps(model, 0.0)
    return model


tiny_rcnn.__module__ = "torchvision.models.detection.tiny_rcnn"


@pytest.fixture
def tiny(monkeypatch):
    """Let `detector.builder=tiny_rcnn` be one of torchvision's."""
    monkeypatch.setitem(BUILTIN_MODELS, "tiny_rcnn", tiny_rcnn)
    monkeypatch.setitem(torchvision_detector.EPS_0, "tiny_rcnn", "COCO_V1")
