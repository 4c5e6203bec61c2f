"""What a provider of proposals is: `grid.py`, `selective_search.py` and `file.py` are three."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from roi_quantization.detection.data.images import ImageRecord


class ProposalProvider(Protocol):
    """Gives each image its windows. It is told of the images alone, never of the annotations, so nothing of these can leak into a test."""

    def prepare(self, images: Sequence[ImageRecord]) -> None:
        """Called once for each set of images before any of its windows are asked for: the place to compute, read and check."""

    def __call__(self, image: ImageRecord) -> Tensor:
        """float32 `[L, 4]`: `(x1, y1, x2, y2)` in pixels of the image as it lies on disk."""
