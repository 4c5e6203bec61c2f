"""The simplest proposals: a dense grid of windows, the same for every image of a size."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from roi_quantization.detection.data.images import ImageRecord


class Grid:
    """Windows of a few sizes and shapes, spread evenly over the image.

    Args:
        scales: the side of a window, as a fraction of the image's shorter side (for other shapes: of the square of the same area).
        aspect_ratios: height / width.
        step: the distance between neighbours at most, as a fraction of the window's width and height.
        most: windows of an image; a long and narrow one, in which there would be more, gets a larger step.

    Windows lie wholly inside the image; one that is wider or higher than the image is cut to it.
    """

    def __init__(self, scales: Sequence[float], aspect_ratios: Sequence[float] = (1.0,), step: float = 0.3, most: int = 10_000):
        if not all(value > 0 for value in (*scales, *aspect_ratios, step)):
            raise ValueError(f"Scales, aspect ratios and step must be positive; got {scales}, {aspect_ratios}, {step}.")
        if most < len(scales) * len(aspect_ratios):
            raise ValueError(f"most={most}: expected one window at least of each of {len(scales) * len(aspect_ratios)} sizes and shapes")
        self.scales, self.aspect_ratios, self.step, self.most = tuple(scales), tuple(aspect_ratios), step, most

    def prepare(self, images: Sequence[ImageRecord]) -> None:
        """Nothing to prepare: the size of an image says it all."""

    def __call__(self, image: ImageRecord) -> Tensor:
        step = self.step
        while (axes := self._axes(image, step)) and sum(len(left) * len(top) for (left, _), (top, _) in axes) > self.most:
            step *= 1.1
        windows = []
        for (left, width), (top, height) in axes:
            x, y = (axis.ravel() for axis in np.meshgrid(left, top))
            windows.append(np.stack([x, y, x + width, y + height], axis=1))
        return torch.from_numpy(np.concatenate(windows).astype(np.float32))

    def _axes(self, image: ImageRecord, step: float) -> list[tuple[tuple[np.ndarray, float], tuple[np.ndarray, float]]]:
        """For each size and shape where its windows begin along x and their width, and the same along y."""
        side = min(image.width, image.height)
        return [
            (_places(scale * side / ratio**0.5, image.width, step), _places(scale * side * ratio**0.5, image.height, step))
            for scale, ratio in product(self.scales, self.aspect_ratios)
        ]


def _places(length: float, extent: int, step: float) -> tuple[np.ndarray, float]:
    length = min(length, extent)
    gaps = int(np.ceil((extent - length) / (step * length) - 1e-9))
    if gaps == 0:
        return np.array([(extent - length) / 2]), length
    return np.linspace(0, extent - length, gaps + 1), length
