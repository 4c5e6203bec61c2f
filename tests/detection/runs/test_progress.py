import time
from types import SimpleNamespace

import torch
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


def test_the_loss_is_read_when_it_is_logged_and_shown_until_then(monkeypatch):
    monkeypatch.setattr(TQDMProgressBar, "get_metrics", lambda *_: {})
    monkeypatch.setattr(TQDMProgressBar, "on_train_batch_end", lambda *_: None)
    bar, shown = TrainingProgressBar(), []
    trainer = SimpleNamespace(training=False, log_every_n_steps=2)
    for trainer.global_step in range(1, 5):
        trainer.callback_metrics = {"train/loss": torch.tensor(float(trainer.global_step))}
        bar.on_train_batch_end(trainer, None, None, None, 0)
        shown.append(bar.get_metrics(trainer, None).get("train/loss"))
    assert shown == [None, 2, 2, 4]


def test_nothing_is_promised_outside_training(monkeypatch):
    monkeypatch.setattr(TQDMProgressBar, "get_metrics", lambda *_: {"val/AP": "50"})
    trainer = SimpleNamespace(global_step=40, training=False, estimated_stepping_batches=70)
    assert TrainingProgressBar().get_metrics(trainer, None) == {"val/AP": "50"}
