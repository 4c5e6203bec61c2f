"""Which weights are validated at the end of a training, and which are the result."""

import csv

import pytest

from tests.trainings import run_train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Drawn by the first training."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "embedded").mkdir()
    return folder / "embedded"


@pytest.mark.parametrize(
    "length", [pytest.param("trainer.max_steps=1", marks=pytest.mark.slow), "trainer.max_epochs=1", "trainer.max_steps=5"]
)
def test_the_last_weights_are_validated_too(data, tmp_path, caplog, length):
    """An epoch has two steps, and there are regular validations after four."""
    (tmp_path / "data").symlink_to(data)
    metrics = run_train(tmp_path, length, "trainer.check_val_every_n_epoch=2", "optimized_metric=val/loss")
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        steps = [int(row["step"]) + 1 for row in csv.DictReader(file) if row["val/loss"]]
    assert steps == {"trainer.max_steps=1": [1], "trainer.max_epochs=1": [2], "trainer.max_steps=5": [4, 5]}[length]
    assert metrics["val/loss"] > 0 and "best.ckpt holds the last weights" not in caplog.text


def test_without_any_validation_the_last_weights_are_the_result(data, tmp_path, caplog):
    (tmp_path / "data").symlink_to(data)
    metrics = run_train(tmp_path, "trainer.max_steps=1", "+trainer.limit_val_batches=0")
    assert "Nothing was validated: best.ckpt holds the last weights" in caplog.text
    assert metrics["val/AP"] != metrics["val/AP"], "not a number"
    assert metrics["test/AP"] >= 0 and (tmp_path / "run" / "last.ckpt").is_file()
