"""Masks of objects in their boxes: cut out to be learnt, and pasted into an image. Nothing is rounded.

torchvision's `project_masks_on_boxes` reads a mask half a pixel off, and its `paste_masks_in_image` takes boxes to whole pixels. For a
detector whose question is what rounding costs, both would hide a part of the answer: they limit how well a boundary can be found.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from roi_quantization.ops import roi_align


def mask_loss(logits: Tensor, boxes: list[Tensor], masks: list[Tensor], labels: list[Tensor], objects: list[Tensor]) -> Tensor:
    """Compute Mask R-CNN's loss: binary cross entropy of the mask of the true class, the mean over its pixels. 0 without boxes.

    As torchvision's `maskrcnn_loss`, but for `cut_masks`.

    Args:
        logits: `[K, C + 1, M, M]`, K the number of boxes of all images, in their order.
        boxes: one `[L, 4]` an image, `(x1, y1, x2, y2)` in pixels.
        masks: one `[G, H, W]` an image, of its objects.
        labels: one `[G]` an image, of its objects.
        objects: one `[L]` an image: which object each box is matched to.
    """
    classes = torch.cat([of_image[matched] for of_image, matched in zip(labels, objects, strict=True)])
    if not len(classes):
        return logits.sum() * 0
    wanted = torch.cat([cut_masks(*of_image, logits.shape[-1]) for of_image in zip(masks, boxes, objects, strict=True)])
    return F.binary_cross_entropy_with_logits(logits[torch.arange(len(classes), device=logits.device), classes], wanted)


def cut_masks(masks: Tensor, boxes: Tensor, objects: Tensor, size: int) -> Tensor:
    """Cut the mask of its object out of each box: `[L, size, size]`, the share of each cell that is inside.

    Args:
        masks: `[G, H, W]` of the objects of an image, 1 inside.
        boxes: `[L, 4]`, `(x1, y1, x2, y2)` in pixels.
        objects: `[L]`, which of the masks.
        size: cells a side.
    """
    if not len(boxes):
        return boxes.new_zeros(0, size, size)
    rois = torch.cat([objects[:, None].to(boxes), boxes], dim=1)
    return roi_align(masks[:, None].to(boxes), rois, size, sampling_ratio=-1, aligned=True)[:, 0]


def paste_masks(probabilities: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Interpolate masks in their boxes, bilinearly at the centre of each pixel: `[D, height, width]`, 0 outside.

    Args:
        probabilities: `[D, M, M]`.
        boxes: `[D, 4]`, `(x1, y1, x2, y2)` in pixels.
        image_size: (height, width) in pixels.
    """
    size = probabilities.shape[-1]
    x1, y1, x2, y2 = boxes.unbind(1)
    height, width = image_size
    rows, columns = _weights(y1, y2, height, size), _weights(x1, x2, width, size)
    return rows @ probabilities @ columns.transpose(1, 2)


def _weights(low: Tensor, high: Tensor, pixels: int, size: int) -> Tensor:
    """Weight `[D, pixels, size]` of each of `size` cells between two edges [D] at the centre of each pixel."""
    centres = torch.arange(pixels, device=low.device) + 0.5
    cells = (centres - low[:, None]) / (high - low)[:, None] * size - 0.5
    return (1 - (cells[:, :, None] - torch.arange(size, device=low.device)).abs()).clamp(min=0)
