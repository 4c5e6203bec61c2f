"""Selective search (Uijlings et al., IJCV 2013), the proposals that Fast R-CNN was made with: OpenCV's, cached and in parallel."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from roi_quantization.detection.data.images import ImageRecord, read_image
from roi_quantization.detection.data.proposals.cache import ProposalCache

VERSION = 1  # raised when the same settings come to give other windows


class SelectiveSearch:
    """Selective search, about a second an image and core, computed once and kept in `cache_dir` (see `ProposalCache`).

    Other settings, and images that are new or were exchanged, are noticed and computed; a run that was killed goes on where it was.

    Args:
        cache_dir: holds a proposal file (docs/proposals.md) for each set of images.
        quality: OpenCV's slower mode, with several times as many windows.
        max_side: search in an image shrunk to this longer side (time grows faster than the area); None searches in the image itself.
        min_side: drop windows with a side shorter than this many pixels.
        max_proposals: keep so many windows of an image, drawn from a generator seeded by its id.
        num_workers: processes; None means as many as there are cores.
    """

    def __init__(
        self,
        cache_dir: Path | str,
        quality: bool = False,
        max_side: int | None = 500,
        min_side: int = 10,
        max_proposals: int = 2000,
        num_workers: int | None = None,
    ):
        self.settings = {"quality": quality, "max_side": max_side, "min_side": min_side, "max_proposals": max_proposals}
        key = hashlib.sha256(json.dumps([VERSION, self.settings]).encode()).hexdigest()[:8]
        self.cache = ProposalCache(cache_dir, f"selective_search_{key}")
        self.num_workers = num_workers or os.cpu_count()
        self._boxes: dict[Path, np.ndarray] = {}

    def prepare(self, images: Sequence[ImageRecord]) -> None:
        """Finds the windows of these images in the cache, or computes them and puts them there."""
        boxes = self.cache.get(images, self._search_all)
        self._boxes |= {image.path: of_image for image, of_image in zip(images, boxes, strict=True)}

    def __call__(self, image: ImageRecord) -> Tensor:
        return torch.from_numpy(self._boxes[image.path].astype(np.float32))

    def _search_all(self, images: Sequence[ImageRecord]) -> Iterator[np.ndarray]:
        """The windows of each image in turn, from several processes, under a bar that tells the time left."""
        _opencv()  # an error here is read more easily than one in another process
        workers = self.num_workers if self.num_workers > 1 and len(images) > 1 else 0
        # torch's loader: its workers use one thread each, and end when this process does, however that ends
        searches = _Searches(images, self.settings)
        loader = DataLoader(searches, batch_size=None, num_workers=workers, collate_fn=_as_it_is, generator=torch.Generator())
        for windows in tqdm(loader, desc="selective search", total=len(images), unit="image", smoothing=0.02):
            if isinstance(windows, Exception):
                raise windows
            yield windows


class _Searches(Dataset):
    """The windows of each image; or the error that names it, which a loader would quote inside its own."""

    def __init__(self, images: Sequence[ImageRecord], settings: dict):
        self.images, self.settings = images, settings

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray | Exception:
        try:
            return search(self.images[index], **self.settings)
        except (FileNotFoundError, ValueError) as error:
            return error


def _as_it_is(windows: np.ndarray | Exception) -> np.ndarray | Exception:
    return windows


def search(image: ImageRecord, quality: bool, max_side: int | None, min_side: int, max_proposals: int) -> np.ndarray:
    """The windows of one image, int16 `[L, 4]`, in its pixels; the arguments are those of `SelectiveSearch`."""
    cv2 = _opencv()
    cv2.setNumThreads(1)  # as many images at once as there are cores, rather than all cores on one image
    algorithm = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    pixels = read_image(image)
    shrink = (max_side or math.inf) / max(image.width, image.height)
    if shrink < 1:
        pixels = F.resize(pixels, [math.ceil(side * shrink) for side in (image.height, image.width)])
    algorithm.setBaseImage(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()[:, :, ::-1]))  # OpenCV wants BGR
    if quality:
        algorithm.switchToSelectiveSearchQuality()
    else:
        algorithm.switchToSelectiveSearchFast()
    x, y, width, height = algorithm.process().T
    scale_x, scale_y = image.width / pixels.shape[2], image.height / pixels.shape[1]
    boxes = np.stack([x * scale_x, y * scale_y, (x + width) * scale_x, (y + height) * scale_y], axis=1).round()
    boxes = boxes.astype(np.int16 if max(image.width, image.height) < 2**15 else np.float32)
    boxes = np.unique(boxes, axis=0)  # OpenCV orders windows by C's unseeded rand(): sorting makes runs agree
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).min(axis=1) >= min_side]
    return np.random.RandomState(image.id % 2**32).permutation(boxes)[:max_proposals]


def _opencv():
    try:
        import cv2
    except ImportError:
        cv2 = None
    if not hasattr(cv2, "ximgproc"):
        found = "OpenCV is not installed" if cv2 is None else f"this OpenCV ({cv2.__version__}) was built without its contrib modules"
        raise ImportError(
            f'Selective search is in OpenCV\'s contrib modules, and {found}: pip install -e ".[selective-search]" '
            "(after `pip uninstall` of any other opencv-python), or choose proposals=grid."
        )
    return cv2
