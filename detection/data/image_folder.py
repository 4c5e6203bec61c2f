"""Pictures without annotations: a file, or all pictures of a folder."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from tqdm import tqdm

from roi_quantization.detection.common.errors import MissingFileError
from roi_quantization.detection.data.images import FORMATS, ImageRecord, decode, read_image
from roi_quantization.detection.data.proposals.provider import ProposalProvider

log = logging.getLogger(__name__)

READABLE = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS and kind in Image.OPEN}
OTHER_PICTURES = {".heic", ".heif", ".avif", ".jxl", ".svg", ".eps", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}
UNREADABLE = OTHER_PICTURES - READABLE  # by this Pillow


def find_images(path: Path | str) -> list[Path]:
    """Find the pictures of a folder and its subfolders, or return the file.

    Pictures that cannot be read (HEIC, links to nothing) and linked folders, which are not followed, are in the list too, so that
    `read_images` gives the reason. The number of other files is logged.

    Raises:
        MissingFileError: there is no such file or folder, or no picture in it.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise MissingFileError(f"image={path}: there is no such picture or folder")
        return [path]
    found, others = [], Counter()
    for entry in sorted(path.rglob("*")):
        if entry.suffix.lower() in READABLE | UNREADABLE or (entry.is_symlink() and (entry.is_dir() or not entry.exists())):
            if entry.is_symlink() or not entry.is_dir():
                found.append(entry)
        elif not entry.is_dir():
            others[entry.suffix.lower() or entry.name] += 1
    if not found:
        raise MissingFileError(f"image={path}: there are no pictures in this folder (.jpg, .png, ...)")
    if others:
        endings = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
        log.info("image=%s: %d files are no pictures and are passed over (%s)", path, others.total(), endings)
    return found


def read_images(paths: Sequence[Path], progress: bool = False) -> tuple[list[ImageRecord], dict[Path, str]]:
    """Read pictures.

    Returns:
        The record of each picture that decodes, numbered from 1, and the reason of each that does not.
    """
    records, unreadable = [], {}
    for path in tqdm(paths, desc="reading", unit="image", disable=not progress):
        try:
            height, width = decode(path).shape[1:]
            records.append(ImageRecord(len(records) + 1, path, width, height))
        except (OSError, ValueError) as error:
            unreadable[path] = _reason(path) or str(error)
    return records, unreadable


def _reason(path: Path) -> str | None:
    if path.is_dir():
        return "it is a link to a folder, which is not followed; give that folder with image="
    if not path.exists():
        return "it is a link to a file that does not exist"
    if path.suffix.lower() in UNREADABLE:
        return f"Pillow does not read {path.suffix}; convert it to .jpg or .png"
    return None


class ImageFolder(Dataset):
    """Items as those of `CocoDetection`, without annotations: `(image, {"proposals", "image_id", "original_size"})`.

    Args:
        records: the images.
        proposals: provider of their windows.
        transform: applied to the image and its windows.
        read: returns the pixels of an image, uint8 RGB `[3, H, W]`.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        proposals: ProposalProvider,
        transform: Callable | None = None,
        read: Callable[[ImageRecord], torch.Tensor] = read_image,
    ):
        self.records, self.proposals, self.transform, self.read = list(records), proposals, transform, read
        proposals.prepare(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        record = self.records[index]
        size = (record.height, record.width)
        image = tv_tensors.Image(self.read(record))
        proposals = tv_tensors.BoundingBoxes(self.proposals(record), format="XYXY", canvas_size=size)
        if self.transform is not None:
            image, proposals = self.transform(image, proposals)
        target = {"proposals": proposals.as_subclass(torch.Tensor), "image_id": record.id, "original_size": size}
        return image.as_subclass(torch.Tensor), target
