"""Evaluations that are partial or not COCO's: marked in the report, and not mixed with others."""

import json

import pytest

from roi_quantization.detection.evaluation.protocol import Protocol
from roi_quantization.detection.report import write_report
from roi_quantization.detection.report.figures import make_figures
from roi_quantization.detection.report.findings import Findings
from roi_quantization.detection.report.style import LIGHT, render
from roi_quantization.detection.report.sweep import read_sweep
from tests.detection.report.fake_sweep import table, text, write_fake_sweep


def test_a_partial_evaluation_is_marked_wherever_its_figures_go(tmp_path, undrawn):
    folder = write_fake_sweep(tmp_path / "partial", arms={"align": 3.0, "pool": 7.5}, seeds=(0,), images=20, evaluated=8)
    write_report(folder)
    report = text(folder, "report.md")
    headline = report.split("\n\n")[1]
    assert "8 of 20 images, a partial evaluation" in headline
    assert report.count("8 of 20 images, a partial evaluation") > 10, "and in tables and captions"
    assert table(folder, "main")["pool"]["evaluated on"] == "8 of 20 images, a partial evaluation"
    assert "- evaluated on: test, 8 images," in report
    main = json.loads((folder / "pool_seed0" / "metrics.json").read_text())["stats"]["AP"]
    assert float(table(folder, "main")["pool"]["AP"]) == pytest.approx(main), "images that were not evaluated are not missed objects"
    assert float(table(folder, "localisation")["align"]["found, %"]) > 80


def test_partial_and_whole_evaluations_are_not_mixed(tmp_path):
    folder = write_fake_sweep(tmp_path / "mixed", arms={"align": 3.0, "pool": 7.5}, seeds=(0,), images=20)
    write_fake_sweep(folder, arms={"pool": 7.5}, seeds=(0,), images=20, evaluated=8)
    with pytest.raises(
        ValueError,
        match=r"different images \(align_seed0: 20 images, image 9 among them; pool_seed0: 8 of 20 images, a partial evaluation\)",
    ):
        write_report(folder)


def test_runs_with_different_limits_of_detections_are_not_mixed(tmp_path):
    folder = write_fake_sweep(tmp_path / "limits", arms={"align": 3.0, "pool": 7.5}, seeds=(0,), images=10)
    metrics = folder / "pool_seed0" / "metrics.json"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"max_detections": 300}))
    with pytest.raises(ValueError, match=r"at most \[100, 300\] detections per image and category"):
        write_report(folder)


def test_runs_with_other_iou_thresholds_are_not_mixed(tmp_path):
    folder = write_fake_sweep(tmp_path / "mixed", arms={"align": 3.0}, seeds=(0,), images=10)
    write_fake_sweep(folder, arms={"pool": 7.5}, seeds=(0,), images=10, protocol=Protocol((0.3, 0.5)))
    with pytest.raises(ValueError, match=r"evaluated differently \(align_seed0: IoU 0\.5:0\.05:0\.95, .*; pool_seed0: IoU 0\.3, 0\.5, "):
        write_report(folder)


def test_a_cross_evaluation_with_other_iou_thresholds_is_refused(tmp_path):
    folder = write_fake_sweep(tmp_path / "mixed", arms={"align": 3.0, "pool": 7.5}, seeds=(0,), images=10)
    path = folder / "pool_seed0" / "cross.json"
    cross = json.loads(path.read_text())
    cross["warp"]["iou_thresholds"] = [0.3, 0.5]
    path.write_text(json.dumps(cross))
    with pytest.raises(ValueError, match=r"cross\.json: the operators were evaluated differently \(warp: IoU 0\.3, 0\.5, "):
        write_report(folder)


def test_a_report_says_what_is_not_cocos_and_is_of_it_throughout(tmp_path, undrawn):
    sizes = (("tiny", 0, 40), ("other", 40, None))
    folder = write_fake_sweep(
        tmp_path / "loose", arms={"align": 3.0, "pool": 7.5}, seeds=(0,), images=20, protocol=Protocol((0.3, 0.5), sizes)
    )
    write_report(folder)
    report = text(folder, "report.md")
    assert "- AP and AR are means over IoU 0.3, 0.5, where COCO has 0.5:0.05:0.95." in report and "- Size ranges: tiny < 40 px" in report
    headline = next(line for line in report.splitlines() if line.startswith("**"))
    assert "AP is the mean over IoU 0.3, 0.5." in headline
    of_run = json.loads((folder / "pool_seed0" / "metrics.json").read_text())["stats"]
    assert float(table(folder, "main")["pool"]["AP"]) == pytest.approx(of_run["AP"])
    assert float(table(folder, "sizes")["pool"]["AP < 40 px"]) == pytest.approx(of_run["AP_tiny"])
    differences = Findings(read_sweep(folder)).differences
    align = json.loads((folder / "align_seed0" / "metrics.json").read_text())["stats"]
    assert differences["AP"]["pool"].value == pytest.approx(of_run["AP"] - align["AP"]), "the bootstrap's is the same AP"
    (figure,) = (one for one in make_figures(Findings(read_sweep(folder))) if one.name == "sizes")
    assert render(figure.draw, LIGHT, "png").startswith(b"\x89PNG")
