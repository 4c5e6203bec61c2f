"""Read one image of a data set: what its annotations say of it, and its pixels."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torchvision.transforms.v2 import functional as F

from roi_quantization.detection.common.errors import InputError, MissingFileError

log = logging.getLogger(__name__)

Image.init()
FORMATS = [name for name in Image.ID if name != "EPS"]  # Pillow runs PostScript with Ghostscript
LONGEST_SIDE = 65_535  # pixels, as in JPEG
MAX_SAMPLE_VALUE, BITS_PER_SAMPLE = 281, 258  # TIFF tags
_warned: set[str] = set()  # kinds of images of which this process has warned

# EXIF orientation -> the transpose that turns the image upright
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image before it is read; `width` and `height` are those of the annotations, in pixels."""

    id: int
    path: Path
    width: int
    height: int


def decode(path: Path | str) -> torch.Tensor:
    """Read an image, turned upright as its EXIF orientation says.

    Grey, palette and CMYK become RGB, and transparency is dropped. 16-bit, 32-bit and float images become 8-bit by the range that their
    file or their values tell (see `_to_uint8`), which is logged once for each kind.

    Returns:
        uint8 RGB `3 x height x width`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, truncated, no image or too large to be one (`check_size`); with the decoder's reason.
    """
    return _decode(Path(path))[0]


def read_image(record: ImageRecord, has_boxes: bool = False) -> torch.Tensor:
    """Read an image of a data set, see `decode`.

    Args:
        record: the image.
        has_boxes: whether it is annotated; then a rotation that its size does not verify is logged, once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the image does not decode, or does not have the size of its annotations, whose boxes would be wrong.
    """
    try:
        image, orientation = _decode(record.path)
    except FileNotFoundError as error:
        raise MissingFileError(f"Image {record.id} is not at {record.path}; the annotations list it.") from error
    except ValueError as error:
        raise InputError(
            f"{record.path} (image {record.id}) does not decode: {error}. Fetch the file again, or leave it out of the annotations."
        ) from error
    height, width = image.shape[1:]
    if (width, height) != (record.width, record.height):
        raise InputError(
            f"{record.path} (image {record.id}) is {width} x {height}, its annotations say {record.width} x {record.height}: "
            "they were made for another version of the image (resized, or not turned as its EXIF orientation says)."
        )
    if has_boxes and orientation in TRANSPOSES and (orientation <= 4 or width == height):
        _warn_of_unverified_rotation(record)
    return image


def to_rgb(image: Image.Image, name: Path | str, transpose: Image.Transpose | None = None) -> torch.Tensor:
    """Convert a PIL image to uint8 RGB `3 x height x width`, as `decode` does; `name` is what a log line calls it."""
    samples = image
    if image.mode.startswith(("I", "F")):
        samples = Image.fromarray(_to_uint8(np.asarray(image), name, _stated_maximum(image)))
    if transpose is not None:
        samples = samples.transpose(transpose)
    return F.pil_to_tensor(samples.convert("RGB"))


def check_size(width: int, height: int) -> None:
    """Check that an image is not too large to read. A file of a few bytes can claim any size, and decoding it would take all memory.

    Raises:
        ValueError: more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, of which Pillow only warns, or a side longer than `LONGEST_SIDE`.
    """
    most = Image.MAX_IMAGE_PIXELS or float("inf")
    if width * height > most or max(width, height) > LONGEST_SIDE:
        raise InputError(
            f"{width} x {height} is too large to be a photograph: at most {most} pixels and sides of {LONGEST_SIDE} are read; shrink it"
        )


def _decode(path: Path) -> tuple[torch.Tensor, int]:
    """Return the upright image and the EXIF orientation that was applied."""
    try:
        if not path.is_file() and path.exists():  # reading a pipe or a device might never end
            raise InputError("it is no regular file")
        with Image.open(path, formats=FORMATS) as file:
            check_size(*file.size)
            layout = str(file.tile[0][3]) if file.tile else ""  # Pillow's name of the samples in the file
            file.load()
            orientation = _orientation(file)
            pixels = to_rgb(file, path, TRANSPOSES.get(orientation))
            # Pillow keeps the upper 8 bits of a 16-bit colour: too few where a camera of 14 bits or less uses the lower ones
            if ";16" in layout and file.mode in ("RGB", "RGBA") and 0 < pixels.max() < 64:
                raise InputError("its colours have 16 bits and use 14 or fewer, of which Pillow drops 8; convert it to 8 bits a channel")
            return pixels, orientation
    except FileNotFoundError:
        raise
    except Exception as error:  # what Pillow raises depends on the format and on where a file is damaged
        raise InputError(str(error) or type(error).__name__) from error


def _orientation(file: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) if there is none. Other metadata, however damaged, is not read.

    `ImageOps.exif_transpose` also writes the metadata anew, which fails for tags of unusual types.
    """
    try:
        value = file.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # what Pillow raises depends on where the metadata is damaged
        return 1
    return value if isinstance(value, int) else 1


def _stated_maximum(file: Image.Image) -> int | None:
    """Return the value of white where the file states it for its integer samples."""
    if file.format == "PPM" and file.mode.startswith("I"):
        return 65_535  # Pillow scales a PGM's own maximum to this
    tags = getattr(file, "tag_v2", {})
    stated = tags.get(MAX_SAMPLE_VALUE)
    stated = stated[0] if isinstance(stated, tuple) else stated
    bits = (tags.get(BITS_PER_SAMPLE) or (16,))[0]
    if file.mode.startswith("I") and isinstance(stated, int) and 0 < stated < 2**bits - 1:
        return stated
    return 2**bits - 1 if 8 < bits < 16 else None


def _to_uint8(values: np.ndarray, path: Path | str, maximum: int | None = None) -> np.ndarray:
    """Scale samples of more than 8 bits to 0..255.

    White is `maximum` where the file states it. Otherwise it follows from the largest value: the smallest of 8, 10, 12, 14 and 16 bits
    that holds an integer, the smallest of 1, 255 and 65535 that a float does not exceed, and the largest value itself above these. Black
    is 0. An image with negative values is scaled from its smallest to its largest value. A range that the file does not state is logged.
    """
    values = values.astype(values.dtype.newbyteorder("="))
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError("some of its pixels are NaN or infinite")
    if maximum is not None:
        white = maximum
    elif low < 0:
        white = high
    elif values.dtype.kind == "f":
        white = next((white for white in (1.0, 255.0, 65_535.0) if high <= white), high)
    else:
        white = next((2**bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2**bits), high)
    black, white = min(float(low), 0.0), float(white)
    if maximum is None and not (values.dtype == np.uint16 and white == 65_535) and high > low:
        _warn_of_scaling(f"{values.dtype.name} samples", f"{black:g} to {white:g}", path)
    if white == black:
        return np.zeros(values.shape, np.uint8)
    scaled = (values.astype(np.float64) - black) * (256 / (white - black + (values.dtype.kind != "f")))
    return scaled.clip(0, 255).astype(np.uint8)


def _warn_once(kind: str, message: str, *arguments: object) -> None:
    """Log a warning unless this process has logged one of the same kind; each data-loader worker is a process."""
    if kind not in _warned:
        _warned.add(kind)
        log.warning(message, *arguments)


def _warn_of_scaling(samples: str, scale: str, path: Path | str) -> None:
    _warn_once(
        f"{samples} {scale}",
        "%s has %s and does not say which value is white: %s is scaled to 0 to 255, by the image's own range. Other images of the kind are "
        "scaled without a message. Convert the images to 8 bits if this is wrong.",
        path,
        samples,
        scale,
    )


def _warn_of_unverified_rotation(record: ImageRecord) -> None:
    _warn_once(
        "rotation",
        "%s (image %d) is turned as its EXIF orientation says, and its size does not tell whether its boxes are of the turned image. Other "
        "images of the kind are read without a message. If the boxes are of the image as stored, remove the orientation from the files.",
        record.path,
        record.id,
    )
