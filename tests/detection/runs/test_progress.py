import time
from types import SimpleNamespace

from pytorch_lightning.callbacks import TQDMProgressBar

from roi_quantization.detection.runs.progress import TrainingProgressBar


def test_the_time_left_is_that_of_all_steps_since_a_resume(monkeypatch):
    """Resumed at step 30, now at 40 after 20 seconds: 2 seconds a step, 30 of 70 steps to go."""
    monkeypatch.setattr(TQDMProgressBar, "get_metrics", lambda *_: {"v_num": 0, "train/loss": "0.5"})
    monkeypatch.setattr(time, "monotonic", lambda: 120.0)
    bar = TrainingProgressBar()
    bar.start_time, bar.start_step = 100.0, 30
    trainer = SimpleNamespace(global_step=40, training=True, estimated_stepping_batches=70)
    assert bar.get_metrics(trainer, None) == {"train/loss": "0.5", "all done in": "0:01:00"}


def test_nothing_is_promised_outside_training(monkeypatch):
    monkeypatch.setattr(TQDMProgressBar, "get_metrics", lambda *_: {"val/AP": "50"})
    trainer = SimpleNamespace(global_step=40, training=False, estimated_stepping_batches=70)
    assert TrainingProgressBar().get_metrics(trainer, None) == {"val/AP": "50"}
