"""Selective search (Uijlings et al., IJCV 2013), the proposals of the Fast R-CNN paper: OpenCV's implementation, parallel and cached."""

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

from roi_quantization.detection.common.configuration import path_setting
from roi_quantization.detection.common.errors import MissingPackageError
from roi_quantization.detection.data.images import ImageRecord, read_image
from roi_quantization.detection.data.proposals.cache import ProposalCache

VERSION = 1  # increment it when the same settings give other windows


class SelectiveSearch:
    """Selective search, computed once per image (about a second on one core) and cached in `cache_dir` (see `ProposalCache`).

    New or changed images and other settings are computed anew. After an interruption the search continues where it stopped.

    Args:
        cache_dir: folder of the proposal files (docs/proposals.md), one for each set of images.
        quality: use OpenCV's slower mode, which finds several times as many windows.
        max_side: shrink the image to this longer side before the search, in pixels (the time grows faster than the area); None keeps it.
        min_side: drop windows with a shorter side than this, in pixels.
        max_proposals: upper limit of the windows of an image; a random draw, seeded by the image id, where there are more.
        num_workers: number of processes; None means one per core.
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
        self.cache = ProposalCache(path_setting(cache_dir, "proposals.cache_dir"), f"selective_search_{key}")
        self.num_workers = num_workers or os.cpu_count()
        self._boxes: dict[Path, np.ndarray] = {}

    def prepare(self, images: Sequence[ImageRecord]) -> None:
        """Load the windows of these images from the cache, or compute and cache them."""
        boxes = self.cache.get(images, self._search_all)
        self._boxes |= {image.path: of_image for image, of_image in zip(images, boxes, strict=True)}

    def __call__(self, image: ImageRecord) -> Tensor:
        return torch.from_numpy(self._boxes[image.path].astype(np.float32))

    def _search_all(self, images: Sequence[ImageRecord]) -> Iterator[np.ndarray]:
        """Yield the windows of each image in turn, computed in parallel, under a progress bar."""
        _opencv()  # fails here rather than in a worker, where the message would be quoted inside another
        workers = self.num_workers if self.num_workers > 1 and len(images) > 1 else 0
        # data-loader workers use one thread each, and end with the main process even if that is killed
        searches = _Searches(images, self.settings)
        loader = DataLoader(searches, batch_size=None, num_workers=workers, collate_fn=_identity, generator=torch.Generator())
        for windows in tqdm(loader, desc="selective search", total=len(images), unit="image", smoothing=0.02):
            if isinstance(windows, Exception):
                raise windows
            yield windows


class _Searches(Dataset):
    """Items are the windows of an image, or the error that names the image: raised in a worker it would be quoted inside another."""

    def __init__(self, images: Sequence[ImageRecord], settings: dict):
        self.images, self.settings = images, settings

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray | Exception:
        try:
            return search(self.images[index], **self.settings)
        except (FileNotFoundError, ValueError) as error:
            return error


def _identity(windows: np.ndarray | Exception) -> np.ndarray | Exception:
    return windows


def search(image: ImageRecord, quality: bool, max_side: int | None, min_side: int, max_proposals: int) -> np.ndarray:
    """Search one image. The arguments are those of `SelectiveSearch`.

    Returns:
        Windows `[L, 4]` in pixels of the upright image (after its EXIF orientation), int16 (float32 in an image with a side of 2^15 pixels
        or more).
    """
    cv2 = _opencv()
    cv2.setNumThreads(1)  # the images are searched in parallel, one per core
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
        raise MissingPackageError(
            f'Selective search is in OpenCV\'s contrib modules, and {found}: pip install -e ".[selective-search]" '
            "(after `pip uninstall` of any other opencv-python), or choose proposals=grid."
        )
    return cv2
