"""COCO's metrics on cases small enough to compute by hand, and what is written of them."""

import contextlib
import copy
import gc
import io
import json
import math

import pytest
import torch
from pycocotools.coco import COCO
from pytest import approx

from roi_quantization.detection.data.masks import encode
from roi_quantization.detection.evaluation.bootstrap import MatchedDetections
from roi_quantization.detection.evaluation.coco import Metrics, evaluate, format_table, to_coco_results, write_metrics, write_results
from roi_quantization.detection.evaluation.protocol import Protocol
from tests.detection.evaluation.coco_sets import CAT, DOG, annotation, coco, result


def stats(gt, results, image_ids=(1, 2, 3), **options):
    return evaluate(gt, results, image_ids, **options).stats


# --- average precision by hand


def test_a_perfect_detection_is_100_and_what_cannot_be_measured_is_nan():
    metrics = evaluate(coco(annotation(1)), [result(1)], [1])
    for name in ("AP", "AP50", "AP75", "AP_large", "AR_1", "AR_10", "AR_100", "AR_large"):
        assert metrics.stats[name] == approx(100), name
    for name in ("AP_small", "AP_medium", "AR_small", "AR_medium"):
        assert math.isnan(metrics.stats[name]), name
    assert metrics.per_class["cat"] == approx({"AP": 100, "AP50": 100, "AP75": 100})
    assert all(math.isnan(value) for value in metrics.per_class["dog"].values())


@pytest.mark.parametrize(
    ("height", "ap", "ap50", "ap75"),
    [(98, 100, 100, 100), (78, 60, 100, 100), (62, 30, 100, 0), (49, 0, 0, 0)],  # IoU = height / 100; thresholds 0.5, 0.55 ... 0.95
)
def test_ap_counts_the_iou_thresholds_that_are_passed(height, ap, ap50, ap75):
    measured = stats(coco(annotation(1)), [result(1, [0, 0, 100, height])])
    assert [measured[name] for name in ("AP", "AP50", "AP75")] == approx([ap, ap50, ap75])


def test_half_of_the_objects_found_is_51_of_101_recall_points():
    measured = stats(coco(annotation(1), annotation(2)), [result(1)])
    assert measured["AP"] == approx(100 * 51 / 101)  # recall 0, 0.01 ... 0.50
    assert measured["AR_100"] == approx(50)


def test_a_false_positive_between_two_hits():
    hits_and_miss = [result(1, score=0.9), result(3, score=0.8), result(2, score=0.7)]  # nothing is on image 3
    measured = stats(coco(annotation(1), annotation(2)), hits_and_miss)
    assert measured["AP"] == approx(100 * (51 * 1 + 50 * 2 / 3) / 101)  # precision 1 up to recall 0.5, then 2/3


def test_a_second_detection_of_one_object_is_false():
    twice = [result(1, score=0.9), result(1, score=0.8), result(2, score=0.7)]
    assert stats(coco(annotation(1), annotation(2)), twice)["AP"] == approx(100 * (51 * 1 + 50 * 2 / 3) / 101)


def test_classes_count_alike_however_many_objects_they_have():
    gt = coco(annotation(1), annotation(2), annotation(3), annotation(1, category_id=DOG))
    metrics = evaluate(gt, [result(i) for i in (1, 2, 3)], [1, 2, 3])
    assert metrics.stats["AP"] == approx(50)
    assert [values["AP"] for values in metrics.per_class.values()] == approx([100, 0])


def test_the_size_is_that_of_the_annotated_area_not_of_the_box():
    measured = stats(coco(annotation(1, [0, 0, 40, 40], area=900)), [result(1, [0, 0, 40, 40])])
    assert measured["AP_small"] == approx(100)
    assert math.isnan(measured["AP_medium"])


def test_recall_by_number_of_detections():
    right = [200, 0, 100, 100]
    measured = stats(coco(annotation(1), annotation(1, right)), [result(1), result(1, right, score=0.5)])
    assert [measured[name] for name in ("AR_1", "AR_10", "AR_100")] == approx([50, 100, 100])


def test_max_detections_keeps_those_of_highest_score():
    two_misses_first = [result(1, [300, 0, 9, 9], score=0.9), result(1, [400, 0, 9, 9], score=0.8), result(1, score=0.7)]
    gt = coco(annotation(1))
    assert stats(gt, two_misses_first, max_detections=2)["AP"] == 0
    assert stats(gt, two_misses_first, max_detections=3)["AP"] == approx(100 / 3)
    assert stats(gt, two_misses_first, max_detections=300)["AP"] == approx(100 / 3)
    assert stats(gt, two_misses_first, max_detections=1)["AR_100"] == 0


# --- the traps of COCOeval


def test_crowd_regions_absorb_detections_and_are_never_missed():
    region, inside = [200, 0, 200, 200], [[210, 10, 50, 50], [300, 90, 60, 60]]
    results = [result(1, inside[0], score=0.9), result(1, inside[1], score=0.8), result(1, score=0.7)]
    assert stats(coco(annotation(1), annotation(1, region, iscrowd=1)), results)["AP"] == approx(100)
    # The same region as one object: two false detections come before the hit, and the region is missed.
    assert stats(coco(annotation(1), annotation(1, region)), results)["AP"] == approx(100 * 51 / 101 / 3)


def test_no_results_are_ap_0():
    metrics = evaluate(coco(annotation(1)), [], [1, 2])
    assert metrics.stats["AP"] == metrics.stats["AR_100"] == metrics.per_class["cat"]["AP"] == 0
    assert math.isnan(metrics.per_class["dog"]["AP"])


def test_without_any_object_there_is_nothing_to_measure():
    assert all(math.isnan(value) for value in stats(coco(), []).values())
    assert all(math.isnan(value) for value in stats(coco(), [result(1)]).values())


def test_an_annotation_with_id_0_can_be_found():
    assert stats(coco(annotation(1, id=0), annotation(2, id=1)), [result(1), result(2)])["AP"] == approx(100)


def test_annotations_that_share_an_id_are_all_there():
    assert stats(coco(annotation(1, id=7), annotation(2, id=7)), [result(1)])["AP"] == approx(100 * 51 / 101)


def test_annotations_of_the_bare_minimum(caplog):
    bare = {"image_id": 1, "category_id": CAT, "bbox": [0, 0, 40, 40]}
    assert stats(coco(bare), [result(1, [0, 0, 40, 40])])["AP_medium"] == approx(100)
    assert "1 annotations have no area" in caplog.text


def test_images_without_objects_take_part():
    gt = coco(annotation(1))
    found_and_invented = [result(1, score=0.8), result(2, score=0.9)]
    assert stats(gt, found_and_invented, image_ids=[1])["AP"] == approx(100)
    assert stats(gt, found_and_invented, image_ids=[1, 2])["AP"] == approx(50)


def test_a_subset_leaves_out_annotations_and_results_of_other_images():
    gt = coco(annotation(1), annotation(2))
    assert stats(gt, [result(1), result(3, score=1.0)], image_ids=[1])["AP"] == approx(100)
    assert stats(gt, [result(1)], image_ids=[2])["AP"] == 0
    assert stats(gt, [result(1)], image_ids=[1, 1, 2]) == approx(stats(gt, [result(1)], image_ids=[2, 1]), nan_ok=True)


def test_nothing_given_is_written_into():
    gt, results = coco(annotation(1, id=0), annotation(1, [9, 9, 9, 9], iscrowd=1)), [result(1), result(2)]
    before = copy.deepcopy((gt.dataset, gt.anns, gt.imgToAnns, gt.catToImgs, results))
    evaluate(gt, results, [1, 3])
    assert (gt.dataset, gt.anns, gt.imgToAnns, gt.catToImgs, results) == before


def test_nothing_is_printed(capsys):
    evaluate(coco(annotation(1)), [result(1)], [1])
    assert capsys.readouterr().out == ""


def test_classes_of_one_name_are_told_apart():
    gt = coco(annotation(1))
    gt.cats[DOG]["name"] = "cat"
    assert list(evaluate(gt, [result(1)], [1]).per_class) == ["cat (3)", "cat (17)"]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([result(1), result(99)], "result 1 has image_id 99"),
        ([result("1")], "result 0 has image_id '1'"),
        ([result(1, category_id=1)], "result 0 has category_id 1"),
        ([{"image_id": 1, "category_id": CAT, "score": 0.5}], "result 0 has no bbox"),
        ([result(1, [0, 0, math.nan, 5])], "image 1.*finite"),  # COCOeval would match it with anything
        ([result(1, score=math.inf)], "image 1.*finite"),
        ([result(1, [9, 9, -4, 5])], "w, h >= 0"),
        ([result(1, [9, 9, 4])], "image 1"),
    ],
)
def test_results_that_cannot_be_right_are_refused(results, message):
    with pytest.raises(ValueError, match=message):
        evaluate(coco(annotation(1)), results, [1])


def test_images_that_cannot_be_evaluated_are_refused():
    with pytest.raises(ValueError, match="image_ids is empty"):
        evaluate(coco(annotation(1)), [], [])
    with pytest.raises(ValueError, match=r"2 of the images.*first is image 50"):
        evaluate(coco(annotation(1)), [], [1, 50, 60])
    with pytest.raises(ValueError, match="annotation 1 of image 2 has no bbox"):
        evaluate(coco({"image_id": 2, "category_id": CAT}), [], [2])
    with pytest.raises(ValueError, match="max_detections"):
        evaluate(coco(annotation(1)), [], [1], max_detections=0)


def test_garbage_is_collected_again_after_an_evaluation():
    assert gc.isenabled()
    evaluate(coco(annotation(1)), [result(1)], [1])
    assert gc.isenabled()
    with pytest.raises(ValueError):
        evaluate(coco(annotation(1)), [result(99)], [1])
    assert gc.isenabled()


def test_the_annotations_themselves_as_detections_are_ap_100(real_data):
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(real_data / "voc_animals/annotations/instances_val.json"))
    to_category = dict(enumerate(sorted(gt.cats), 1))
    to_label = {category_id: label for label, category_id in to_category.items()}
    detections = {}
    for image_id in gt.imgs:
        annotations = gt.imgToAnns[image_id]
        x, y, w, h = torch.tensor([a["bbox"] for a in annotations]).T
        labels = torch.tensor([to_label[a["category_id"]] for a in annotations])
        detections[image_id] = {"boxes": torch.stack([x, y, x + w, y + h], dim=1), "scores": torch.ones(len(labels)), "labels": labels}
    assert evaluate(gt, to_coco_results(detections, to_category), list(gt.imgs)).stats["AP"] == approx(100)


# --- masks


def columns(low, high):
    """The polygon of the columns from `low` to `high` of a 480 x 640 image, in rows 0 to 100."""
    return [[low, 0, high, 0, high, 100, low, 100]]


def rle(low, high):
    mask = torch.zeros(1, 480, 640)
    mask[:, :100, low:high] = 1
    return encode(mask)[0]


def test_masks_are_evaluated_beside_their_boxes():
    """Boxes are exact. The mask of the first image has an IoU of 0.82 and that of the second of 0.92; crowd absorbs the third's."""
    gt = coco(annotation(1, segmentation=columns(0, 100)), annotation(2, segmentation=columns(0, 100)),
              annotation(3, iscrowd=1, segmentation=columns(0, 100)))  # fmt: skip
    results = [result(image_id, segmentation=rle(0, side)) for image_id, side in ((1, 82), (2, 92), (3, 60))]
    metrics = evaluate(gt, results, [1, 2, 3], masks=True)
    alone = evaluate(gt, results, [1, 2, 3])
    assert {name: metrics.stats[name] for name in alone.stats} == approx(alone.stats, nan_ok=True)
    assert not any(name.startswith("segm") for name in alone.stats)
    assert metrics.stats["AP75"] == metrics.stats["segm_AP50"] == metrics.stats["segm_AP75"] == approx(100)
    # at 0.85 and 0.9 the second one alone is right, and both have the same score: a recall of 1/2 at a precision of 1/2
    half = 51 / 101 / 2
    assert metrics.stats["segm_AP90"] == approx(100 * half)
    assert metrics.stats["segm_AP"] == approx(100 * (7 + 2 * half) / 10)
    assert metrics.stats["segm_AR_100"] == approx(100 * (7 + 2 * 0.5) / 10)
    assert metrics.per_class["cat"]["segm_AP75"] == approx(100) and set(metrics.per_class["dog"]) == set(metrics.per_class["cat"])
    assert metrics.named("test")["test/segm_AP90"] == metrics.stats["segm_AP90"]
    assert "AP of masks" in format_table(metrics) and "AP of masks" not in format_table(alone)
    matched = MatchedDetections(gt, results, [1, 2, 3], masks=True).average_precision()
    assert {f"segm_{name}": value.item() for name, value in matched.items()} == approx(
        {f"segm_{n}": metrics.stats[f"segm_{n}"] for n in matched}
    )


def test_the_size_of_a_mask_is_its_own():
    """A mask of 20 x 100 pixels is of medium size; its box, of 100 x 100, is large."""
    gt = coco(annotation(1, segmentation=columns(0, 20)) | {"area": 2000})
    stats = evaluate(gt, [result(1, segmentation=rle(0, 20)), result(1, score=0.95, segmentation=rle(300, 310))], [1], masks=True).stats
    assert stats["segm_AP_medium"] == approx(100), "the false one is small, and does not count here"


def test_no_results_and_other_thresholds():
    gt = coco(annotation(1, segmentation=columns(0, 100)))
    assert evaluate(gt, [], [1], masks=True).stats["segm_AP"] == 0
    loose = Protocol(iou_thresholds=(0.3,))
    stats = evaluate(gt, [result(1, segmentation=rle(0, 40))], [1], protocol=loose, masks=True)
    assert (stats.stats["segm_AP"], stats.stats["segm_AP50"], stats.stats["segm_AP90"]) == approx((100, 0, 0))
    assert stats.named("val")["val/segm_AP_iou0.3"] == approx(100)


# --- results, files, table


def test_detections_become_results_in_one_order_whatever_order_they_came_in():
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    found = {
        "boxes": torch.tensor([[1.0, 2.0, 3.5, 4.0], [10.00049, 0.0, 20.0, 5.0], [0.0, 0.0, 8.0, 8.0]]),
        "scores": torch.tensor([0.25, 0.9999999, 0.25]),
        "labels": torch.tensor([1, 2, 2]),
    }
    one = {"boxes": torch.tensor([[0.0, 0.0, 1.0, 1.0]]), "scores": torch.tensor([0.125]), "labels": torch.tensor([1])}
    assert to_coco_results({9: found, 4: one, 5: nothing}, {1: CAT, 2: DOG}) == [
        {"image_id": 4, "category_id": CAT, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.125},
        {"image_id": 9, "category_id": DOG, "bbox": [10.0, 0.0, 10.0, 5.0], "score": 1.0},
        {"image_id": 9, "category_id": CAT, "bbox": [1.0, 2.0, 2.5, 2.0], "score": 0.25},
        {"image_id": 9, "category_id": DOG, "bbox": [0.0, 0.0, 8.0, 8.0], "score": 0.25},
    ]


def test_a_label_without_a_category_is_refused():
    found = {"boxes": torch.zeros(1, 4), "scores": torch.ones(1), "labels": torch.tensor([0])}
    with pytest.raises(ValueError, match="image 7: label 0 has no category"):
        to_coco_results({7: found}, {1: CAT})
    with pytest.raises(ValueError, match="image 7: 1 boxes, 1 scores and 2 labels"):
        to_coco_results({7: {**found, "labels": torch.tensor([1, 1])}}, {1: CAT})


def test_a_result_names_the_proposal_it_comes_from():
    detections = {
        4: {
            "boxes": torch.tensor([[0.0, 0.0, 5.0, 5.0], [1.0, 2.0, 4.0, 8.0]]),
            "scores": torch.tensor([0.25, 0.5]),
            "labels": torch.tensor([1, 1]),
            "proposals": torch.tensor([[0.0, 1.0, 6.0, 5.0], [2.0, 2.0, 4.0, 9.0]]),
        }
    }
    found = to_coco_results(detections, {1: 7})
    assert [(result["bbox"], result["proposal"]) for result in found] == [([1, 2, 3, 6], [2, 2, 2, 7]), ([0, 0, 5, 5], [0, 1, 6, 4])]


def test_a_result_has_the_mask_of_its_detection():
    found = {
        "boxes": torch.zeros(2, 4),
        "scores": torch.tensor([0.25, 0.5]),
        "labels": torch.tensor([1, 1]),
        "masks": [rle(0, 1), rle(0, 2)],
    }
    assert [result["segmentation"] for result in to_coco_results({4: found}, {1: CAT})] == [rle(0, 2), rle(0, 1)]


def test_results_are_read_back_as_they_were_written(tmp_path):
    for results in ([], [result(1)], [result(1), result(2, [0.5, 0, 1, 1])]):
        write_results(tmp_path / "new" / "results.json", results)
        assert json.loads((tmp_path / "new" / "results.json").read_text()) == results


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, [result(1)])
    with pytest.raises(ValueError):
        write_results(path, [result(1), result(2, score=math.nan)])
    assert json.loads(path.read_text()) == [result(1)]
    assert list(tmp_path.iterdir()) == [path]


def test_metrics_are_json_with_null_for_what_cannot_be_measured(tmp_path):
    write_metrics(tmp_path / "metrics.json", evaluate(coco(annotation(1)), [result(1)], [1]))
    read = json.loads((tmp_path / "metrics.json").read_text())
    assert read["stats"]["AP"] == approx(100) and read["stats"]["AP_small"] is None
    assert read["per_class"]["cat"] == approx({"AP": 100, "AP50": 100, "AP75": 100})
    assert read["per_class"]["dog"] == {"AP": None, "AP50": None, "AP75": None}


def test_metrics_know_which_images_they_are_of(tmp_path):
    gt = coco(annotation(1), annotation(2))
    whole = evaluate(gt, [result(1)], [3, 1, 2, 1], of=3)
    assert (whole.image_ids, whole.is_partial, whole.coverage) == ((1, 2, 3), False, "3 images")
    partial = evaluate(gt, [result(1)], [2, 1], of=3)
    assert (partial.image_ids, partial.is_partial, partial.coverage) == ((1, 2), True, "2 of 3 images, a partial evaluation")
    write_metrics(tmp_path / "metrics.json", partial)
    read = json.loads((tmp_path / "metrics.json").read_text())
    assert (read["images"], read["of"], read["partial"], read["image_ids"]) == (2, 3, True, [1, 2])
    assert Metrics.from_json(read).is_partial
    older = {name: read[name] for name in ("stats", "per_class")}
    assert Metrics.from_json(older).image_ids is None and not Metrics.from_json(older).is_partial


def test_the_table():
    metrics = evaluate(coco(annotation(1), annotation(2)), [result(1)], [1, 2])
    assert format_table(metrics).splitlines() == [
        "average precision        AP     AP50     AP75    small   medium    large",
        "                       50.5     50.5     50.5        -        -     50.5",
        "average recall         AR@1    AR@10   AR@100    small   medium    large",
        "                       50.0     50.0     50.0        -        -     50.0",
        "",
        "class               AP   AP50   AP75",
        "cat               50.5   50.5   50.5",
        "dog                  -      -      -",
    ]


def test_the_table_says_what_is_not_cocos_own():
    lines = format_table(evaluate(coco(annotation(1)), [result(1)], [1, 2], max_detections=300, of=3)).splitlines()
    assert lines[:2] == [
        "2 of 3 images, a partial evaluation.",
        "Up to 300 detections of an image and class count, where COCO has 100.",
    ]


def test_the_table_of_coco_fits_80_columns(real_data):
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(real_data / "coco/annotations/instances_val2017.json"))
    gt.cats[90]["name"] = "a toothbrush of extraordinary length"
    lines = format_table(evaluate(gt, [], list(gt.imgs)[:3])).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) == 6 + 40  # two classes a line
    assert "person" in lines[6] and "wine glass" in lines[6] and "a toothbrush .." in lines[-1]
