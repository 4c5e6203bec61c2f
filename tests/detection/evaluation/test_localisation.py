"""Offsets of matched detections on boxes whose edges are known."""

import math

import numpy as np
import pytest
from pytest import approx

from roi_quantization.detection.evaluation.localisation import localisation
from tests.detection.evaluation.coco_sets import CAT, DOG, annotation, coco, result

OBJECT = [100, 100, 100, 100]  # xywh: its edges are 100, 100, 200, 200
SHIFTED = [110, 100, 100, 100]  # 10 pixels to the right: 90 of 110 columns are common
LARGE = [90, 90, 140, 120]  # edges 90, 90, 230, 210


def test_edges_before_and_after_regression():
    found = localisation(coco(annotation(1, OBJECT)), [result(1, SHIFTED, proposal=LARGE)], [1])
    assert (len(found), found.objects) == (1, 1)
    assert found.offset.tolist() == [[10, 0, 10, 0]]  # left and right edge lie 10 pixels too far right
    assert found.proposal_offset.tolist() == [[-10, -10, 30, 10]]
    assert found.iou == approx([90 / 110])
    assert found.proposal_iou == approx([100**2 / (140 * 120)])
    assert found.size == approx([100])
    assert (found.image_id.tolist(), found.category_id.tolist(), found.score.tolist()) == ([1], [CAT], [0.9])


def test_a_bias_and_a_scatter_are_told_apart():
    """Two objects 6 pixels too far right each; the tops 4 pixels off, once upwards and once downwards."""
    results = [result(1, [106, 96, 100, 104]), result(2, [106, 104, 100, 96])]
    after = localisation(coco(annotation(1, OBJECT), annotation(2, OBJECT)), results, [1, 2]).summary()["after"]
    assert [after[f"bias_{edge}"] for edge in ("left", "top", "right", "bottom")] == approx([6, 0, 6, 0])
    assert [after[f"off_{edge}"] for edge in ("left", "top", "right", "bottom")] == approx([6, 4, 6, 0])
    assert after["off"] == approx(5)  # of 6, 4, 6, 0, 6, 4, 6, 0
    ious = [94 * 100 / (10000 + 10400 - 9400), 94 * 96 / (10000 + 9600 - 94 * 96)]
    assert after["iou"] == approx(sum(ious) / 2)
    assert after["iou_above_75"] == 100


def test_the_surest_detection_has_the_object_and_a_better_one_comes_too_late():
    results = [result(1, OBJECT, score=0.5), result(1, SHIFTED, score=0.9)]
    found = localisation(coco(annotation(1, OBJECT)), results, [1])
    assert found.offset.tolist() == [[10, 0, 10, 0]]


def test_what_is_not_counted_is_not_measured():
    """Another class, an IoU below 0.5, a crowd region, and an image that was not asked for."""
    gt = coco(annotation(1, OBJECT), annotation(1, [300, 300, 100, 100], iscrowd=1), annotation(2, OBJECT))
    results = [
        result(1, OBJECT, category_id=DOG),
        result(1, [140, 100, 100, 100]),  # IoU 60 / 140
        result(1, [300, 300, 100, 100]),
        result(2, OBJECT),
    ]
    found = localisation(gt, results, [1])
    assert len(found) == 0
    assert found.objects == 1
    assert found.proposal is None
    summary = found.summary()
    assert summary.keys() == {"after"}
    assert all(math.isnan(value) for value in summary["after"].values())


def test_rows_come_in_the_order_of_the_results_and_can_be_chosen():
    gt = coco(annotation(1, OBJECT), annotation(2, [0, 0, 40, 40], category_id=DOG), annotation(2, OBJECT))
    results = [
        result(2, OBJECT, proposal=LARGE),
        result(2, [0, 0, 40, 42], category_id=DOG, proposal=LARGE),
        result(1, OBJECT, proposal=LARGE),
    ]
    found = localisation(gt, results, [1, 2])
    assert found.image_id.tolist() == [2, 2, 1]
    small = found.where(found.size < 64)
    assert small.offset.tolist() == [[0, 0, 0, 2]]
    assert len(small.proposal) == 1
    assert small.objects == 3


def test_no_results_at_all():
    assert localisation(coco(annotation(1)), [], [1]).iou.tolist() == []


def test_proposals_are_on_all_results_or_on_none():
    with pytest.raises(ValueError, match="1 of 2 results have no proposal"):
        localisation(coco(annotation(1)), [result(1), result(1, proposal=LARGE)], [1])


def test_rounded_boxes_show_as_a_scatter_of_half_the_step_at_most():
    """Edges rounded to multiples of 16, a cell: offsets are spread evenly over +-8 pixels, so that half of them are beyond 4."""
    rng = np.random.default_rng(0)
    edges = rng.uniform([0, 0, 160, 160], [100, 100, 400, 400], size=(400, 4))
    rounded = np.round(edges / 16) * 16

    def xywh(box):
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    images = range(1, 401)
    gt = coco(*(annotation(i, xywh(edges[i - 1])) for i in images), images=images)
    found = localisation(gt, [result(i, xywh(rounded[i - 1])) for i in images], images)
    assert len(found) == 400
    assert np.abs(found.offset).max() <= 8 + 1e-9
    assert found.summary()["after"]["off"] == approx(4, abs=0.4)
    assert found.summary()["after"]["bias_left"] == approx(0, abs=1)  # 8 / sqrt(3) / sqrt(400) is 0.23
