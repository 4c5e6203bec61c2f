"""Cache of computed proposals: one proposal file for each set of images, looked up image by image."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from roi_quantization.detection.common.files import locked_cache
from roi_quantization.detection.data.images import ImageRecord
from roi_quantization.detection.data.proposals.file import read_proposals, write_proposals

log = logging.getLogger(__name__)

PART = 100  # images in a partial file: a killed run loses at most the windows of so many
HASHING_THREADS = 8  # reading waits for the disk, and hashing runs without Python's lock

Boxes = list[np.ndarray]


class ProposalCache:
    """Proposal files (docs/proposals.md) with a fingerprint of each image beside its windows.

    A set of images is one file. It serves every subset of its images, and images that another set has too are not computed again. While a
    set is computed its windows are in partial files of `PART` images, from which a killed run continues. All files are written atomically.
    One process computes, and others that need the same windows wait for its lock.

    Args:
        folder: folder of the files.
        name: prefix of their names: the method and all settings that the windows depend on.
    """

    def __init__(self, folder: Path | str, name: str):
        self.folder, self.name = Path(folder), name

    def get(self, images: Sequence[ImageRecord], compute: Callable[[list[ImageRecord]], Iterable[np.ndarray]]) -> Boxes:
        """Look up or compute windows.

        Args:
            images: the images.
            compute: yields the windows of the images that are not in the cache, in their order.

        Returns:
            The windows of each image, `[L, 4]` in its pixels.

        Raises:
            NotWrittenError: the folder cannot be written.
        """
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            keys = list(pool.map(fingerprint, images))
        boxes = self._find_complete(keys)
        if boxes is None:
            with locked_cache(self.folder / f"{self.name}.lock"):
                boxes = self._find_complete(keys)  # another process may have computed it while this one waited for the lock
                return self._compute_missing(images, keys, compute) if boxes is None else boxes
        return boxes

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.name}_*.npz"))

    def _find_complete(self, keys: list[int]) -> Boxes | None:
        """Return the windows if one file has all of them."""
        for path in self._files():
            if not _is_part(path) and _fingerprints(path) >= set(keys) and (kept := _read(path, keys)):
                return [kept[key] for key in keys]
        return None

    def _compute_missing(self, images: Sequence[ImageRecord], keys: list[int], compute: Callable) -> Boxes:
        for leftover in self.folder.glob(f".{self.name}_*.tmp"):  # of a killed write: the lock excludes one that is running
            leftover.unlink()
        kept = {}
        for path in self._files():
            kept |= _read(path, keys)
        missing = [(image, key) for image, key in zip(images, keys, strict=True) if key not in kept]
        if kept:
            log.info("%s has the windows of %d of %d images", self.folder, len(kept), len(images))
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
    """Return 63 bits of an image's id, size and content: another picture has others, whatever its name and size in bytes."""
    with open(image.path, "rb") as file:
        content = hashlib.file_digest(file, hashlib.blake2b).hexdigest()
    text = json.dumps([image.id, image.width, image.height, content])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def _is_part(path: Path) -> bool:
    return path.name.endswith(".part.npz")


def _fingerprints(path: Path) -> set[int]:
    """Return the fingerprints in a file; an empty set if it is damaged, so that its images are computed again."""
    try:
        with np.load(path) as file:  # reads this array only
            return set(file["fingerprint"].tolist())
    except Exception as error:  # what numpy raises depends on where a file is damaged
        log.warning("%s is damaged and ignored (%s); remove it", path, error)
        return set()


def _read(path: Path, keys: Sequence[int]) -> dict[int, np.ndarray]:
    """Return the windows of those images that a file has, by fingerprint."""
    if not _fingerprints(path) & set(keys):
        return {}
    try:
        arrays = read_proposals(path)
    except ValueError as error:
        log.warning("%s The file is ignored; remove it.", error)
        return {}
    boxes = np.split(arrays["boxes"], np.cumsum(arrays["count"])[:-1])
    kept = dict(zip(arrays["fingerprint"].tolist(), boxes, strict=True))
    # copies, because views would keep the windows of all images in memory
    return kept if kept.keys() <= set(keys) else {key: kept[key].copy() for key in keys if key in kept}
