"""A data set in COCO's layout: a folder of images and an instances json."""

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from roi_quantization.detection.data.annotations import LAYOUT, as_coco, choose_images, read_instances, restrict
from roi_quantization.detection.data.images import ImageRecord, read_image
from roi_quantization.detection.data.proposals.provider import ProposalProvider
from roi_quantization.detection.data.transforms import seeded_rng


class CocoDetection(Dataset):
    """Images with their boxes, crowd regions and proposals.

    An item is `(image, target)`: image uint8 RGB `3 x H x W`, neither normalised nor padded, and a target with
        boxes      float32 [G, 4]   objects to be found
        labels     int64 [G]        1..C in ascending order of category id; 0 is background
        crowd      float32 [M, 4]   regions in which objects were not told apart: neither object nor background
        proposals  float32 [L, 4]   candidate windows
        image_id   int
        original_size  (height, width) of the file
    All boxes are `(x1, y1, x2, y2)` in pixels of the image as returned, that is after `transform`.

    `part`, two shares such as (0.8, 1), takes that part of the images, in an order shuffled with `subset_seed`: what one set holds out
    another can be. `subset` (how many images, drawn with `subset_seed`) or `ids` (which; a list or a text file) restrict the set further;
    `keep_empty=False` leaves out images without objects. `seed` and the epoch (`set_epoch`) decide what random transforms draw.
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
    ):
        folder = Path(images)
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder of images at {folder}.\n{LAYOUT}")
        instances = read_instances(annotations)
        self.image_ids = choose_images(instances, part, keep_empty, subset, ids, subset_seed)
        if not self.image_ids:
            raise ValueError(f"{annotations} has no images to use.")

        instances = restrict(instances, self.image_ids)
        self._annotations = annotations
        self.categories = sorted(({"id": c["id"], "name": c["name"]} for c in instances["categories"]), key=lambda c: c["id"])
        self.label_to_category_id = {label: category["id"] for label, category in enumerate(self.categories, start=1)}
        self.records = [
            ImageRecord(image["id"], folder / image["file_name"], image["width"], image["height"]) for image in instances["images"]
        ]
        _check_files(self.records, folder)
        self._index_boxes(instances["annotations"])
        self.proposals = proposals
        proposals.prepare(self.records)
        self.transform = transform
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared: workers that live on see the epoch change

    def _index_boxes(self, annotations: list[dict]) -> None:
        """Puts all boxes into flat arrays: workers can share these, which they cannot do with millions of small Python objects."""
        label_of = {category_id: label for label, category_id in self.label_to_category_id.items()}
        place = {image_id: index for index, image_id in enumerate(self.image_ids)}
        places = np.array([place[annotation["image_id"]] for annotation in annotations], dtype=np.int64)
        order = np.argsort(places, kind="stable")
        sizes = np.array([(r.width, r.height, r.width, r.height) for r in self.records])
        boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        self._boxes = np.clip(boxes, 0, sizes[places]).astype(np.float32)[order]
        self._labels = np.array([label_of[annotation["category_id"]] for annotation in annotations], dtype=np.int64)[order]
        self._is_crowd = np.array([annotation["iscrowd"] for annotation in annotations], dtype=bool)[order]
        self._starts = np.searchsorted(places[order], np.arange(len(self.image_ids) + 1))

    @cached_property
    def coco(self) -> COCO:
        """The annotations of exactly these images as the file has them, for COCOeval.

        Read when first asked for, which training never does: of COCO's training set they take 600 MB.
        """
        return as_coco(restrict(read_instances(self._annotations), self.image_ids))

    def set_epoch(self, epoch: int) -> None:
        """Random transforms draw anew in each epoch, and alike in the same epoch of the same seed."""
        self._epoch.fill_(epoch)

    def annotated(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """`boxes [G, 4]`, `labels [G]` and `crowd [M, 4]` of an image, in pixels of the file."""
        here = slice(self._starts[index], self._starts[index + 1])
        crowd = self._is_crowd[here]
        arrays = self._boxes[here][~crowd], self._labels[here][~crowd], self._boxes[here][crowd]
        return tuple(torch.from_numpy(array) for array in arrays)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        record = self.records[index]
        size = (record.height, record.width)
        boxes, labels, crowd = self.annotated(index)
        in_image = {"boxes": boxes, "crowd": crowd, "proposals": self.proposals(record)}
        target = {name: tv_tensors.BoundingBoxes(value, format="XYXY", canvas_size=size) for name, value in in_image.items()}
        image = tv_tensors.Image(read_image(record))
        if self.transform is not None:
            with seeded_rng(self.seed, int(self._epoch), record.id):
                image, target = self.transform(image, target)
        plain = {name: value.as_subclass(Tensor) for name, value in target.items()}
        return image.as_subclass(Tensor), plain | {"labels": labels, "image_id": record.id, "original_size": size}


def collate(items: list[tuple[Tensor, dict]]) -> tuple[list[Tensor], list[dict]]:
    """A batch is a list of images and a list of targets: sizes differ, and padding is the detector's affair."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)


def _check_files(records: list[ImageRecord], folder: Path) -> None:
    folders = {record.path.parent for record in records}
    present = {parent: set(os.listdir(parent)) for parent in folders if parent.is_dir()}
    missing = [record for record in records if record.path.name not in present.get(record.path.parent, ())]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(records)} images of the annotations are not in {folder}; the first is {missing[0].path.name} "
            f"(image {missing[0].id}). Is the archive unpacked as a whole, and do images and annotations belong together?"
        )
