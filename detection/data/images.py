"""One image of a data set: what its annotations say of it, and its pixels."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F


@dataclass(frozen=True)
class ImageRecord:
    """What is known of an image before it is read; `width` and `height` are those of the annotations, in pixels."""

    id: int
    path: Path
    width: int
    height: int


def read_image(record: ImageRecord) -> torch.Tensor:
    """The image as uint8 RGB, `3 x height x width`, turned upright as its EXIF orientation says; grey, palette and CMYK become RGB.

    Raises `ValueError` that names the file: it does not decode, or has another size than its annotations say (its boxes would be wrong).
    """
    try:
        with Image.open(record.path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey at 255 instead of scaling it
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"Image {record.id} is not at {record.path}; the annotations list it.") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three, depending on the format
        raise ValueError(
            f"{record.path} (image {record.id}) does not decode: {error}. Fetch the file again, or leave out its id."
        ) from error
    if image.size != (record.width, record.height):
        raise ValueError(
            f"{record.path} (image {record.id}) is {image.width} x {image.height}, its annotations say {record.width} x {record.height}: "
            "they were made for another version of the image (resized, or not turned as its EXIF orientation says)."
        )
    return F.pil_to_tensor(image)
