"""Windows that took long to compute, kept: one proposal file for each set of images, found again image by image."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from filelock import FileLock

from roi_quantization.detection.data.images import ImageRecord
from roi_quantization.detection.data.proposals.file import read_proposals, write_proposals

log = logging.getLogger(__name__)

PART = 100  # images: what a killed run loses at most

Boxes = list[np.ndarray]


class ProposalCache:
    """Proposal files (docs/proposals.md) with a fingerprint of each image beside its windows.

    A set of images is one file. It serves every subset of its images, and what it has in common with another set is not computed again.
    While a set is computed its windows lie in parts of `PART` images, so that a run that was killed goes on where it was. Files and parts
    are moved into place when they are whole, and a lock lets one process compute while others that want the same wait.

    Args:
        folder: where the files are.
        name: what they begin with: the method, and whatever settings the windows depend on.
    """

    def __init__(self, folder: Path | str, name: str):
        self.folder, self.name = Path(folder), name

    def get(self, images: Sequence[ImageRecord], compute: Callable[[list[ImageRecord]], Iterable[np.ndarray]]) -> Boxes:
        """The windows of each image, `[L, 4]` in its pixels. `compute` yields those of the images that are not there, in their order."""
        keys = [fingerprint(image) for image in images]
        boxes = self._whole(keys)
        if boxes is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f"{self.name}.lock"):
                boxes = self._whole(keys)  # who held the lock may have computed it
                return self._complete(images, keys, compute) if boxes is None else boxes
        return boxes

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.name}_*.npz"))

    def _whole(self, keys: list[int]) -> Boxes | None:
        """The windows, if one file has all of them."""
        for path in self._files():
            if not _is_part(path) and _fingerprints(path) >= set(keys) and (kept := _read(path, keys)):
                return [kept[key] for key in keys]
        return None

    def _complete(self, images: Sequence[ImageRecord], keys: list[int], compute: Callable) -> Boxes:
        for leftover in self.folder.glob(f".{self.name}_*.tmp"):  # of a write that was killed; the lock says that nobody is at it
            leftover.unlink()
        kept = {}
        for path in self._files():
            kept |= _read(path, keys)
        missing = [(image, key) for image, key in zip(images, keys, strict=True) if key not in kept]
        if kept:
            log.info("%s: the windows of %d of %d images were there", self.folder, len(kept), len(images))
        computed = zip(missing, compute([image for image, _ in missing]), strict=True) if missing else iter(())
        while part := list(islice(computed, PART)):
            fresh = {key: boxes for (_, key), boxes in part}
            self._write([image for (image, _), _ in part], fresh, ".part")
            kept |= fresh
        self._write(images, {key: kept[key] for key in keys})
        for path in self._files():
            if _is_part(path) and _fingerprints(path) <= set(keys):
                path.unlink()
        return [kept[key] for key in keys]

    def _write(self, images: Sequence[ImageRecord], boxes: dict[int, np.ndarray], suffix: str = "") -> None:
        folder, content = images[0].path.parent.name, hashlib.sha256(np.array(list(boxes))).hexdigest()[:8]
        path = self.folder / f"{self.name}_{folder}_{content}{suffix}.npz"
        write_proposals(path, images, list(boxes.values()), fingerprint=list(boxes))


def fingerprint(image: ImageRecord) -> int:
    """63 bits of an image's id, name, size in pixels and size in bytes: one that was exchanged has another."""
    text = json.dumps([image.id, image.path.name, image.width, image.height, image.path.stat().st_size])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def _is_part(path: Path) -> bool:
    return path.name.endswith(".part.npz")


def _fingerprints(path: Path) -> set[int]:
    """Those of the images in a file; none if it does not read, so that its images are computed again."""
    try:
        with np.load(path) as file:  # of the arrays in an archive only those are read that are asked for
            return set(file["fingerprint"].tolist())
    except Exception as error:  # what numpy raises depends on where a file is damaged
        log.warning("%s is damaged and passed over (%s); remove it", path, error)
        return set()


def _read(path: Path, keys: Sequence[int]) -> dict[int, np.ndarray]:
    """Fingerprint -> windows of those images that a file has."""
    if not _fingerprints(path) & set(keys):
        return {}
    try:
        arrays = read_proposals(path)
    except ValueError as error:
        log.warning("%s Passed over; remove it.", error)
        return {}
    boxes = np.split(arrays["boxes"], np.cumsum(arrays["count"])[:-1])
    kept = dict(zip(arrays["fingerprint"].tolist(), boxes, strict=True))
    # copies: a view of some windows would keep those of all images in memory
    return kept if kept.keys() <= set(keys) else {key: kept[key].copy() for key in keys if key in kept}
