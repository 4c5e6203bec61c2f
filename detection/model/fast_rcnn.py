"""The detector: from images and proposals to losses, or to boxes in the pixels of the original images."""

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from roi_quantization.detection.common.errors import InputError
from roi_quantization.roi_heads import FastRCNNHeads
from roi_quantization.roi_heads.masks import paste_masks

MASK_THRESHOLD = 0.5  # probability above which a pixel is inside
CHANGES_IN_TRAINING = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)  # whose output depends on the mode


class FastRCNN(nn.Module):
    """Fast R-CNN (Girshick, 2015): a backbone over the whole image, RoI features of each proposal, two-FC head.

    Args:
        backbone: `[N, 3, H, W] -> [N, C, H // stride, W // stride]`, with attributes `stride`, `mean` and `std` (of RGB in [0, 1]).
        roi_heads: sampling, losses and post-processing.
        channels_last: memory format of the backbone and its maps. It changes the speed, not the numbers.
    """

    has_evaluation_losses = True

    def __init__(self, backbone: nn.Module, roi_heads: FastRCNNHeads, channels_last: bool = False):
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.backbone = backbone.to(memory_format=self.memory_format)
        self.roi_heads = roi_heads
        self.register_buffer("mean", 255 * torch.tensor(backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(backbone.std).view(3, 1, 1), persistent=False)

    def forward(self, images: list[Tensor], targets: list[dict]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detect objects, or compute losses.

        Args:
            images: uint8 RGB `[3, H, W]`, of any sizes.
            targets: one dict an image with `proposals` [L, 4] in the image's pixels, `image_id`, `original_size` (height, width), and for
                losses `boxes` [G, 4], `labels` [G] and, where there are any, `crowd` [M, 4], and `masks` [G, H, W] where they are
                learnt. With `features` [C, h, w], what the frozen layers of the backbone make of an image, its pixels are not read.
                In training `sample_rois` may have been called on them, while they were on the CPU.

        Returns:
            `(detections, losses)`. In training there are no detections. In evaluation there is a dict for each image: `boxes` [D, 4] in
            pixels of the *original* image, `scores` [D], highest first, `labels` [D], and `proposals` [D, 4], from which the boxes were
            regressed, in the same pixels; bool `masks` [D, height, width] of the original image where the heads have a branch for them; and
            losses where all targets have `boxes`.
        """
        shapes = [(image.shape[1], image.shape[2]) for image in images]
        if self.training and "sampled" not in targets[0]:
            targets = self.sample_rois(targets)
        if "features" in targets[0]:
            _, trained = frozen_and_trained(self.backbone)
            features = trained(self.batch_maps([target["features"] for target in targets]))
        else:
            features = self.backbone(self.batch(images))
        with_losses = self.training or all("boxes" in target for target in targets)
        proposals, proposal_losses = self.propose(features, shapes, targets)
        detections, losses = self.roi_heads(features, proposals, shapes, targets if with_losses else None)
        for of_image in zip(detections, targets, shapes, proposals, strict=not self.training):
            self.finish(*of_image)
        return detections, losses | proposal_losses

    def sample_rois(self, targets: list[dict]) -> list[dict]:
        """Add to each target `sampled`, the RoIs of a training step: sampled on the CPU, and on the detector's device already.

        A GPU is not waited for, if the targets are on the CPU and the call comes before the step.
        """
        sampled = self.roi_heads.sample_for_training([target["proposals"] for target in targets], targets)
        return [target | {"sampled": rois.to(self.mean.device)} for target, rois in zip(targets, sampled, strict=True)]

    def propose(self, features: Tensor, shapes: list[tuple[int, int]], targets: list[dict]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the proposals `[L, 4]` of each image, in its pixels, and losses of what proposes."""
        return [target["proposals"] for target in targets], {}

    def finish(self, detection: dict[str, Tensor], target: dict, shape: tuple[int, int], proposals: Tensor) -> None:
        """Convert the detection of an image of `shape` to pixels of the original image."""
        for name in ("boxes", "proposals"):
            detection[name] = to_original(detection[name], shape, target["original_size"])
        if "mask_probabilities" in detection:
            probabilities = detection.pop("mask_probabilities")
            detection["masks"] = paste_masks(probabilities, detection["boxes"], target["original_size"]) > MASK_THRESHOLD

    def batch(self, images: list[Tensor]) -> Tensor:
        """Normalise images and pad them into one `[N, 3, H, W]`: zeros (the mean colour) right and below, up to multiples of the stride."""
        check_images(images)
        stride = self.backbone.stride
        height, width = (-(-max(image.shape[axis] for image in images) // stride) * stride for axis in (1, 2))
        batch = torch.zeros(len(images), 3, height, width, device=self.mean.device).contiguous(memory_format=self.memory_format)
        for filled, image in zip(batch, images, strict=True):
            filled[:, : image.shape[1], : image.shape[2]] = (image - self.mean) / self.std
        return batch

    def batch_maps(self, maps: list[Tensor]) -> Tensor:
        """Pad feature maps `[C, h, w]` into one `[N, C, H, W]`: zeros right and below."""
        height, width = (max(map_.shape[axis] for map_ in maps) for axis in (1, 2))
        batch = self.mean.new_zeros(len(maps), maps[0].shape[0], height, width).contiguous(memory_format=self.memory_format)
        for filled, map_ in zip(batch, maps, strict=True):
            filled[:, : map_.shape[1], : map_.shape[2]] = map_
        return batch


def frozen_and_trained(backbone: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Take a backbone apart into the layers whose output training does not change, and the others.

    Args:
        backbone: with a method `split`, as `VGG16` has it, which gives the same layers in a copy of which nothing is trained; without, it
            is a whole that is frozen or not.

    Raises:
        InputError: its first layers are trained, so that nothing stays as it is.
    """
    frozen, trained = backbone.split() if hasattr(backbone, "split") else (backbone, nn.Identity())
    names = [name for name, weight in frozen.named_parameters() if weight.requires_grad]
    names += [name for name, layer in frozen.named_modules() if layer.training and isinstance(layer, CHANGES_IN_TRAINING)]
    if names or not len(list(frozen.parameters())):
        what = f"{names[0]} is trained" if names else "all of its layers are trained"
        raise InputError(f"features=cached: the backbone is not frozen ({what}). Set backbone.frozen_blocks=5 or 4, or remove features")
    return frozen, trained


def check_images(images: list[Tensor]) -> None:
    """Check that images are uint8.

    Raises:
        InputError: one is not.
    """
    for image in images:
        if image.dtype != torch.uint8:
            raise InputError(
                f"an image is {image.dtype}, expected uint8 RGB from 0 to 255: convert it, if it is from 0 to 1 with "
                "(255 * image).round().to(torch.uint8)"
            )


def to_original(boxes: Tensor, shape: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Convert boxes `[D, 4]` from the pixels of an image resized to `shape` to those of the original. Both sizes are (height, width)."""
    scale = boxes.new_tensor([original[1] / shape[1], original[0] / shape[0]]).repeat(2)
    return clip_boxes_to_image(boxes * scale, original)
