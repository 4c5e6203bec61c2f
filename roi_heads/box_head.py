"""Fast R-CNN's second half after the RoI operator: two fully connected layers, class scores and per-class box deltas."""

import logging
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

from roi_quantization.roi_heads.weights import load_vgg16

log = logging.getLogger(__name__)


class TwoFCHead(nn.Sequential):
    """VGG16's fc6 and fc7, each followed by ReLU and dropout: `[K, C, P, P] -> [K, hidden]`.

    Args:
        in_channels: C, channels of the feature map.
        output_size: P, bins per side.
        hidden: width of both layers, 4096 in VGG16.
        dropout: 0.5 in Fast R-CNN.
        weights: as for `load_vgg16`. fc6 and fc7 are taken from `classifier.0` and `classifier.3` where the weights have them; else, and
            where None is given, they start random (Kaiming) and a log line says so.
        norm: of the backbone. With "batch" a name in `weights` means `vgg16_bn`, whose fc6 and fc7 belong to its convolutions.

    Raises:
        ValueError: `hidden` is not positive, or the weights hold fc6 and fc7 of another shape.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: int,
        hidden: int = 4096,
        dropout: float = 0.5,
        weights: str | Path | None = None,
        norm: Literal["none", "batch"] = "none",
    ):
        if hidden < 1:
            raise ValueError(f"hidden={hidden}: expected a whole number from 1 on")
        fc6, fc7 = nn.Linear(in_channels * output_size**2, hidden), nn.Linear(hidden, hidden)
        super().__init__(nn.Flatten(), fc6, nn.ReLU(inplace=True), nn.Dropout(dropout), fc7, nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.out_features = hidden
        for layer in (fc6, fc7):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        if weights is not None:
            self._take_over(load_vgg16(weights, batch_norm=norm == "batch"), weights)

    def _take_over(self, state: dict[str, Tensor], source: str | Path) -> None:
        if not any(key.startswith("classifier.") for key in state):
            log.warning("%s has no fully connected layers: fc6 and fc7 start random", source)
            return
        for name, layer in {"classifier.0": self[1], "classifier.3": self[4]}.items():
            for kind, parameter in layer.named_parameters():
                found = state.get(f"{name}.{kind}")
                if found is None or found.shape != parameter.shape:
                    shape = "nothing" if found is None else list(found.shape)
                    raise ValueError(
                        f"{source}: {name}.{kind} has shape {shape}, the head wants {list(parameter.shape)}. VGG16's fc6 and fc7 fit "
                        "hidden=4096, output_size=7 and a backbone of width 1; give the head weights=null to start it random"
                    )
                with torch.no_grad():
                    parameter.copy_(found)


class BoxPredictor(FastRCNNPredictor):
    """Class scores `[K, num_classes]` and box deltas `[K, 4 * num_classes]`, with Fast R-CNN's initialisations: Gaussian, biases 0.

    Args:
        in_channels: width of the head before it.
        num_classes: background (0) included.
        score_std, delta_std: standard deviations of the initial weights, 0.01 and 0.001 in the paper (section 2.3).
        class_agnostic: regress one box for all classes; its deltas are repeated for each.

    Raises:
        ValueError: a deviation is negative.
    """

    def __init__(self, in_channels: int, num_classes: int, score_std: float = 0.01, delta_std: float = 0.001, class_agnostic: bool = False):
        for name, std in (("score_std", score_std), ("delta_std", delta_std)):
            if not std >= 0:
                raise ValueError(f"{name}={std}: expected a number from 0 on")
        super().__init__(in_channels, num_classes)
        self.num_classes, self.class_agnostic = num_classes, class_agnostic
        if class_agnostic:
            self.bbox_pred = nn.Linear(in_channels, 4)
        for layer, std in ((self.cls_score, score_std), (self.bbox_pred, delta_std)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and deltas of RoIs `[K, in_channels]`."""
        scores, deltas = super().forward(x)
        return scores, deltas.repeat(1, self.num_classes) if self.class_agnostic else deltas
