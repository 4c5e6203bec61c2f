"""The time that training waits for data, on a fake clock that only loading, steps and validations advance."""

import csv
import logging

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import Dataset

from roi_quantization.detection.data import loading_time
from roi_quantization.detection.data.loading_time import LoadingTimeMonitor, TimedDataLoader, format_waiting


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


class Slow(Dataset):
    """Items that take the given numbers of seconds to load."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def __len__(self):
        return len(self.seconds)

    def __getitem__(self, index):
        self.clock.now += self.seconds[index]
        return torch.tensor([1.0])


class Steps(pl.LightningModule):
    """A step takes 6 seconds, a validation 100."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.layer = clock, nn.Linear(1, 1)

    def training_step(self, batch, _):
        self.clock.now += 6
        return self.layer(batch).mean()

    def validation_step(self, batch, _):
        self.clock.now += 100

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_share_is_logged_over_the_last_steps_and_over_the_whole_training_at_the_end(tmp_path, monkeypatch, caplog):
    """Batches take 2, 2, 0 and 1 second: the first two steps wait 4 of 16 seconds, the last two 1 of 13, all 5 of 29."""
    clock = Clock()
    monkeypatch.setattr(loading_time, "time", clock)
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = pl.Trainer(
        accelerator="cpu", logger=logger, callbacks=[LoadingTimeMonitor()], max_epochs=1, log_every_n_steps=2, val_check_interval=1,
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        trainer.fit(Steps(clock), TimedDataLoader(Slow(clock, [2, 2, 0, 1])), TimedDataLoader(Slow(clock, [50])))
    assert clock.now == 5 + 4 * 6 + 4 * 150, "four validations, which are not counted"
    with open(tmp_path / "metrics.csv") as file:
        assert [float(row["train/waiting"]) for row in csv.DictReader(file)] == pytest.approx([4 / 16, 1 / 13])
    assert "Waited for data 17.2% of the training time: the training process loads by itself" in caplog.text


class Reloaded(pl.LightningDataModule):
    """A training loader of two batches that take 2 seconds each, anew in each epoch."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def train_dataloader(self):
        return TimedDataLoader(Slow(self.clock, [2, 2]))


def test_a_loader_that_lightning_replaces_between_epochs_counts_anew(tmp_path, monkeypatch, caplog):
    clock = Clock()
    monkeypatch.setattr(loading_time, "time", clock)
    trainer = pl.Trainer(
        accelerator="cpu", logger=CSVLogger(tmp_path, name="", version=""), callbacks=[LoadingTimeMonitor()], max_epochs=3,
        log_every_n_steps=1, reload_dataloaders_every_n_epochs=1, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        trainer.fit(Steps(clock), datamodule=Reloaded(clock))
    with open(tmp_path / "metrics.csv") as file:
        assert [float(row["train/waiting"]) for row in csv.DictReader(file)] == pytest.approx([2 / 8] * 6)
    assert "Waited for data 25.0% of the training time" in caplog.text


def test_a_timed_loader_yields_every_batch_on_every_pass():
    loader = TimedDataLoader(range(5), batch_size=2)
    for _ in range(2):
        assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("share", "num_workers", "expected"),
    [
        (0.012, 0, "Waited for data 1.2% of the training time"),
        (
            0.4,
            0,
            "Waited for data 40.0% of the training time: the training process loads by itself. Set data.num_workers=2 to load in parallel",
        ),
        (0.4, 2, "Waited for data 40.0% of the training time: 2 data-loader workers do not keep up. Set a larger data.num_workers"),
    ],
)
def test_the_sentence_names_a_remedy_above_the_threshold(share, num_workers, expected):
    sentence, _, condition = format_waiting(share, num_workers).partition(", where")
    assert (sentence, condition) == (expected, " there are free cores" if share > 0.05 else "")
