import json
import logging
from types import SimpleNamespace

import pytest

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.evaluation.coco import evaluate
from roi_quantization.detection.runs import results
from roi_quantization.detection.runs.results import draw_curves, report
from tests.detection.evaluation.coco_sets import annotation, coco


def test_a_run_without_curves_says_why(tmp_path, caplog):
    draw_curves(tmp_path, log_every_n_steps=10)
    assert "there is no metrics.csv, which logger=csv writes" in caplog.text
    (tmp_path / "metrics.csv").write_text("epoch,step,val/AP\n0,3,1.5\n")
    draw_curves(tmp_path, log_every_n_steps=10)
    assert "no loss was logged, since the run is shorter than trainer.log_every_n_steps=10" in caplog.text


def test_a_figure_that_fails_leaves_the_results(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr(results, "plot_detection_sheet", fail)
    module = SimpleNamespace(results=[], metrics=evaluate(coco(annotation(1)), [], [1]), detections={})
    with caplog.at_level(logging.WARNING):
        report(module, None, tmp_path, "best.ckpt on test")
    assert json.loads((tmp_path / "metrics.json").read_text())["stats"]["AP"] == 0
    assert "No detections.png: RuntimeError: no font. The results are complete without it" in caplog.text


def test_no_evaluation_is_no_result(tmp_path):
    with pytest.raises(InputError, match=r"best\.ckpt on test: nothing was evaluated"):
        report(SimpleNamespace(results=[], metrics=None, detections={}), None, tmp_path, "best.ckpt on test")
    assert not list(tmp_path.iterdir())
