"""What holds of results and metrics for any detections; see `tests/conftest.py` for how many are tried."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.ops import box_convert

from roi_quantization.detection.evaluation.coco import evaluate, to_coco_results

from .coco_sets import CAT, DOG, coco, random_set

CATEGORIES = {1: CAT, 2: DOG}
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def detections(draw):
    """Image id -> boxes, scores and labels."""
    noise = torch.Generator().manual_seed(draw(SEEDS))
    counts = draw(st.dictionaries(st.integers(1, 600_000), st.integers(0, 6), max_size=4))
    found = {}
    for image_id, count in counts.items():
        corner, size = torch.rand(count, 2, generator=noise) * 500, torch.rand(count, 2, generator=noise) * 200
        scores, labels = torch.rand(count, generator=noise), torch.randint(1, 3, (count,), generator=noise)
        found[image_id] = {"boxes": torch.cat([corner, corner + size], 1), "scores": scores, "labels": labels}
    return found


@given(detections())
def test_detections_can_be_read_off_their_results(found):
    results = to_coco_results(found, CATEGORIES)
    assert [result["image_id"] for result in results] == sorted(i for i, of_image in found.items() for _ in of_image["scores"])
    for image_id, of_image in found.items():
        of_file = [result for result in results if result["image_id"] == image_id]
        order = of_image["scores"].argsort(descending=True)
        boxes = box_convert(torch.tensor([result["bbox"] for result in of_file]).reshape(-1, 4), "xywh", "xyxy")
        assert_close(boxes, of_image["boxes"][order], rtol=0, atol=2e-3)
        assert_close(torch.tensor([result["score"] for result in of_file]), of_image["scores"][order], rtol=0, atol=1e-6)
        assert [result["category_id"] for result in of_file] == [CATEGORIES[label] for label in of_image["labels"][order].tolist()]


@given(SEEDS)
def test_the_ground_truth_itself_finds_everything(seed):
    annotations, _ = random_set(np.random.default_rng(seed), images=4)
    objects = [a for a in annotations if not a["iscrowd"]]
    assume(objects)
    found = [{**a, "score": 1 - number / 100} for number, a in enumerate(objects)]
    stats = evaluate(coco(*annotations, images=range(1, 5)), found, range(1, 5)).stats
    assert [stats["AP"], stats["AP75"], stats["AR_100"]] == pytest.approx([100, 100, 100])


@given(SEEDS, st.randoms(use_true_random=False))
def test_the_order_of_results_annotations_and_images_does_not_matter(seed, random):
    """Where no two scores of a class are equal."""
    annotations, results = random_set(np.random.default_rng(seed), images=4)
    results = [{**result, "score": 1 - number / 1000} for number, result in enumerate(results)]
    first = evaluate(coco(*annotations, images=range(1, 5)), results, range(1, 5)).as_json()
    shuffled = [random.sample(entries, len(entries)) for entries in (annotations, results, range(1, 5))]
    assert evaluate(coco(*shuffled[0], images=range(1, 5)), shuffled[1], shuffled[2]).as_json() == first
