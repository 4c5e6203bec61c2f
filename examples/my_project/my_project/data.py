"""The data: discs and squares, drawn into a folder in COCO's layout. Images of your own are there already and need no code."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CATEGORIES = [{"id": 1, "name": "disc"}, {"id": 2, "name": "square"}]


def draw(root: Path, train: int, val: int, image_size: int) -> None:
    """Write `train` and `val` images unless the folder is there.

    Args:
        root: the folder of the data set.
        train, val: number of images.
        image_size: height and width in pixels.
    """
    if root.exists():
        return
    for seed, (split, count) in enumerate({"train": train, "val": val}.items()):
        (root / split).mkdir(parents=True)
        rng = np.random.default_rng(seed)
        images, annotations = [], []
        for image_id in range(1, count + 1):
            image = Image.new("RGB", (image_size, image_size), tuple(rng.integers(0, 100, 3).tolist()))
            category, side = int(rng.integers(1, 3)), int(rng.integers(image_size // 4, image_size // 2))
            x, y = rng.integers(0, image_size - side, 2).tolist()
            shape = ImageDraw.Draw(image).ellipse if category == 1 else ImageDraw.Draw(image).rectangle
            shape((x, y, x + side - 1, y + side - 1), fill=tuple(rng.integers(150, 256, 3).tolist()))
            image.save(root / split / f"{image_id}.png")
            images.append({"id": image_id, "file_name": f"{image_id}.png", "width": image_size, "height": image_size})
            annotations.append({"id": image_id, "image_id": image_id, "category_id": category, "bbox": [x, y, side, side]})
        (root / "annotations").mkdir(exist_ok=True)
        instances = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(instances))
