"""Feature maps of a frozen backbone: computed once for each image and flip, kept in a file, read in the place of pixels."""

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.files import CACHE_REMEDY, NotWrittenError, atomic_write, locked_cache
from roi_quantization.detection.data.images import ImageRecord
from roi_quantization.detection.data.proposals.cache import HASHING_THREADS, fingerprint

log = logging.getLogger(__name__)

VERSION = 2  # increment it when the same settings give other maps
PART = 50  # maps between two writings of the index: a killed run loses at most so many
SAMPLED = 64  # values of the sample that the index has
TOLERANCE = 0.05  # of the sample's norm: other devices and numbers of threads give other last bits, other layers other values

Map = tuple[ImageRecord, bool]  # an image, and whether it is flipped left-right


class Entry(NamedTuple):
    """Where a map lies in the file, in bytes, its size in cells, and the CRC-32 of its bytes."""

    offset: int
    height: int
    width: int
    checksum: int


class FeatureCache:
    """One file of float16 feature maps, `[H, W, C]` one after the other, with an index beside it.

    The index lists only maps that are complete on the disk, so a killed or failed run continues after them. One process computes, and
    others that need the same maps wait for its lock. Each map is checked against its checksum when it is read.

    Args:
        folder: of the files.
        key: of what the maps depend on beside the images: the structure of the backbone, its weights, the resizing.
        sample: `[C, h, w]`, what the layers make of a fixed input. The index has some of its values, because a key does not tell how
            somebody else's layers compute.
    """

    def __init__(self, folder: Path | str, key: str, sample: Tensor):
        self.folder, self.channels = Path(folder), len(sample)
        values = sample.detach().float().cpu().flatten()
        self.sample = values[:: max(1, len(values) // SAMPLED)][:SAMPLED].numpy()
        digest = hashlib.sha256(json.dumps([VERSION, key]).encode()).hexdigest()[:12]
        self.path = self.folder / f"features_{digest}.float16"
        self.index_path = self.path.with_suffix(".json")
        self.index: dict[str, Entry] = {}
        self.names: dict[Path, str] = {}

    def prepare(
        self,
        images: Sequence[ImageRecord],
        flips: Sequence[bool],
        size: Callable[[ImageRecord], tuple[int, int]],
        compute: Callable[[ImageRecord, bool], Tensor],
    ) -> None:
        """Compute the maps of these images that are not in the file.

        Args:
            images: the images.
            flips: of each image: `(False,)`, or `(False, True)` for the flipped image as well.
            size: `(image) -> (H, W)` in cells, to tell how much disk the maps need.
            compute: `(image, flipped) -> [C, H, W]`.

        Raises:
            NotWrittenError: the folder cannot be written.
            InputError: the maps in the file are of layers that compute otherwise; the disk has not the room, or a map has values that
                float16 does not hold.
        """
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            fingerprints = list(pool.map(fingerprint, images))
        sizes = ["x".join(map(str, size(image))) for image in images]  # the stride is in them: an image is padded to a multiple of it
        self.names = {image.path: f"{content}_{cells}" for image, content, cells in zip(images, fingerprints, sizes, strict=True)}
        wanted = [(image, flipped) for image in images for flipped in flips]
        self._read_index()
        if self._missing(wanted):
            with locked_cache(self.path.with_suffix(".lock")):
                self._read_index()  # another process may have computed them while this one waited for the lock
                if missing := self._missing(wanted):
                    self._compute(missing, size, compute)

    def __call__(self, image: ImageRecord, flipped: bool) -> Tensor:
        """Read a map: float16 `[C, H, W]`, its memory channels-last.

        Raises:
            InputError: the file is damaged.
        """
        entry = self.index[self._name(image, flipped)]
        try:
            values = np.array(np.memmap(self.path, np.float16, "r", entry.offset, (entry.height, entry.width, self.channels)))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path} is truncated or not readable ({error}). Remove it, and its maps are computed anew") from error
        if zlib.crc32(values) != entry.checksum:
            raise InputError(
                f"{self.path} is damaged: the map of {image.path} has another checksum. Remove it, and its maps are computed anew"
            )
        return torch.from_numpy(values).permute(2, 0, 1)

    def _name(self, image: ImageRecord, flipped: bool) -> str:
        return f"{self.names[image.path]}{'_flipped' if flipped else ''}"

    def _missing(self, wanted: Sequence[Map]) -> list[Map]:
        return [(image, flipped) for image, flipped in wanted if self._name(image, flipped) not in self.index]

    def _bytes(self, height: int, width: int) -> int:
        return np.dtype(np.float16).itemsize * self.channels * height * width

    def _compute(self, missing: Sequence[Map], size: Callable, compute: Callable) -> None:
        end = self._end()
        self._check_room(sum(self._bytes(*size(image)) for image, _ in missing))
        try:
            self.path.touch()
            with open(self.path, "r+b") as file:
                file.truncate(end)  # drop what a killed run wrote after its last index
                file.seek(end)
                for number, (image, flipped) in enumerate(tqdm(missing, desc="feature maps", unit="map", smoothing=0.02), start=1):
                    values = compute(image, flipped).permute(1, 2, 0).to("cpu", torch.float16).contiguous().numpy()
                    if not np.isfinite(values).all():
                        raise InputError(f"the feature map of {image.path} has values beyond 65504, which float16 does not hold")
                    file.write(values)
                    self.index[self._name(image, flipped)] = Entry(end, *values.shape[:2], zlib.crc32(values))
                    end += values.nbytes
                    if number % PART == 0 or number == len(missing):
                        file.flush()
                        os.fsync(file.fileno())
                        self._write_index()
        except OSError as error:
            raise NotWrittenError(self.path, error, CACHE_REMEDY) from error

    def _end(self) -> int:
        return max((entry.offset + self._bytes(entry.height, entry.width) for entry in self.index.values()), default=0)

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        log.info("feature maps are computed once: %.1f MB in %s, where %.0f MB are free", needed / 1e6, self.path, free / 1e6)
        if needed > free:
            raise InputError(
                f"the feature maps need {needed / 1e6:.1f} MB, and {self.folder} has {free / 1e6:.1f} MB free. Make room there, or choose "
                "another folder with features.cache_dir"
            )

    def _write_index(self) -> None:
        maps = {name: list(entry) for name, entry in self.index.items()}
        content = {"version": VERSION, "channels": self.channels, "sample": self.sample.tolist(), "maps": maps}
        atomic_write(self.index_path, json.dumps(content).encode())

    def _read_index(self) -> None:
        """Read the index, if there is one. A damaged one is no index: what it listed is computed anew."""
        self.index = {}
        if not self.index_path.is_file() or not self.path.is_file():
            return
        try:
            content = json.loads(self.index_path.read_text())
            entries = {name: Entry(*entry) for name, entry in content["maps"].items()}
            sample = np.array(content.get("sample", self.sample), np.float32)  # earlier versions wrote none
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is damaged and ignored (%s): its maps are computed anew", self.index_path, error)
            return
        if sample.shape != self.sample.shape or np.linalg.norm(sample - self.sample) > TOLERANCE * np.linalg.norm(sample):
            raise InputError(
                f"{self.path}: its maps were computed by layers with these names and weights that gave other values. Has the code of the "
                "backbone changed, or one of its settings? Remove the file, or choose another folder with features.cache_dir"
            )
        length = self.path.stat().st_size
        self.index = {name: e for name, e in entries.items() if e.offset + self._bytes(e.height, e.width) <= length}
