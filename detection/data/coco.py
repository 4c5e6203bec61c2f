"""A detection data set in COCO's layout: a folder of images and an instances json."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from roi_quantization.detection.common.errors import InputError, MissingFileError
from roi_quantization.detection.data import plausibility
from roi_quantization.detection.data.annotations import LAYOUT, as_coco, choose_classes, choose_images, read_instances, restrict
from roi_quantization.detection.data.images import ImageRecord, read_image
from roi_quantization.detection.data.masks import to_masks
from roi_quantization.detection.data.proposals.provider import ProposalProvider
from roi_quantization.detection.data.transforms import seeded_rng


class CocoDetection(Dataset):
    """Images with their boxes, crowd regions and proposals.

    An item is `(image, target)`: image uint8 RGB `3 x H x W`, neither normalised nor padded, and a target with
        boxes      float32 [G, 4]   the objects
        labels     int64 [G]        1..C in ascending order of category id; 0 is background
        crowd      float32 [M, 4]   crowd regions: neither object nor background
        proposals  float32 [L, 4]   candidate windows
        image_id   int
        original_size  (height, width) of the upright image (after its EXIF orientation)
    and, with `masks`, the pixels of each object:
        masks      uint8 [G, H, W]  1 inside
    and, where `features` is set, the cached map of a frozen backbone, for which the image has no pixels but its size:
        features   float16 [C, H, W]
    All boxes are `(x1, y1, x2, y2)` in pixels of the returned image, that is after `transform`.

    Args:
        images: folder of the images.
        annotations: the instances json.
        proposals: provider of the candidate windows.
        part: two shares, such as (0.8, 1): use that part of the images, in an order shuffled with `subset_seed`. Parts that do not
            overlap have no image in common.
        transform: applied to the image and all boxes.
        subset: number of images to use, drawn with `subset_seed`.
        ids: images to use: a list of ids, or a text file of them. Excludes `subset`.
        subset_seed: seeds `part` and `subset`.
        keep_empty: keep images without objects.
        seed: seeds, with the epoch (`set_epoch`) and the image id, the random transforms.
        classes: names of the categories to use; objects of others are background. None: all.
        masks: read the segmentations too, of which each annotation needs one.

    Raises:
        FileNotFoundError: the folder, the json or an image is missing.
        ValueError: the json is not valid, or nothing is left to use.
    """

    def __init__(
        self,
        images: Path | str,
        annotations: Path | str,
        proposals: ProposalProvider,
        part: tuple[float, float] | None = None,
        transform: Callable | None = None,
        subset: int | None = None,
        ids: Sequence[int] | Path | str | None = None,
        subset_seed: int = 0,
        keep_empty: bool = True,
        seed: int = 0,
        classes: Sequence[str] | None = None,
        masks: bool = False,
    ):
        folder = Path(images)
        if not folder.is_dir():
            raise MissingFileError(f"{folder} is not a folder of images.\n{LAYOUT}")
        instances = choose_classes(read_instances(annotations, masks), classes)
        self._content = _hash(annotations)
        self.image_ids = choose_images(instances, part, keep_empty, subset, ids, subset_seed)
        if not self.image_ids:
            raise InputError(f"{annotations} has no images to use.")

        instances = restrict(instances, self.image_ids)
        self._annotations, self._classes, self.masks = annotations, classes, masks
        self.categories = sorted(({"id": c["id"], "name": c["name"]} for c in instances["categories"]), key=lambda c: c["id"])
        self.label_to_category_id = {label: category["id"] for label, category in enumerate(self.categories, start=1)}
        self.records = [
            ImageRecord(image["id"], folder / image["file_name"], image["width"], image["height"]) for image in instances["images"]
        ]
        _check_files(self.records, folder)
        plausibility.report(plausibility.judge_instances(instances), annotations)
        self._index_boxes(instances)
        self.proposals = proposals
        proposals.prepare(self.records)
        self.transform = transform
        self.seed = seed
        self.features: Callable[[ImageRecord, bool], Tensor] | None = None  # `(image, flipped)` -> its map
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared, so that persistent workers see it change

    def _index_boxes(self, instances: dict) -> None:
        """Store all boxes in flat arrays, whose memory data-loader workers share, unlike that of small Python objects."""
        annotations = instances["annotations"]
        label_of = {category_id: label for label, category_id in self.label_to_category_id.items()}
        index_of = {image_id: index for index, image_id in enumerate(self.image_ids)}
        indices = np.array([index_of[annotation["image_id"]] for annotation in annotations], dtype=np.int64)
        order = np.argsort(indices, kind="stable")
        sizes = np.array([(r.width, r.height, r.width, r.height) for r in self.records])
        boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        self._boxes = np.clip(boxes, 0, sizes[indices]).astype(np.float32)[order]
        self._labels = np.array([label_of[annotation["category_id"]] for annotation in annotations], dtype=np.int64)[order]
        self._is_crowd = np.array([annotation["iscrowd"] for annotation in annotations], dtype=bool)[order]
        self._starts = np.searchsorted(indices[order], np.arange(len(self.image_ids) + 1))
        if self.masks:
            texts = [json.dumps(annotations[row]["segmentation"]).encode() for row in order]
            self._segmentations, self._segmentation_starts = b"".join(texts), np.cumsum([0, *map(len, texts)])

    @property
    def num_objects(self) -> int:
        """The number of objects; crowd regions are none."""
        return int((~self._is_crowd).sum())

    @property
    def categories_without_objects(self) -> list[str]:
        """The names of the categories that no object has."""
        present = set(self._labels[~self._is_crowd].tolist())
        return [category["name"] for label, category in enumerate(self.categories, start=1) if label not in present]

    @cached_property
    def coco(self) -> COCO:
        """The annotations of these images as they are in the file, for COCOeval.

        Read on first access, because those of COCO's training set take 600 MB and training does not use them.

        Raises:
            InputError: the file has changed since, so that detections would be compared with other objects or classes.
        """
        if _hash(self._annotations) != self._content:
            raise InputError(
                f"{self._annotations} has changed since this program began: detections would be compared with other objects or classes. "
                "Restore it, and go on with the same command and resume=auto, or with `python eval.py ckpt=...`"
            )
        return as_coco(restrict(choose_classes(read_instances(self._annotations, self.masks), self._classes), self.image_ids))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which seeds the random transforms together with `seed` and the image id."""
        self._epoch.fill_(epoch)

    def ground_truth(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return `boxes [G, 4]`, `labels [G]` and `crowd [M, 4]` of an image, in pixels of the upright image."""
        rows = slice(self._starts[index], self._starts[index + 1])
        crowd = self._is_crowd[rows]
        arrays = self._boxes[rows][~crowd], self._labels[rows][~crowd], self._boxes[rows][crowd]
        return tuple(torch.from_numpy(array) for array in arrays)

    def segmentations(self, index: int) -> list:
        """Return the segmentations of the objects of an image, in the order of `ground_truth`. None are known without `masks`."""
        rows = range(self._starts[index], self._starts[index + 1]) if self.masks else ()
        spans = [slice(*self._segmentation_starts[row : row + 2]) for row in rows if not self._is_crowd[row]]
        return [json.loads(self._segmentations[span]) for span in spans]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        record = self.records[index]
        size = (record.height, record.width)
        boxes, labels, crowd = self.ground_truth(index)
        in_image = {"boxes": boxes, "crowd": crowd, "proposals": self.proposals(record)}
        target = {name: tv_tensors.BoundingBoxes(value, format="XYXY", canvas_size=size) for name, value in in_image.items()}
        if self.masks:
            target["masks"] = tv_tensors.Mask(to_masks(self.segmentations(index), *size))
        if self.features is None:
            image, target = self._transform(record, tv_tensors.Image(read_image(record, has_boxes=True)), target)
            image = image.as_subclass(Tensor)
        else:
            corner = tv_tensors.BoundingBoxes([[0.0, 0.0, 1.0, 1.0]], format="XYXY", canvas_size=size)  # tells whether it was flipped
            corner, target = self._transform(record, corner, target)
            image = torch.zeros(1, dtype=torch.uint8).expand(3, *corner.canvas_size)  # takes no memory
            target["features"] = self.features(record, bool(corner[0, 0] > 0))
        plain = {name: value.as_subclass(Tensor) for name, value in target.items()}
        return image, plain | {"labels": labels, "image_id": record.id, "original_size": size}

    def _transform(self, record: ImageRecord, image: tv_tensors.TVTensor, target: dict) -> tuple[tv_tensors.TVTensor, dict]:
        if self.transform is None:
            return image, target
        with seeded_rng(self.seed, int(self._epoch), record.id):
            return self.transform(image, target)


def collate(items: list[tuple[Tensor, dict]]) -> tuple[list[Tensor], list[dict]]:
    """Collate items into a list of images and a list of targets. The detector pads the images, whose sizes differ."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)


def _hash(path: Path | str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).digest()


def _check_files(records: list[ImageRecord], folder: Path) -> None:
    folders = {record.path.parent for record in records}
    present = {parent: set(os.listdir(parent)) for parent in folders if parent.is_dir()}
    missing = [record for record in records if record.path.name not in present.get(record.path.parent, ())]
    if missing:
        name = str(missing[0].path.relative_to(folder))
        raise MissingFileError(
            f"{len(missing)} of the {len(records)} images of the annotations are not in {folder}; the first is {name} (image "
            f"{missing[0].id}). {_remedy(name, folder)}"
        )


def _remedy(name: str, folder: Path) -> str:
    """Say what to do about a file_name that is not in the folder of images: it may be from Windows, or begin with a folder."""
    path = PureWindowsPath(name)  # either slash divides it
    if len(path.parts) == 1:
        return "Is the archive unpacked as a whole, and do images and annotations belong together?"
    slashes = "Its file_name has backslashes: write / in the place of each. " if "\\" in name else ""
    found = []
    if above := next((parent.resolve() for parent in folder.absolute().parents if (parent / path.as_posix()).is_file()), None):
        found.append(f"{path.as_posix()} is in {above}: set data.<split>.images={above}")
    if (folder / path.name).is_file():
        found.append(f"{path.name} is there: remove the folder from file_name")
    return slashes + (", or ".join(found) or "Do images and annotations belong together?")
