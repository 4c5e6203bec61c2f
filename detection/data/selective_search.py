"""Selective search (Uijlings et al., IJCV 2013), the proposals that Fast R-CNN was made with: OpenCV's, cached and in parallel."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from detection.data.images import ImageRecord, read_image
from detection.data.proposal_file import read_proposals, write_proposals

CHUNK = 500  # images in a file of the cache: what an interrupted run loses at most
VERSION = 1  # raised when the same settings come to give other windows


class SelectiveSearch:
    """Selective search, about a second an image and core, computed once and kept in `cache_dir`.

    Args:
        cache_dir: holds a proposal file (docs/proposals.md) for every 500 images, named by a hash of the settings and of the images
            (id, name, size in pixels and bytes): other settings or images are computed anew, and an interrupted run goes on where it was.
        quality: OpenCV's slower mode, with several times as many windows.
        max_side: search in an image shrunk to this longer side (time grows faster than the area); None searches in the image itself.
        min_side: drop windows with a side shorter than this many pixels.
        max_proposals: keep so many windows of an image, drawn from a generator seeded by its id.
        num_workers: threads (OpenCV lets them run side by side); None means as many as there are cores.
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
        self.cache_dir = Path(cache_dir)
        self.settings = {"quality": quality, "max_side": max_side, "min_side": min_side, "max_proposals": max_proposals}
        self.num_workers = num_workers or os.cpu_count()
        self._boxes: dict[Path, np.ndarray] = {}

    def prepare(self, images: Sequence[ImageRecord]) -> None:
        """Finds the windows of these images in the cache, or computes them and puts them there."""
        chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
        paths = [self.cache_dir / f"selective_search_{self._key(chunk)}.npz" for chunk in chunks]
        missing = [(chunk, path) for chunk, path in zip(chunks, paths, strict=True) if not path.is_file()]
        if missing:
            self._compute(missing)
        for chunk, path in zip(chunks, paths, strict=True):
            arrays = read_proposals(path)
            boxes = np.split(arrays["boxes"], np.cumsum(arrays["count"])[:-1])
            self._boxes |= {image.path: of_image for image, of_image in zip(chunk, boxes, strict=True)}

    def __call__(self, image: ImageRecord) -> Tensor:
        return torch.from_numpy(self._boxes[image.path].astype(np.float32))

    def _key(self, images: Sequence[ImageRecord]) -> str:
        listed = [(image.id, image.path.name, image.width, image.height, image.path.stat().st_size) for image in images]
        text = json.dumps([VERSION, self.settings, listed])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _compute(self, missing: list[tuple[Sequence[ImageRecord], Path]]) -> None:
        cv2 = _opencv()
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)  # one image a thread, rather than all threads on one image
        total = sum(len(chunk) for chunk, _ in missing)
        try:
            with ThreadPoolExecutor(self.num_workers) as pool, tqdm(total=total, desc="selective search", unit="image") as progress:
                for chunk, path in missing:
                    boxes = []
                    for of_image in pool.map(self.search, chunk):
                        boxes.append(of_image)
                        progress.update()
                    write_proposals(path, chunk, boxes)
        finally:
            cv2.setNumThreads(threads)

    def search(self, image: ImageRecord) -> np.ndarray:
        """The windows of one image, int16 `[L, 4]`, in its pixels."""
        search = _opencv().ximgproc.segmentation.createSelectiveSearchSegmentation()
        pixels = read_image(image)
        shrink = (self.settings["max_side"] or math.inf) / max(image.width, image.height)
        if shrink < 1:
            pixels = F.resize(pixels, [math.ceil(side * shrink) for side in (image.height, image.width)])
        search.setBaseImage(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()[:, :, ::-1]))  # OpenCV wants BGR
        if self.settings["quality"]:
            search.switchToSelectiveSearchQuality()
        else:
            search.switchToSelectiveSearchFast()
        x, y, width, height = search.process().T
        scale_x, scale_y = image.width / pixels.shape[2], image.height / pixels.shape[1]
        boxes = np.stack([x * scale_x, y * scale_y, (x + width) * scale_x, (y + height) * scale_y], axis=1).round().astype(np.int16)
        boxes = np.unique(boxes, axis=0)  # OpenCV orders windows by C's unseeded rand(): sorting makes runs agree
        boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).min(axis=1) >= self.settings["min_side"]]
        return np.random.RandomState(image.id % 2**32).permutation(boxes)[: self.settings["max_proposals"]]


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
