"""The operator: RoIAlign of a box enlarged by some context."""

from torch import Tensor

from roi_quantization import ops


def roi_align_with_context(features: Tensor, boxes: list[Tensor], output_size: int, spatial_scale: float, context: float) -> Tensor:
    """Pool each box together with its surroundings.

    Args:
        features: `[N, C, H, W]`.
        boxes: one `[L, 4]` an image, (x1, y1, x2, y2) in pixels.
        output_size: P, the height and width of the result in bins.
        spatial_scale: cells per pixel, 1 / stride of the feature map.
        context: share of the box's width and height that is added on each side.

    Returns:
        `[K, C, P, P]`, K the number of boxes of all images.
    """
    margins = [context * (b[:, 2:] - b[:, :2]) for b in boxes]
    enlarged = [b + m.repeat(1, 2) * b.new_tensor([-1, -1, 1, 1]) for b, m in zip(boxes, margins, strict=True)]
    return ops.roi_align(features, enlarged, output_size, spatial_scale, sampling_ratio=2, aligned=True)
