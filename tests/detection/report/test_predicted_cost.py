"""Ceilings and predictions on boxes whose errors are known."""

import math

import numpy as np
import pytest
import torch
from pytest import approx

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.evaluation.coco import evaluate
from roi_quantization.detection.evaluation.statistics import Estimate
from roi_quantization.detection.report.predicted_cost import Ceiling, ceiling, gather_foreground, is_exact, predict, predicted_results
from roi_quantization.detection.report.predicted_cost_output import summarize_cost
from tests.detection.evaluation.coco_sets import annotation, coco, result
from tests.ops.presets import preset


def image(proposals, objects, labels=None):
    return torch.tensor(proposals), torch.tensor(objects), torch.tensor(labels or [1] * len(objects))


OBJECT = [100.0, 100.0, 200.0, 200.0]


def test_proposals_are_matched_to_objects_from_iou_50_the_best_first():
    good, better, poor = [100.0, 100.0, 200.0, 260.0], [100.0, 100.0, 200.0, 220.0], [100.0, 100.0, 200.0, 310.0]
    found = gather_foreground([image([poor, good, better], [OBJECT]), image([OBJECT], [OBJECT, [0.0, 0.0, 9.0, 9.0]], [2, 3])])
    assert found.rois.tolist() == [better, good, OBJECT]
    assert found.object_of.tolist() == [0, 0, 1]
    assert found.labels.tolist() == [1, 2, 3]
    assert found.sizes(20)[:2].tolist() == [5.0, 6.0]


def test_sets_without_objects_or_proposals_are_refused():
    nothing = torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(InputError, match="has no objects"):
        gather_foreground([nothing])
    with pytest.raises(InputError, match="No proposal overlaps an object"):
        gather_foreground([image([[0.0, 0.0, 5.0, 5.0]], [OBJECT])])


def test_the_ceiling_of_exact_rois_is_the_recall_of_the_proposals():
    found = gather_foreground([image([[100.0, 100.0, 200.0, 260.0]], [OBJECT, [0.0, 0.0, 50.0, 50.0]])])
    metrics = ceiling(found, preset("align"), 16).metrics()
    assert metrics == approx({"AP": 50, "AP50": 50, "AP75": 50, "mean_iou": 1, "objects": 2})


def test_the_ceiling_falls_with_the_stride_and_most_for_small_objects():
    rng = np.random.default_rng(0)
    corners, sides = rng.uniform(0, 300, (400, 2)), np.exp(rng.uniform(np.log(40), np.log(200), (400, 1)))
    boxes = np.concatenate([corners, corners + sides], 1)
    rois = boxes + rng.uniform(-0.1, 0.1, (400, 4)) * sides
    found = gather_foreground([(torch.tensor(rois[i : i + 1]), torch.tensor(boxes[i : i + 1]), torch.tensor([1])) for i in range(400)])
    exact = ceiling(found, preset("align"), 16)
    by_stride = {stride: ceiling(found, preset("warp"), stride) for stride in (8, 16, 32)}
    aps = [one.metrics()["AP"] for one in by_stride.values()]
    assert exact.metrics()["AP"] == 100 and aps == sorted(aps, reverse=True) and aps[0] - aps[2] > 30
    assert by_stride[16].metrics(below=4)["AP"] < by_stride[16].metrics(least=8)["AP"] - 10
    assert by_stride[16].share_of_small(exact) > 0.4
    assert math.isnan(exact.share_of_small(exact)), "no loss has no share"


def test_the_ceilings_ap_is_cocoevals_but_for_its_101_levels_of_recall():
    rng = np.random.default_rng(0)
    count = 300
    boxes = np.concatenate([np.zeros((count, 2)), rng.uniform(40, 200, (count, 2))], 1)
    rois = boxes.copy()
    rois[:, 2:] *= rng.uniform(0.8, 1.2, (count, 2))
    labels = rng.choice([3, 17], count)
    found = gather_foreground(
        [(torch.tensor(rois[i : i + 1]), torch.tensor(boxes[i : i + 1]), torch.tensor([labels[i]])) for i in range(count)]
    )
    of_pool = ceiling(found, preset("pool"), 16)
    gt = coco(*(annotation(i + 1, boxes[i].tolist(), int(labels[i])) for i in range(count)), images=range(1, count + 1))
    # a box of the same IoU: as wide as the object, and shorter
    results = [
        result(i + 1, [0, 0, boxes[i, 2], boxes[i, 3] * of_pool.iou[i]], of_pool.iou[i], int(labels[i])) for i in range(count)
    ]  # fmt: skip
    stats = evaluate(gt, results, range(1, count + 1)).stats
    metrics = of_pool.metrics()
    assert 20 < metrics["AP"] < 95
    assert [metrics[name] for name in ("AP", "AP50", "AP75")] == approx([stats[name] for name in ("AP", "AP50", "AP75")], abs=1)


def detections(count=60, seed=0):
    rng = np.random.default_rng(seed)
    boxes = np.concatenate([rng.uniform(0, 100, (count, 2)), rng.uniform(50, 120, (count, 2))], 1)
    annotations = [annotation(i + 1, box.tolist()) for i, box in enumerate(boxes)]
    found = []
    for i, box in enumerate(boxes):
        near, proposal = ((box + rng.normal(0, spread, 4)).tolist() for spread in (2, 8))
        found.append(result(i + 1, near, float(rng.uniform(0.5, 1)), proposal=proposal))
    return coco(*annotations, images=range(1, count + 1)), found, list(range(1, count + 1))


def test_exact_operators_are_predicted_to_detect_the_same():
    _, found, _ = detections()
    for name in ("align", "prroi", "align_max"):
        moved = predicted_results(found, preset(name), 16)
        assert np.array([one["bbox"] for one in moved]) == approx(np.array([one["bbox"] for one in found]), abs=1e-6)
        assert [one["score"] for one in moved] == [one["score"] for one in found]


def test_predictions_are_in_pixels_of_the_original_image():
    """An image of twice the size that is halved for the network gives boxes of twice the size."""
    _, found, image_ids = detections()
    doubled = [one | {key: [2 * side for side in one[key]] for key in ("bbox", "proposal")} for one in found]
    small = predicted_results(found, preset("warp"), 16)
    large = predicted_results(doubled, preset("warp"), 16, scales=dict.fromkeys(image_ids, 0.5))
    assert np.array([one["bbox"] for one in large]) == approx(2 * np.array([one["bbox"] for one in small]))


def test_detections_whose_roi_is_not_sampled_are_dropped():
    """RoIWarp rounds RoIs that are smaller than a cell to points, but those across a middle of a cell."""
    _, found, _ = detections()
    assert 0 < len(predicted_results(found, preset("warp"), 160)) < len(found) - 10
    assert len(predicted_results(found, preset("pool"), 160)) == len(found), "with + 1 it is a cell"


def test_predicted_differences_are_paired_and_have_intervals():
    gt, found, image_ids = detections()
    operators = {name: preset(name) for name in ("warp", "prroi")}
    predicted = predict(gt, found, image_ids, operators, "align", 16, resamples=200)
    assert predicted["align"]["AP"].value == approx(evaluate(gt, found, image_ids).stats["AP"])
    moved = evaluate(gt, predicted_results(found, preset("warp"), 16), image_ids).stats["AP"]
    change = predicted["warp"]["AP"]
    assert change.value == approx(moved - predicted["align"]["AP"].value)
    assert change.low < change.value < change.high < 0
    assert predicted["prroi"]["AP"].value == approx(0)


def test_results_without_proposals_are_refused():
    with pytest.raises(InputError, match=r"1 of 2 results have no `proposal`\. Evaluate the run with eval\.py"):
        predicted_results([result(1, proposal=[0, 0, 9, 9]), result(1)], preset("warp"), 16)
    with pytest.raises(InputError, match="no results to predict from"):
        predicted_results([], preset("warp"), 16)


def test_the_share_of_small_objects_is_that_of_ap():
    """Each of two classes loses 5 of 10 thresholds: one with its three small objects, one with its only object, a large one."""
    labels, cells = np.array([1, 1, 1, 2]), np.array([3.0, 3.0, 3.0, 9.0])
    align, pool = Ceiling(np.ones(4), labels, cells), Ceiling(np.full(4, 0.72), labels, cells)
    assert pool.metrics()["AP"] == approx(50) and pool.share_of_small(align) == approx(0.5)


def test_the_cost_in_one_sentence():
    def of(*ious):
        return Ceiling(np.array(ious), np.ones(2, dtype=int), np.array([3.0, 9.0]))

    ceilings = {16: {"align": of(1.0, 1.0), "pool": of(0.62, 0.92)}, 8: {"align": of(1.0, 1.0), "pool": of(0.82, 0.97)}}
    # 3 and 9 of 10 thresholds: 7 + 1 are lost of 20, and 3 + 0 at half the stride
    assert summarize_cost(ceilings, {}, "align", 16) == (
        "At stride 16 RoIPool lowers the ceiling by 40.0 AP on this set, 88% of it on objects smaller than 4 cells. "
        "A stride of 8 would make it 15.0."
    )
    assert summarize_cost(ceilings, {}, "pool", 16) == (
        "At stride 16 RoIAlign raises the ceiling by 40.0 AP on this set. A stride of 8 would make it 15.0."
    )

    def predicted(here, half):
        return {stride: {"pool": {"AP": Estimate(value)}, "align": {"AP": Estimate(50.0)}} for stride, value in ((16, here), (8, half))}

    start = "At stride 16 RoIPool is expected to"
    assert (
        summarize_cost(ceilings, predicted(1.5, 0.8), "align", 16) == f"{start} gain 1.5 AP on this set. A stride of 8 would make it 0.8."
    )
    assert summarize_cost(ceilings, predicted(-1.5, 0.8), "align", 16).endswith(
        "cost 1.5 AP on this set. A stride of 8 would make it a gain of 0.8."
    )
    assert summarize_cost(ceilings, predicted(1.5, -0.8), "align", 16).endswith("A stride of 8 would make it a loss of 0.8.")
    assert summarize_cost(ceilings, predicted(1.5, -0.02), "align", 16).endswith("A stride of 8 would make it 0.0.")


def test_a_run_whose_operator_rounds_predicts_no_other():
    assert [name for name in ("align", "prroi", "align_max", "warp", "pool_bins", "pool") if is_exact(preset(name))] == [
        "align",
        "prroi",
        "align_max",
    ]
