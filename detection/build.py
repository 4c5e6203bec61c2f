"""From a configuration to a detector."""

from hydra.utils import instantiate
from omegaconf import DictConfig

from detection.detector import FastRCNN


def build_detector(cfg: DictConfig, num_classes: int) -> FastRCNN:
    """The detector that `cfg.backbone`, `cfg.roi` and `cfg.head` draw.

    Args:
        cfg: with `backbone`, `roi`, `head` and `channels_last`.
        num_classes: background included.
    """
    backbone = instantiate(cfg.backbone)
    roi_heads = instantiate(
        cfg.head,
        extractor={"spatial_scale": 1 / backbone.stride},
        box_head={"in_channels": backbone.out_channels},
        box_predictor={"num_classes": num_classes},
    )
    return FastRCNN(backbone, roi_heads, channels_last=cfg.channels_last)
