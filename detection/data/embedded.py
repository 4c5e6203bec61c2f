"""The embedded set: synthetic shapes on textured background, written in COCO's layout and read by the code that reads COCO.

Boxes are the exact float bounding boxes of the shapes, not rounded to pixels, because the set shows what rounding costs. Images are
256 x 256 pixels and objects 32 to 128 pixels: 2 to 8 cells at stride 16, where an error of a quarter of a cell changes AP75.
"""

import json
import logging
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image, ImageDraw
from tqdm import tqdm

from roi_quantization.detection.common.files import CACHE_REMEDY, NotWrittenError

log = logging.getLogger(__name__)

STAMP = "complete.json"
DRAWING_VERSION = 3  # increment it when the same settings write other files, so that existing sets are replaced
SUPERSAMPLING = 4


def _regular(corners: int, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
    """Return a polygon around the origin, first corner at the top, with corners at alternating radii."""
    angles = 2 * np.pi * np.arange(corners) / corners - np.pi / 2
    radius = np.resize(radii, corners)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _inside_unit(outline: np.ndarray, *holes: np.ndarray) -> list[np.ndarray]:
    """Translate and scale polygons so that the bounding box of the outline is [-1, 1] x [-1, 1]."""
    low, high = outline.min(axis=0), outline.max(axis=0)
    return [2 * (polygon - low) / (high - low) - 1 for polygon in (outline, *holes)]


# Category ids have gaps, as in COCO, so that code which confuses labels and category ids fails.
SHAPES: dict[int, tuple[str, list[np.ndarray]]] = {
    2: ("disc", _inside_unit(_regular(96))),
    3: ("ring", _inside_unit(_regular(96), 0.55 * _regular(96))),
    7: ("square", _inside_unit(np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]))),
    11: ("triangle", _inside_unit(_regular(3))),
    18: ("star", _inside_unit(_regular(10, (1.0, 0.45)))),
}


@dataclass(frozen=True)
class EmbeddedSet:
    """Settings of the embedded set; a call writes the set to a folder. Lengths are in pixels, colours 0 to 255.

    Args:
        train, val, test: number of images of each split; the splits are drawn independently.
        image_size: side of the square images.
        objects: smallest and largest number of objects of an image.
        sides: smallest and largest value of an object's longer side, log-uniform.
        stretch: largest ratio of the two sides, before rotation.
        rotation: largest rotation in either direction, in degrees.
        overlap: largest share of the smaller of two boxes that the other covers.
        contrast: smallest difference of an object to the background under it, in the colour channel where they differ most.
        texture: strength of the cloud pattern of the background.
        noise: standard deviation of the pixel noise.
        lines, blobs: largest number of lines and small blobs of clutter, behind the objects.
        seed: seeds all draws.
    """

    train: int = 400
    val: int = 100
    test: int = 100
    image_size: int = 256
    objects: tuple[int, int] = (1, 5)
    sides: tuple[float, float] = (32.0, 128.0)
    stretch: float = 1.4
    rotation: float = 15.0
    overlap: float = 0.05
    contrast: float = 70.0
    texture: float = 25.0
    noise: float = 1.5
    lines: int = 5
    blobs: int = 10
    seed: int = 0

    def __call__(self, root: Path | str) -> None:
        """Write the set to `root` unless it is there already. A set that an older version drew is replaced.

        Raises:
            FileExistsError: `root` holds a set with other settings, which another training may be using, or something else.
            NotWrittenError: the set cannot be written.
        """
        root = Path(root)
        if root.exists() and any(root.iterdir()):
            found, wanted = _read_stamp(root), self._stamp()
            if "drawing" not in found:
                raise FileExistsError(f"{root} holds something else than an embedded set (no {STAMP} of one); choose another data.root.")
            if found == wanted:
                return
            differences = [
                f"{key} is {found.get(key)} there and {wanted[key]} here" for key in asdict(self) if found.get(key) != wanted[key]
            ]
            if differences:
                raise FileExistsError(
                    f"{root} holds an embedded set with other settings: {'; '.join(differences)}. Choose another folder, such as "
                    f"data.root={root}_2, or remove that set if it is no longer used."
                )
            log.warning("The set in %s was drawn by an older version and is replaced.", root)
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(root.parent / f".{root.name}.lock"):
                if not self._is_at(root):  # another process may have written it while this one waited for the lock
                    self._make(root)
        except OSError as error:
            raise NotWrittenError(root, error, CACHE_REMEDY) from error

    def _make(self, root: Path) -> None:
        """Write the set beside `root` and rename it, so that `root` never holds an incomplete set."""
        beside = Path(tempfile.mkdtemp(prefix=f"{root.name}.partial.", dir=root.parent))
        try:
            self._write(beside / "new")
            if root.exists():
                os.replace(root, beside / "old")
            os.replace(beside / "new", root)
        finally:
            shutil.rmtree(beside)

    def _is_at(self, root: Path) -> bool:
        return _read_stamp(root) == self._stamp()

    def _stamp(self) -> dict:
        return json.loads(json.dumps({"drawing": DRAWING_VERSION, **asdict(self)}, default=list))  # json turns tuples into lists

    def _write(self, root: Path) -> None:
        (root / "annotations").mkdir(parents=True)
        categories = [{"id": category_id, "name": name} for category_id, (name, _) in SHAPES.items()]
        for number, split in enumerate(("train", "val", "test")):
            count = getattr(self, split)
            (root / split).mkdir()
            with ThreadPoolExecutor() as pool:
                drawn = pool.map(partial(self._write_image, root / split, number), range(count))
                pairs = list(tqdm(drawn, total=count, desc=f"drawing {split}", leave=False))
            annotations = [{"id": i, **a} for i, a in enumerate((a for _, found in pairs for a in found), start=1)]
            instances = {"images": [image for image, _ in pairs], "annotations": annotations, "categories": categories}
            (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(instances))
        (root / STAMP).write_text(json.dumps(self._stamp()))

    def _write_image(self, folder: Path, split: int, index: int) -> tuple[dict, list[dict]]:
        image_id = 100_000 * split + index + 1  # unique over all splits
        pixels, objects = self.draw(np.random.default_rng([self.seed, split, index]))
        name = f"{image_id:06d}.bmp"  # noise hardly compresses: a PNG has half the size and takes twenty times as long to read
        Image.fromarray(pixels).save(folder / name)
        image = {"id": image_id, "file_name": name, "width": self.image_size, "height": self.image_size}
        return image, [{"image_id": image_id, "iscrowd": 0, **entry} for entry in objects]

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, list[dict]]:
        """Draw one image.

        Returns:
            The image, uint8 `S x S x 3`, and its objects: dicts of category_id, bbox `[x, y, width, height]`, and area and segmentation of
            the shape.
        """
        canvas = self._draw_background(rng)
        self._draw_clutter(canvas, rng)
        objects, boxes = [], []
        for _ in range(rng.integers(self.objects[0], self.objects[1] + 1)):
            category_id = int(rng.choice(list(SHAPES)))
            polygons, box = self._place_shape(SHAPES[category_id][1], boxes, rng)
            if box is None:
                continue  # the image is full; the first object always fits
            self._draw_shape(canvas, polygons, rng)
            boxes.append(box)
            area = _area(polygons[0]) - sum(_area(hole) for hole in polygons[1:])
            bbox = [*box[:2], *(box[2:] - box[:2])]
            entry = {"category_id": category_id, "bbox": [round(float(v), 3) for v in bbox], "area": round(area, 3)}
            objects.append(entry | {"segmentation": [_one_polygon(polygons).ravel().round(3).tolist()]})
        canvas += self.noise * rng.standard_normal(canvas.shape, dtype=np.float32)
        return np.clip(canvas + 0.5, 0, 255).astype(np.uint8), objects

    def _draw_background(self, rng: np.random.Generator) -> np.ndarray:
        """Draw a colour gradient with clouds at two scales."""
        y, x = np.mgrid[: self.image_size, : self.image_size].astype(np.float32) / self.image_size
        angle = rng.uniform(0, 2 * np.pi)
        along = 0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
        start = rng.uniform(40, 215, 3)
        end = np.clip(start + rng.uniform(-60, 60, 3), 20, 235)
        clouds = sum(_clouds(cells, self.image_size, rng) for cells in (6, 20))
        return (start + along[..., None] * (end - start) + self.texture * clouds[..., None]).astype(np.float32)

    def _draw_clutter(self, canvas: np.ndarray, rng: np.random.Generator) -> None:
        size = self.image_size
        for _ in range(rng.integers(0, self.lines + 1)):
            start, end = rng.uniform(0, size, (2, 2))
            along = (end - start) / max(np.linalg.norm(end - start), 1)
            across = np.array([-along[1], along[0]]) * rng.uniform(0.5, 1.5)
            _blend(canvas, [np.array([start - across, end - across, end + across, start + across])], rng.uniform(0, 255, 3))
        for _ in range(rng.integers(0, self.blobs + 1)):
            _blend(canvas, [rng.uniform(0, size, 2) + rng.uniform(2, 6, 2) * _regular(16)], rng.uniform(0, 255, 3))

    def _place_shape(
        self, shape: list[np.ndarray], taken: list[np.ndarray], rng: np.random.Generator
    ) -> tuple[list[np.ndarray], np.ndarray | None]:
        """Return the shape at a random size, rotation and free position, and its bounding box; None if no position is free."""
        for _ in range(50):
            side = np.exp(rng.uniform(*np.log(self.sides)))
            ratio = np.exp(rng.uniform(-1, 1) * np.log(self.stretch))
            angle = np.deg2rad(rng.uniform(-self.rotation, self.rotation))
            turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            polygons = [polygon * (ratio**0.5, ratio**-0.5) @ turn for polygon in shape]
            scale = side / np.ptp(polygons[0], axis=0).max()
            low, high = polygons[0].min(axis=0) * scale, polygons[0].max(axis=0) * scale
            centre = rng.uniform(-low, self.image_size - high)
            box = np.concatenate([low + centre, high + centre])
            if all(_overlap(box, other) <= self.overlap for other in taken):
                return [polygon * scale + centre for polygon in polygons], box
        return [], None

    def _draw_shape(self, canvas: np.ndarray, polygons: list[np.ndarray], rng: np.random.Generator) -> None:
        (x1, y1), (x2, y2) = polygons[0].min(axis=0).astype(int), polygons[0].max(axis=0).astype(int)
        background = canvas[y1:y2, x1:x2].mean(axis=(0, 1))
        colour = rng.uniform(0, 255, 3)
        while np.abs(colour - background).max() < self.contrast:
            colour = rng.uniform(0, 255, 3)
        _blend(canvas, polygons, colour)


def _read_stamp(root: Path) -> dict:
    """Return the settings stored in a folder; an empty dict if it is not an embedded set."""
    try:
        stamp = json.loads((root / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _clouds(cells: int, size: int, rng: np.random.Generator) -> np.ndarray:
    coarse = rng.standard_normal((cells, cells), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)) / 2


def _blend(canvas: np.ndarray, polygons: list[np.ndarray], colour: np.ndarray) -> None:
    """Draw the first polygon without the others, antialiased: the colour is weighted by the share of a pixel that the shape covers."""
    size = canvas.shape[0]
    x1, y1 = np.clip(np.floor(polygons[0].min(axis=0)).astype(int), 0, size - 1)
    x2, y2 = np.clip(np.ceil(polygons[0].max(axis=0)).astype(int), 1, size)
    mask = Image.new("L", ((x2 - x1) * SUPERSAMPLING, (y2 - y1) * SUPERSAMPLING))
    for polygon, fill in zip(polygons, (255, *[0] * (len(polygons) - 1)), strict=True):
        # Pillow's pixel centres are at integers, ours at integers + 0.5
        ImageDraw.Draw(mask).polygon([tuple(point) for point in (polygon - (x1, y1)) * SUPERSAMPLING - 0.5], fill=fill)
    coverage = np.asarray(mask.reduce(SUPERSAMPLING), dtype=np.float32)[..., None] / 255
    patch = canvas[y1:y2, x1:x2]
    patch += coverage * (colour.astype(np.float32) - patch)


def _area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)


def _one_polygon(polygons: list[np.ndarray]) -> np.ndarray:
    """Return the first polygon without the others as one, as COCO's polygons have no holes: a cut leads to each hole and back."""
    outline, *holes = polygons
    return np.concatenate([outline, *(np.concatenate([outline[:1], hole[:1], hole[::-1]]) for hole in holes)])


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the share of the smaller box that the other one covers."""
    overlap = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return float(overlap / min(np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2])))
