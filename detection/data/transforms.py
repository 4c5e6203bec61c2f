"""Image transforms: torchvision's v2 transforms, with random draws that are reproducible per image.

Boxes, crowd regions and proposals are `tv_tensors.BoundingBoxes` and masks are `tv_tensors.Mask`, so a transform applies to the image
and to all of them alike.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from roi_quantization.detection.common.errors import InputError


def resize_and_flip(short_side: int | Sequence[int] | None = None, max_side: int | None = None, flip: float = 0.0) -> nn.Module:
    """Build a transform that resizes an image and flips it left-right. Bilinear, antialiased.

    Sides are whole pixels, so the two axes may be scaled by slightly different factors: each by the ratio of its sizes.

    Args:
        short_side: the shorter side after resizing, in pixels. A list draws one for each image (multi-scale training); None keeps the size
            up to `max_side`.
        max_side: upper limit of the longer side, in pixels. Without `short_side` larger images are shrunk to it, others keep their size.
        flip: probability of a flip.

    Raises:
        InputError: a side is not a whole number of pixels, or the probability not between 0 and 1.
    """
    several = isinstance(short_side, Sequence) and not isinstance(short_side, str)
    sizes = [] if short_side is None else list(short_side) if several else [short_side]
    if not all(_is_pixels(size) for size in sizes):
        raise InputError(f"short_side={short_side!r}: expected a whole number of pixels such as 600, a list of them to draw from, or null")
    if not (max_side is None or _is_pixels(max_side)):
        raise InputError(f"max_side={max_side!r}: expected a whole number of pixels such as 1000, or null for no limit")
    sizes = [int(size) for size in sizes]  # torchvision takes no other integers
    max_side = None if max_side is None else int(max_side)
    if not (isinstance(flip, float | int) and 0 <= flip <= 1):
        raise InputError(f"flip={flip!r}: expected a probability from 0 to 1, such as 0.5")
    # torchvision refuses a max_size that does not exceed the size; max_side alone decides then
    resizes = [Resize(size if max_side is None or size < max_side else None, max_size=max_side, antialias=True) for size in sizes]
    if not sizes and max_side is not None:
        resizes = [Shrink(None, max_size=max_side, antialias=True)]
    steps = resizes if len(resizes) <= 1 else [v2.RandomChoice(resizes)]
    return v2.Compose([*steps, v2.RandomHorizontalFlip(flip)])


def _is_pixels(side: object) -> bool:
    return isinstance(side, Integral) and side > 0


class Resize(v2.Resize):
    """Resize as `v2.Resize` does, and masks by the pixel at the centre of each new one.

    `v2.Resize` takes the pixel at its upper left corner, which moves masks right and down of their boxes by up to half a pixel.
    The name is that of `v2.Resize` too: the files of `FeatureCache` have it in their key.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        size, max_size = self._size_of(inpt)
        if not isinstance(inpt, tv_tensors.Mask):
            return F.resize(inpt, size, interpolation=self.interpolation, max_size=max_size, antialias=self.antialias)
        # not F.resize: versions of torchvision before 0.29 ignore the interpolation of masks
        resized = F.resize_image(inpt.as_subclass(torch.Tensor), size, v2.InterpolationMode.NEAREST_EXACT, max_size)
        return tv_tensors.wrap(resized, like=inpt)

    def _size_of(self, inpt: Any) -> tuple[list[int] | None, int | None]:
        """Return size and max_size. The shorter side of a very thin image is a pixel, where torchvision's would be none."""
        height, width = F.get_size(inpt)
        if self.max_size is None or self.max_size * min(height, width) >= max(height, width):
            return self.size, self.max_size
        return [1, self.max_size] if width > height else [self.max_size, 1], None


class Shrink(Resize):
    """Resize images whose longer side exceeds `max_size` to it. Others keep their size."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return super().transform(inpt, params) if max(F.get_size(inpt)) > self.max_size else inpt


@contextmanager
def seeded_rng(*key: int) -> Iterator[None]:
    """Seed torch's global CPU generator with `key` inside the context, and restore its state afterwards.

    v2 transforms draw from the global generator. With the key (seed, epoch, image id) the draws of an image do not depend on the
    data-loader worker that loads it.
    """
    seed = int(np.random.SeedSequence([part % 2**64 for part in key]).generate_state(1, np.uint64)[0])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA's generators as well
        yield
