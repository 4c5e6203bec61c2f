"""Fast R-CNN's second half on torchvision's parts: extractor, two-FC head, sampling, losses, post-processing. Knows `ops` only."""

from roi_quantization.roi_heads.box_head import BoxPredictor, TwoFCHead
from roi_quantization.roi_heads.extractor import MultiScaleRoIExtractor, RoIExtractor
from roi_quantization.roi_heads.fast_rcnn import FastRCNNHeads

__all__ = ["BoxPredictor", "FastRCNNHeads", "MultiScaleRoIExtractor", "RoIExtractor", "TwoFCHead"]
