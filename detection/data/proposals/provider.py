"""The interface of a proposal provider, which `grid.py`, `selective_search.py` and `file.py` implement, and none at all."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from roi_quantization.detection.data.images import ImageRecord


class ProposalProvider(Protocol):
    """Provides the candidate windows of each image.

    It receives images without their annotations, so no ground truth can leak into the proposals of a test.
    """

    def prepare(self, images: Sequence[ImageRecord]) -> None:
        """Compute or read, and check, the windows of these images. Called once for each set of images, before any `__call__`."""

    def __call__(self, image: ImageRecord) -> Tensor:
        """Return the windows of an image.

        Returns:
            float32 `[L, 4]`, `(x1, y1, x2, y2)` in pixels of the upright image (after its EXIF orientation).
        """


class NoProposals:
    """Provides no windows: for detectors that find their own."""

    def prepare(self, images: Sequence[ImageRecord]) -> None:
        """Do nothing."""

    def __call__(self, image: ImageRecord) -> Tensor:
        return torch.zeros(0, 4)
