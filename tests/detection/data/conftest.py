"""A data set of three images small enough to know by heart."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from roi_quantization.detection.data.proposals.grid import Grid


class SmallSet:
    """A folder in COCO's layout; `change` edits the instances json."""

    def __init__(self, root: Path):
        self.images, self.annotations = root / "images", root / "instances.json"
        self.images.mkdir()
        rng = np.random.default_rng(0)
        for name in ("a.png", "b.png", "c.png"):
            Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(self.images / name)
        self.instances = {
            "images": [{"id": i, "file_name": f, "width": 60, "height": 40} for i, f in ((7, "a.png"), (3, "b.png"), (5, "c.png"))],
            "annotations": [
                {"id": 1, "image_id": 7, "category_id": 90, "bbox": [10.5, 5, 20, 10.25], "area": 150.0, "iscrowd": 0},
                {"id": 2, "image_id": 7, "category_id": 4, "bbox": [50, 30, 20, 20], "area": 100.0, "iscrowd": 0},  # sticks out
                {"id": 3, "image_id": 7, "category_id": 4, "bbox": [0, 0, 30, 30], "area": 900.0, "iscrowd": 1},
                {"id": 4, "image_id": 3, "category_id": 17, "bbox": [1, 2, 3, 4], "area": 12.0, "iscrowd": 0},
            ],
            "categories": [{"id": 90, "name": "brush"}, {"id": 4, "name": "plane"}, {"id": 17, "name": "cat"}],
        }
        self.write()

    def write(self) -> None:
        self.annotations.write_text(json.dumps(self.instances))

    def change(self, section: str, number: int, **values) -> None:
        self.instances[section][number] |= values
        self.write()

    @property
    def paths(self) -> dict:
        return {"images": self.images, "annotations": self.annotations, "proposals": Grid([0.5])}


@pytest.fixture
def small_set(tmp_path: Path) -> SmallSet:
    return SmallSet(tmp_path)
