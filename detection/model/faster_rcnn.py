"""Faster R-CNN: Fast R-CNN with a network that proposes, trained together."""

from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.data.proposals.recall import best_overlaps
from roi_quantization.detection.model.build import build_parts
from roi_quantization.detection.model.fast_rcnn import FastRCNN
from roi_quantization.roi_heads import FastRCNNHeads
from roi_quantization.roi_heads.fast_rcnn import IGNORED, draw, overlap

Losses = dict[str, Tensor]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's `RegionProposalNetwork` on one feature map.

    Added here, as in `FastRCNNHeads`: crowd regions, sampling that a seed alone decides, and losses in evaluation as well.

    Args:
        in_channels: of the feature map.
        sizes: square roots of the anchors' areas, pixels.
        aspect_ratios: height / width of the anchors.
        foreground_iou: IoU with an object from which an anchor is foreground. The best anchors of an object are foreground anyway.
        background_iou: best IoU of an anchor below which it is background. What lies between is not sampled.
        anchors_per_image: anchors sampled of each training image.
        foreground_fraction: at most this part of them is foreground.
        crowd_overlap: background with at least this part of its area inside one crowd region is not sampled.
        before_nms: proposals of an image with the highest scores that go through NMS: `{"training", "testing"}`.
        after_nms: proposals of an image that are kept of these, the same.
        nms_threshold: IoU.
        seed: with `epoch` (an attribute, set by the detector) and a target's `image_id` it decides which anchors are sampled.
    """

    def __init__(
        self,
        in_channels: int,
        sizes: Sequence[float],
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        foreground_iou: float = 0.7,
        background_iou: float = 0.3,
        anchors_per_image: int = 256,
        foreground_fraction: float = 0.5,
        crowd_overlap: float = 0.5,
        before_nms: dict[str, int] | None = None,
        after_nms: dict[str, int] | None = None,
        nms_threshold: float = 0.7,
        seed: int = 0,
    ):
        if not sizes or not all(value > 0 for value in (*sizes, *aspect_ratios)):
            raise InputError(f"detector.rpn: sizes and aspect_ratios of anchors are positive numbers, got {sizes} and {aspect_ratios}")
        if not 0 <= background_iou <= foreground_iou <= 1:
            raise InputError(f"detector.rpn: expected 0 <= background_iou <= foreground_iou <= 1, got {background_iou}, {foreground_iou}")
        anchors = AnchorGenerator((tuple(sizes),), (tuple(aspect_ratios),))
        super().__init__(
            anchors,
            RPNHead(in_channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=foreground_iou,
            bg_iou_thresh=background_iou,
            batch_size_per_image=anchors_per_image,
            positive_fraction=foreground_fraction,
            pre_nms_top_n=before_nms or {"training": 2000, "testing": 1000},
            post_nms_top_n=after_nms or {"training": 1000, "testing": 300},
            nms_thresh=nms_threshold,
        )
        keep_coordinates(self)
        self.crowd_overlap = crowd_overlap
        self.seed = seed
        self.epoch = 0

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Any]] | None = None
    ) -> tuple[list[Tensor], Losses]:
        """Return the proposals `[L, 4]` of each image, best first, and with targets the losses."""
        proposals, losses = super().forward(images, features, targets)
        if targets is not None and not self.training:
            losses = self.losses(images, features, targets)
        return proposals, losses

    def losses(self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Any]]) -> Losses:
        """Compute what torchvision computes in training alone."""
        maps = list(features.values())
        objectness, deltas = concat_box_prediction_layers(*self.head(maps))
        anchors = self.anchor_generator(images, maps)
        labels, matched = self.assign_targets_to_anchors(anchors, targets)
        of_objectness, of_boxes = self.compute_loss(objectness, deltas, labels, self.box_coder.encode(matched, anchors))
        return {"loss_objectness": of_objectness, "loss_rpn_box_reg": of_boxes}

    def assign_targets_to_anchors(self, anchors: list[Tensor], targets: list[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
        """As torchvision's, with all labels ignored but those of the anchors that are sampled: its sampler then takes them all."""
        labels, matched = super().assign_targets_to_anchors(anchors, targets)
        for label, boxes, target in zip(labels, anchors, targets, strict=True):
            crowd = target.get("crowd")
            if crowd is not None and len(crowd):
                label[(label == 0) & (overlap(boxes, crowd).amax(dim=1) >= self.crowd_overlap)] = IGNORED
            label[~draw(self.fg_bg_sampler, label, self.seed, self.epoch, int(target["image_id"]))] = IGNORED
        return labels, matched


class FasterRCNN(FastRCNN):
    """Faster R-CNN (Ren et al., 2015): Fast R-CNN with the proposals of a network on the same features.

    `proposals` of the targets are not used. A detection has `best_overlap` `[G]` too, where its target has `boxes`: the IoU of each object
    with its best proposal.

    Args:
        backbone, roi_heads, channels_last: see `FastRCNN`.
        rpn: proposes.
    """

    def __init__(self, backbone: nn.Module, roi_heads: FastRCNNHeads, rpn: ProposalNetwork, channels_last: bool = False):
        super().__init__(backbone, roi_heads, channels_last)
        self.rpn = rpn.to(memory_format=self.memory_format)

    def sample_rois(self, targets: list[dict]) -> list[dict]:
        """Leave the targets as they are: the proposals are known after the backbone only."""
        return targets

    def propose(self, features: Tensor, shapes: list[tuple[int, int]], targets: list[dict]) -> tuple[list[Tensor], Losses]:
        self.rpn.epoch = self.roi_heads.epoch if self.training else 0
        height, width = (cells * self.backbone.stride for cells in features.shape[2:])
        images = ImageList(features.new_empty(len(shapes), 0, height, width), shapes)  # it is asked for its size alone
        have_boxes = all("boxes" in target for target in targets)
        return self.rpn(images, {"0": features}, targets if have_boxes else None)

    def finish(self, detection: dict[str, Tensor], target: dict, shape: tuple[int, int], proposals: Tensor) -> None:
        super().finish(detection, target, shape, proposals)
        if "boxes" in target:
            detection["best_overlap"] = best_overlaps(proposals, target["boxes"])


def keep_coordinates(rpn: RegionProposalNetwork) -> None:
    """Let a network propose in float32 where autocast makes its maps and offsets 16 bits wide.

    torchvision gives anchors the dtype of the maps, and boxes that of the offsets: 301.3 pixels are 302 in bfloat16.
    """
    rpn.anchor_generator.register_forward_pre_hook(_without_maps)
    rpn.head.register_forward_hook(to_float32)


def _without_maps(_: nn.Module, arguments: tuple[ImageList, list[Tensor]]) -> tuple[ImageList, list[Tensor]]:
    images, maps = arguments  # of which anchors need the size, the device and the dtype
    return images, [map_.new_empty(()).float().expand(map_.shape) for map_ in maps]


def to_float32(module: nn.Module, arguments: tuple, output: Any) -> Any:
    """Convert what a layer returns, a tensor or lists and tuples of such: a forward hook."""
    return output.float() if isinstance(output, Tensor) else type(output)(to_float32(module, arguments, part) for part in output)


def build_faster_rcnn(
    cfg: DictConfig, num_classes: int, pretrained: bool, rpn: Callable[..., ProposalNetwork], masks: bool = False
) -> FasterRCNN:
    """Build the detector of `cfg.backbone`, `cfg.roi` and `cfg.head`, with a network that proposes. See `build_detector`, `build_parts`.

    Raises:
        InputError: there are proposals in `cfg` as well, or a setting is wrong.
    """
    if cfg.get("proposals"):
        raise InputError("proposals: this detector finds its own, and would not use these. Set proposals=null")
    backbone, roi_heads = build_parts(cfg, num_classes, pretrained, masks)
    return FasterRCNN(backbone, roi_heads, rpn(in_channels=backbone.out_channels), channels_last=cfg.channels_last)
