"""What is computed of a sweep's runs, and which runs are not put together."""

import json

import pytest
from omegaconf import OmegaConf

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.report.findings import Findings
from roi_quantization.detection.report.sweep import read_sweep
from tests.detection.report.fake_sweep import write_fake_sweep


def test_annotations_that_changed_since_the_runs_are_refused(tmp_path):
    """metrics.json would have the old ones, and all that is computed from the detections the new ones."""
    folder = write_fake_sweep(tmp_path / "changed", arms={"align": 3.0}, seeds=(0,), images=10)
    path = tmp_path / "changed_data/annotations/instances_test.json"
    instances = json.loads(path.read_text())
    instances["annotations"][0]["bbox"][0] += 30
    path.write_text(json.dumps(instances))
    with pytest.raises(
        InputError, match=r"align_seed0: AP50 was [\d.]+ in metrics\.json, and results\.json has [\d.]+ with the annotations"
    ):
        Findings(read_sweep(folder))


def test_classes_that_were_not_chosen_are_no_missed_objects(tmp_path):
    folder = write_fake_sweep(tmp_path / "chosen", arms={"align": 3.0, "pool": 7.5}, seeds=(0,), images=20)
    path = tmp_path / "chosen_data/annotations/instances_test.json"
    instances = json.loads(path.read_text())
    other = [one | {"id": one["id"] + 1000, "category_id": 9} for one in instances["annotations"]]
    instances["categories"].append({"id": 9, "name": "other"})
    path.write_text(json.dumps(instances | {"annotations": instances["annotations"] + other}))
    for run in folder.glob("*_seed0"):
        config = OmegaConf.load(run / "config.yaml")
        config.data.classes = ["disc", "ring", "square"]
        OmegaConf.save(config, run / "config.yaml")
    findings = Findings(read_sweep(folder))
    for run in findings.sweep.finished:
        assert findings.means["AP"][run.arm].value == pytest.approx(run.metrics.stats["AP"])
