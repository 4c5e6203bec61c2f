"""Types of errors on objects and detections small enough to compute by hand, and against the package tidecv."""

import math

import numpy as np
import pytest
from pytest import approx

from roi_quantization.detection.evaluation import error_types
from roi_quantization.detection.evaluation.coco import evaluate
from roi_quantization.detection.evaluation.error_types import ERROR_TYPES, split_matched
from roi_quantization.detection.evaluation.matching import match
from roi_quantization.detection.evaluation.protocol import ALL_SIZES
from tests.detection.evaluation.coco_sets import CAT, DOG, annotation, coco, random_set, result

HALF = 100 * 51 / 101  # AP of half the objects found at precision 1: the recall levels 0, 0.01 ... 0.50
ELSEWHERE = [300, 300, 50, 50]


def overlapping(iou):
    """A box with this IoU with the default box of annotations."""
    return [0, 0, 100, 100 * iou]


def split_errors(gt, results, image_ids, max_detections=100):
    return split_matched(match(gt, results, image_ids, max_detections, {"all": ALL_SIZES}))


def of_two_cats(*detections):
    """Errors with a cat in image 1 and one in image 2, which a detection with score 0.8 finds."""
    return split_errors(coco(annotation(1), annotation(2)), [*detections, result(2, score=0.8)], [1, 2, 3])


def only(**counts):
    return dict.fromkeys(ERROR_TYPES, 0) | counts


@pytest.mark.parametrize(
    ("detection", "counts"),
    [
        (result(1, overlapping(0.3)), only(localisation=1)),
        (result(1, overlapping(0.1)), only(localisation=1)),
        (result(1, overlapping(0.49)), only(localisation=1)),
        (result(1, overlapping(0.5), category_id=DOG), only(classification=1)),
        (result(1, overlapping(0.3), category_id=DOG), only(both=1, missed=1)),
        (result(1, overlapping(0.1), category_id=DOG), only(background=1, missed=1)),
        (result(1, ELSEWHERE), only(background=1, missed=1)),
        (result(3), only(background=1, missed=1)),
    ],
)
def test_the_type_of_one_error(detection, counts):
    assert of_two_cats(detection).counts == counts


def test_a_moved_detection_finds_its_object():
    """Before: a false positive, then an object, so precision 1/2 up to recall 1/2."""
    for detection, error in [
        (result(1, overlapping(0.3)), "localisation"),
        (result(1, overlapping(0.6), category_id=DOG), "classification"),
    ]:
        split = of_two_cats(detection)
        before = HALF / 2 if error == "localisation" else HALF  # dogs do not stand in the ranking of the cats
        assert split.ap50 == approx(before)
        assert split.gains == approx(only(**{error: 100 - before}))


def test_a_background_detection_is_removed_and_a_missed_object_too():
    split = of_two_cats(result(1, ELSEWHERE))
    assert split.ap50 == approx(HALF / 2)
    assert split.gains == approx(only(background=HALF / 2, missed=50 - HALF / 2))  # precision 1/2 at every recall


def test_the_second_detection_of_an_object_is_a_duplicate():
    """In the ranking: the object of image 1, its duplicate, the object of image 2; precision 1 up to recall 1/2, then 2/3."""
    split = of_two_cats(result(1, score=0.95), result(1, overlapping(0.7), score=0.9))
    assert split.counts == only(duplicate=1)
    assert split.gains == approx(only(duplicate=100 - (51 + 50 * 2 / 3) / 1.01))


def test_of_two_errors_of_an_object_the_one_with_the_higher_score_is_moved():
    split = of_two_cats(result(1, overlapping(0.3), score=0.85), result(1, overlapping(0.6), score=0.9, category_id=DOG))
    assert split.counts == only(localisation=1, classification=1)
    both_found = (51 + 50 * 2 / 3) / 1.01  # the ranking of the cats: found, false, found
    assert split.gains == approx(only(localisation=HALF / 2, classification=both_found - HALF / 2))


def test_an_error_at_a_found_object_is_removed():
    split = of_two_cats(result(2, overlapping(0.3), score=0.9))
    assert split.counts == only(localisation=1, missed=1)
    assert split.gains["localisation"] == approx(HALF / 2)


def test_what_a_crowd_region_absorbs_is_no_error():
    gt = coco(annotation(1), annotation(1, [200, 0, 100, 100], iscrowd=1))
    split = split_errors(gt, [result(1, score=0.8), result(1, [210, 10, 50, 50]), result(1, [210, 10, 50, 50], category_id=DOG)], [1])
    assert split.counts == only(background=1)  # the dog: a crowd region absorbs detections of its class
    assert split.ap50 == 100


def test_detections_beyond_the_limit_are_not_counted():
    gt = coco(annotation(1))
    results = [result(1, score=0.8), *(result(1, ELSEWHERE, score=0.1) for _ in range(5))]
    assert split_errors(gt, results, [1], max_detections=3).counts == only(background=2)


def test_without_objects_or_detections():
    without_objects = split_errors(coco(), [result(1)], [1])
    assert without_objects.counts == only(background=1)
    assert math.isnan(without_objects.ap50)
    without_detections = split_errors(coco(annotation(1), annotation(1, ELSEWHERE, DOG)), [], [1])
    assert (without_detections.ap50, without_detections.counts) == (0, only(missed=2))
    assert math.isnan(without_detections.gains["missed"])
    dog_missed = split_errors(coco(annotation(1), annotation(1, ELSEWHERE, DOG)), [result(1)], [1])
    assert dog_missed.gains == approx(only(missed=50))  # of the two classes one is left


@pytest.mark.parametrize("seed", range(5))
def test_on_random_sets(seed):
    """AP50 is COCOeval's, and no correction lowers it."""
    annotations, results = random_set(np.random.default_rng(seed))
    ids = range(1, 13)
    gt = coco(*annotations, images=ids)
    split = split_errors(gt, results, ids)
    assert split.ap50 == approx(evaluate(gt, results, ids).stats["AP50"])
    assert min(split.gains.values()) >= 0


# --- tidecv


def set_without_crowds(seed):
    """(annotations, results) with errors of all types and different scores. Among equal ones tidecv changes the order."""
    rng = np.random.default_rng(seed)
    annotations, results = random_set(rng, images=40)
    results = [
        {
            **one,
            "score": (1000 * one["score"] + rng.random()) / 1001,
            "category_id": CAT + DOG - one["category_id"] if rng.random() < 0.2 else one["category_id"],
        }
        for one in results
    ]
    return [{**one, "iscrowd": 0} for one in annotations], results


def test_values_of_tidecv():
    """Recorded from tidecv 1.0.1."""
    annotations, results = set_without_crowds(2)
    split = split_errors(coco(*annotations, images=range(1, 41)), results, range(1, 41))
    assert split.ap50 == approx(26.635668)
    assert tuple(split.counts.values()) == (8, 8, 5, 12, 30, 19)
    assert tuple(split.gains.values()) == approx((8.878118, 5.460596, 2.371556, 2.468713, 10.087586, 10.504402), abs=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_against_tidecv(seed, monkeypatch):
    tidecv = pytest.importorskip("tidecv")
    errors = pytest.importorskip("tidecv.errors.main_errors")
    names = ("ClassError", "BoxError", "OtherError", "DuplicateError", "BackgroundError", "MissedError")
    types = {error: getattr(errors, name) for error, name in zip(ERROR_TYPES, names, strict=True)}
    annotations, results = set_without_crowds(seed)
    truth, detections = tidecv.Data("truth"), tidecv.Data("detections")
    for image in range(1, 41):
        truth.add_image(image, f"{image}")
    for one in annotations:
        truth.add_ground_truth(one["image_id"], one["category_id"], one["bbox"])
    for one in results:
        detections.add_detection(one["image_id"], one["category_id"], one["score"], one["bbox"])
    run = tidecv.TIDE().evaluate(truth, detections, mode=tidecv.TIDE.BOX)

    monkeypatch.setattr(error_types, "_RECALLS", np.arange(101) / 100)  # COCO's levels differ from tidecv's in their last bit
    split = split_errors(coco(*annotations, images=range(1, 41)), results, range(1, 41))
    assert split.ap50 == approx(run.ap)
    assert split.counts == {error: len(run.error_dict[kind]) for error, kind in types.items()}
    gains = run.fix_main_errors()
    assert split.gains == approx({error: gains[kind] for error, kind in types.items()}, abs=1e-9)
