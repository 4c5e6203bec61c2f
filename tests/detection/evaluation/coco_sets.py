"""Annotations and results small enough to reckon with by hand, and random ones."""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO

CAT, DOG = 3, 17  # category ids; COCO's have gaps as well
BOX = [0, 0, 100, 100]  # 10,000 square pixels: "large"


def annotation(image_id, bbox=BOX, category_id=CAT, **more):
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": 0, **more}


def result(image_id, bbox=BOX, score=0.9, category_id=CAT, **more):
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score, **more}


def coco(*annotations, images=(1, 2, 3)):
    """Annotations that bring no id of their own are numbered from 1."""
    data = COCO()
    data.dataset = {
        "images": [{"id": i, "width": 640, "height": 480, "file_name": f"{i}.jpg"} for i in images],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
        "annotations": [{"id": number, **a} for number, a in enumerate(annotations, 1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        data.createIndex()
    return data


def random_set(rng: np.random.Generator, images=12):
    """(annotations, results) with crowd regions, missed and twice-found objects, false detections, and scores that many images share."""
    annotations, results = [], []
    for image_id in range(1, images + 1):
        scores = iter((rng.permutation(20) / 20).tolist())
        for _ in range(rng.integers(0, 4)):
            category_id = int(rng.choice([CAT, CAT, CAT, DOG]))
            box = np.concatenate([rng.uniform(0, 300, 2), rng.uniform(20, 150, 2)])
            annotations.append(annotation(image_id, box.tolist(), category_id, iscrowd=int(rng.random() < 0.15)))
            for _ in range(rng.integers(0, 3)):
                near = box + rng.normal(0, 6, 4) * [1, 1, 0.5, 0.5]
                results.append(result(image_id, near.tolist(), next(scores), category_id))
        for _ in range(rng.integers(0, 3)):
            false = np.concatenate([rng.uniform(0, 300, 2), rng.uniform(20, 150, 2)])
            results.append(result(image_id, false.tolist(), next(scores), int(rng.choice([CAT, DOG]))))
    return annotations, results
