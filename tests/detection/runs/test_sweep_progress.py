"""How much of a sweep is done, from the files of its runs."""

import pytest

from roi_quantization.detection.runs.sweep_progress import share_done


def test_the_share_of_a_run_that_is_done(tmp_path):
    """Training is ten parts of eleven, evaluation the last."""
    four_epochs, forty_steps = {"max_epochs": 4, "max_steps": -1}, {"max_epochs": -1, "max_steps": 40}
    assert share_done(tmp_path, four_epochs) == share_done(tmp_path, forty_steps) == 0
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss\n0,9,1.5\n1,19,1.2\n,20,\n")
    assert share_done(tmp_path, four_epochs) == pytest.approx(1 / 4 * 10 / 11)
    assert share_done(tmp_path, forty_steps) == pytest.approx(20 / 40 * 10 / 11)
    assert share_done(tmp_path, {"max_epochs": 2, "max_steps": 22}) == pytest.approx(20 / 22 * 10 / 11), "the nearer end"
    assert share_done(tmp_path, {"max_epochs": None, "max_steps": -1}) == 0, "without end"
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss\n4,50,1.5\n")
    assert share_done(tmp_path, four_epochs) == pytest.approx(10 / 11)
    (tmp_path / "metrics.json").touch()
    assert share_done(tmp_path, four_epochs) == 1
