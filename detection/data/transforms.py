"""What is done to an image and to everything that lies in it: torchvision's v2 transforms, under a generator of their own.

Boxes, crowd regions and proposals travel as `tv_tensors.BoundingBoxes`, so that whatever moves the image moves all of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torchvision.transforms import v2


def resize_and_flip(short_side: int | Sequence[int] | None = None, max_side: int | None = None, flip: float = 0.0) -> nn.Module:
    """Resizes the shorter side to `short_side` pixels, the longer one to `max_side` at most, then flips left-right with probability `flip`.

    Several short sides mean one drawn for each image (multi-scale training); None keeps the size of the image. Bilinear, antialiased.
    The two axes may be scaled by slightly different factors, since sides are whole pixels: the ratio of the sizes is the scale.
    """
    sizes = [] if short_side is None else [short_side] if isinstance(short_side, int) else list(short_side)
    # torchvision refuses a limit that is no larger than the shorter side; it decides alone then
    resizes = [v2.Resize(size if max_side is None or size < max_side else None, max_size=max_side, antialias=True) for size in sizes]
    steps = resizes if len(resizes) <= 1 else [v2.RandomChoice(resizes)]
    return v2.Compose([*steps, v2.RandomHorizontalFlip(flip)])


@contextmanager
def drawn_from(*key: int) -> Iterator[None]:
    """Inside, torch's global CPU generator is seeded by `key`; outside, it is as if nothing had happened.

    v2 transforms draw from the global generator; this makes those of one image depend on (seed, epoch, image id), whatever worker loads it.
    """
    seed = int(np.random.SeedSequence([part % 2**64 for part in key]).generate_state(1, np.uint64)[0])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA's generators as well
        yield
