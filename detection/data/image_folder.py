"""Pictures without annotations: a file, or all of a folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from tqdm import tqdm

from roi_quantization.detection.data.images import ImageRecord, decode, read_image
from roi_quantization.detection.data.proposals.provider import ProposalProvider
from roi_quantization.detection.errors import MissingFileError


def find_images(path: Path | str) -> list[Path]:
    """The file, or the pictures of a folder and of those in it (by the endings that Pillow reads), sorted. Raises where there is none."""
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise MissingFileError(f"image={path}: there is no such picture or folder")
        return [path]
    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings and file.is_file())
    if not found:
        raise MissingFileError(f"image={path}: there are no pictures in this folder (.jpg, .png, ...)")
    return found


def read_images(paths: Sequence[Path], progress: bool = False) -> tuple[list[ImageRecord], dict[Path, str]]:
    """The record of each picture that decodes, numbered from 1, and the reason of each that does not."""
    records, bad = [], {}
    for path in tqdm(paths, desc="reading", unit="image", disable=not progress):
        try:
            height, width = decode(path).shape[1:]
            records.append(ImageRecord(len(records) + 1, path, width, height))
        except (OSError, ValueError) as error:
            bad[path] = str(error)
    return records, bad


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
