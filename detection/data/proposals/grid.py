"""Dense grid proposals: windows of fixed sizes and shapes, the same for all images of one size."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from roi_quantization.detection.common.configuration import check_count
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.data.images import ImageRecord


class Grid:
    """Windows of a few sizes and shapes, spread evenly over the image.

    All windows lie inside the image. A window that is wider or higher than the image is cut to it.

    Args:
        scales: side of a window / shorter side of the image. A window that is not square has the area of the square.
        aspect_ratios: height / width.
        step: largest distance between neighbouring windows, as a fraction of their width and height.
        most: upper limit of the windows of an image. The step grows where there would be more, as in a long and narrow image.
    """

    def __init__(self, scales: Sequence[float], aspect_ratios: Sequence[float] = (1.0,), step: float = 0.3, most: int = 10_000):
        lists = isinstance(scales, Sequence) and isinstance(aspect_ratios, Sequence)
        if not lists or not all(isinstance(value, int | float) and value > 0 for value in (*scales, *aspect_ratios, step)):
            raise InputError(f"scales={scales}, aspect_ratios={aspect_ratios}, step={step}: expected two lists and a number, all positive")
        check_count(most, "most")
        if most < len(scales) * len(aspect_ratios):
            raise InputError(f"most={most}: expected at least {len(scales) * len(aspect_ratios)}, one window of each size and shape")
        self.scales, self.aspect_ratios, self.step, self.most = tuple(scales), tuple(aspect_ratios), step, most

    def prepare(self, images: Sequence[ImageRecord]) -> None:
        """Do nothing: the windows depend on the size of the image alone."""

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
        """Return for each size and shape `(x1 of its windows, width), (y1 of its windows, height)`."""
        side = min(image.width, image.height)
        return [
            (_window_starts(scale * side / ratio**0.5, image.width, step), _window_starts(scale * side * ratio**0.5, image.height, step))
            for scale, ratio in product(self.scales, self.aspect_ratios)
        ]


def _window_starts(length: float, extent: int, step: float) -> tuple[np.ndarray, float]:
    """Return where windows of this length start along an axis, and their length after it is cut to the image."""
    length = min(length, extent)
    gaps = int(np.ceil((extent - length) / (step * length) - 1e-9))
    if gaps == 0:
        return np.array([(extent - length) / 2]), length
    return np.linspace(0, extent - length, gaps + 1), length
