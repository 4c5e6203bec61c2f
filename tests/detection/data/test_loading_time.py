"""How long training waits for its data, by a clock that only loading, steps and validations move."""

import csv
import logging

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import Dataset

from roi_quantization.detection.data import loading_time
from roi_quantization.detection.data.loading_time import LoadingTimeMonitor, TimedDataLoader, tell


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


class Slow(Dataset):
    """Numbers, each of which takes so many seconds to load."""

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


def test_the_part_of_the_time_is_that_of_the_interval_in_the_log_and_of_all_at_the_end(tmp_path, monkeypatch, caplog):
    """Batches of 2, 2, 0 and 1 second: in the first two steps 4 of 16 seconds are waited, in the last two 1 of 13, in all 5 of 29."""
    clock = Clock()
    monkeypatch.setattr(loading_time, "time", clock)
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = pl.Trainer(
        accelerator="cpu", logger=logger, callbacks=[LoadingTimeMonitor()], max_epochs=1, log_every_n_steps=2, val_check_interval=1,
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        trainer.fit(Steps(clock), TimedDataLoader(Slow(clock, [2, 2, 0, 1])), TimedDataLoader(Slow(clock, [50])))
    assert clock.now == 5 + 4 * 6 + 4 * 150, "four validations, which count for nothing"
    with open(tmp_path / "metrics.csv") as file:
        assert [float(row["train/waiting"]) for row in csv.DictReader(file)] == pytest.approx([4 / 16, 1 / 13])
    assert "Waited for data 17.2% of the training time: the training process loads by itself" in caplog.text


def test_a_loader_that_is_timed_gives_every_batch_on_every_pass():
    loader = TimedDataLoader(range(5), batch_size=2)
    for _ in range(2):
        assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("share", "num_workers", "told"),
    [
        (0.012, 0, "Waited for data 1.2% of the training time"),
        (0.4, 0, "Waited for data 40.0% of the training time: the training process loads by itself. data.num_workers=2 loads beside it"),
        (0.4, 2, "Waited for data 40.0% of the training time: 2 processes do not keep up. A larger data.num_workers helps"),
    ],
)
def test_the_sentence_has_a_hint_where_it_is_worth_one(share, num_workers, told):
    sentence, _, condition = tell(share, num_workers).partition(", where")
    assert (sentence, condition) == (told, " there are cores to spare" if share > 0.05 else "")
