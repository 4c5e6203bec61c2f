"""Other IoU thresholds and size ranges than COCO's: their metrics by hand, and their name wherever they are shown."""

import json
import math

import pytest
from pytest import approx

from roi_quantization.detection.evaluation.bootstrap import MatchedDetections
from roi_quantization.detection.evaluation.coco import CocoEvaluation, Metrics, evaluate, format_table, write_metrics
from roi_quantization.detection.evaluation.matching import faster_coco_eval
from roi_quantization.detection.evaluation.protocol import Protocol
from roi_quantization.detection.evaluation.sizes import average_precision_by_cells
from tests.detection.evaluation.coco_sets import annotation, coco, result

LOOSE = Protocol(iou_thresholds=(0.2, 0.4, 0.9))
SIZES = Protocol(areas=(("tiny", 0, 10), ("other", 10, None)))


def overlapping(iou):
    """One object, and a detection of it with this IoU."""
    return coco(annotation(1)), [result(1, [0, 0, 100, 100 * iou])]


@pytest.mark.parametrize(
    ("iou", "ap", "ap50", "ap75"), [(0.3, 100 / 3, 0, 0), (0.6, 200 / 3, 100, 0), (0.8, 200 / 3, 100, 100), (1, 100, 100, 100)]
)
def test_ap_is_the_mean_over_the_thresholds_and_ap50_stays(iou, ap, ap50, ap75):
    gt, results = overlapping(iou)
    metrics = evaluate(gt, results, [1], protocol=LOOSE)
    assert [metrics.stats[name] for name in ("AP", "AP50", "AP75", "AR_100", "AP_large")] == approx([ap, ap50, ap75, ap, ap])
    assert metrics.per_class["cat"] == approx({"AP": ap, "AP50": ap50, "AP75": ap75})
    matched = MatchedDetections(gt, results, [1], protocol=LOOSE).average_precision()
    assert {name: float(value[0]) for name, value in matched.items()} == approx({"AP": ap, "AP50": ap50, "AP75": ap75})
    by_cells = average_precision_by_cells(gt, results, [1], stride=16, protocol=LOOSE)
    assert by_cells["> 6 cells"]["AP"] == approx(ap) and by_cells["> 6 cells"]["AP50"] == approx(ap50)


def test_the_same_thresholds_in_another_form_are_cocos():
    gt, results = overlapping(0.62)
    expected = evaluate(gt, results, [1])
    found = CocoEvaluation(
        iou_thresholds=[0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95],
        areas=[["small", 0, 32], ["medium", 32, 96], ["large", 96, None]],
    )
    assert found(gt, results, [1], max_detections=100, of=1) == expected and expected.labels == []


def test_size_ranges_have_names_and_sides_in_pixels():
    gt = coco(annotation(1, [0, 0, 8, 8]), annotation(1, [50, 50, 40, 40]))
    stats = evaluate(gt, [result(1, [0, 0, 8, 8])], [1], protocol=SIZES).stats
    assert list(stats) == ["AP", "AP50", "AP75", "AP_tiny", "AP_other", "AR_1", "AR_10", "AR_100", "AR_tiny", "AR_other"]
    assert [stats["AP_tiny"], stats["AP_other"], stats["AR_tiny"]] == approx([100, 0, 100])


@pytest.mark.parametrize("protocol", [LOOSE, SIZES])
def test_the_faster_library_evaluates_the_same(protocol):
    pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval, which is not required")
    gt, results = coco(annotation(1), annotation(1, [200, 0, 8, 8])), [result(1, [0, 0, 100, 62]), result(1, [200, 0, 8, 3], score=0.4)]
    plain, fast = (evaluate(gt, results, [1], protocol=protocol, **more).stats for more in ({}, {"coco_eval": faster_coco_eval()}))
    assert fast == approx(plain, nan_ok=True) and 0 < plain["AP"] < 100


def test_the_table_and_the_file_say_what_is_not_cocos(tmp_path):
    gt, results = overlapping(0.3)
    metrics = evaluate(gt, results, [1], protocol=Protocol((0.2, 0.4), (("tiny", 0, 16), ("a_long_name", 16, None))))
    assert format_table(metrics).splitlines()[:6] == [
        "AP and AR are means over IoU 0.2, 0.4, where COCO has 0.5:0.05:0.95.",
        "Size ranges: tiny < 16 px, a_long_name > 16 px, where COCO has small < 32 px,",
        "medium 32 to 96 px, large > 96 px.",
        "average precision        AP     AP50     AP75     tiny a_long..",
        "                       50.0      0.0      0.0        -     50.0",
        "average recall         AR@1    AR@10   AR@100     tiny a_long..",
    ]
    write_metrics(tmp_path / "metrics.json", metrics)
    read = json.loads((tmp_path / "metrics.json").read_text())
    assert read["iou_thresholds"] == [0.2, 0.4] and read["areas"] == [["tiny", 0, 16], ["a_long_name", 16, None]]
    assert Metrics.from_json(read) == metrics
    assert list(metrics.named("test"))[:4] == ["test/AP_iou0.2_0.4", "test/AP50", "test/AP75", "test/AP_tiny_iou0.2_0.4"]
    of_earlier_versions = {name: read[name] for name in ("stats", "per_class")}
    assert Metrics.from_json(of_earlier_versions).protocol == Protocol(), "COCO's"


def test_names_of_metrics():
    assert Protocol().logged("val/AP") == "val/AP"
    even = Protocol(iou_thresholds=(0.3, 0.4, 0.5, 0.6))
    assert [even.logged(f"val/{name}") for name in ("AP", "AP50", "loss")] == ["val/AP_iou0.3-0.1-0.6", "val/AP50", "val/loss"]
    assert even.thresholds_in_words == "0.3:0.1:0.6"


def test_many_size_ranges_are_wrapped():
    areas = tuple((f"size{i}", 10.0 * i, 10.0 * (i + 1)) for i in range(8))
    lines = format_table(evaluate(*overlapping(1), [1], protocol=Protocol(areas=areas))).splitlines()
    assert max(map(len, lines)) <= 80 and all(any(name in line for line in lines) for name, _, _ in areas)
    assert not math.isnan(float(lines[-2].split()[-1]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"iou_thresholds": []}, r"coco_eval\.iou_thresholds=\[\]: expected ascending numbers"),
        ({"iou_thresholds": [0.5, 0.3]}, r"coco_eval\.iou_thresholds=\[0\.5, 0\.3\]: expected ascending"),
        ({"iou_thresholds": [0.0, 0.5]}, "above 0 and up to 1"),
        ({"iou_thresholds": [50, 75]}, "above 0 and up to 1"),
        ({"iou_thresholds": ["half"]}, "expected ascending numbers"),
        ({"areas": [["tiny", 16, 0]]}, r"coco_eval\.areas: \('tiny', 16, 0\) is not a size range"),
        ({"areas": [["tiny", 16]]}, "is not a size range"),
        ({"areas": [16, 32]}, r"coco_eval\.areas: 16 is not a size range"),
        ({"areas": [["1", 0, 16]]}, "a name is a word"),
        ({"areas": [["all", 0, 16]]}, "is not a size range"),
        ({"areas": [["a", 0, 16], ["a", 16, None]]}, "the names a, a are not all different"),
    ],
)
def test_what_cannot_be_evaluated_is_named(setting, message):
    with pytest.raises(ValueError, match=message):
        CocoEvaluation(**setting)
