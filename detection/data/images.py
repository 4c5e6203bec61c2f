"""One image of a data set: what its annotations say of it, and its pixels."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

Image.init()
FORMATS = [name for name in Image.ID if name != "EPS"]  # which is a program: Pillow has Ghostscript run it
LONGEST_SIDE = 65_535  # pixels, as in JPEG


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """What is known of an image before it is read; `width` and `height` are those of the annotations, in pixels."""

    id: int
    path: Path
    width: int
    height: int


def decode(path: Path | str) -> torch.Tensor:
    """The image as uint8 RGB `3 x height x width`, turned upright as its EXIF orientation says.

    Grey, palette and CMYK become RGB, 16 bits become 8, transparency is dropped. Raises `FileNotFoundError`, or `ValueError` with the
    decoder's reason for a file that is damaged, cut short, no image or too large to be one (`check_size`).
    """
    try:
        if not Path(path).is_file() and Path(path).exists():  # reading a pipe or a device might never end
            raise ValueError("it is no regular file")
        with Image.open(path, formats=FORMATS) as file:
            check_size(*file.size)
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255 instead of scaling it
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            return F.pil_to_tensor(image.convert("RGB"))
    except FileNotFoundError:
        raise
    except Exception as error:  # what Pillow raises depends on the format and on where a file is damaged
        raise ValueError(str(error) or type(error).__name__) from error


def check_size(width: int, height: int) -> None:
    """Raises `ValueError` for an image with more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, of which Pillow only warns, or too long a side.

    A file of a few bytes can claim to be of any size, and to unpack it would take all memory.
    """
    most = Image.MAX_IMAGE_PIXELS or float("inf")
    if width * height > most or max(width, height) > LONGEST_SIDE:
        raise ValueError(
            f"{width} x {height} is too large to be a photograph: at most {most} pixels and sides of {LONGEST_SIDE} are read; shrink it"
        )


def read_image(record: ImageRecord) -> torch.Tensor:
    """The pixels of an image of a data set, see `decode`.

    Raises `ValueError` that names the file: it does not decode, or has another size than its annotations say (its boxes would be wrong).
    """
    try:
        image = decode(record.path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"Image {record.id} is not at {record.path}; the annotations list it.") from error
    except ValueError as error:
        raise ValueError(
            f"{record.path} (image {record.id}) does not decode: {error}. Fetch the file again, or leave it out of the annotations."
        ) from error
    height, width = image.shape[1:]
    if (width, height) != (record.width, record.height):
        raise ValueError(
            f"{record.path} (image {record.id}) is {width} x {height}, its annotations say {record.width} x {record.height}: "
            "they were made for another version of the image (resized, or not turned as its EXIF orientation says)."
        )
    return image
