"""Each run of a sweep is a run of its own for every logger, has the configuration as hyperparameters, and ends."""

import json
from typing import ClassVar

import pytest
from pytorch_lightning.loggers import Logger

from roi_quantization.scripts.train import train
from tests.trainings import configuration

pytestmark = pytest.mark.usefixtures("threads_as_before")


class Service:
    """As Weights & Biases: a process has one run at a time, and starting another one goes on with it until it is finished."""

    current: "Service | None" = None
    runs: ClassVar[list["Service"]] = []

    def __init__(self):
        self.metrics, self.settings, self.finished = {}, {}, False
        Service.runs.append(self)

    @classmethod
    def init(cls):
        if cls.current is None:
            cls.current = cls()
        return cls.current

    def finish(self):
        self.finished, Service.current = True, None


class ServiceLogger(Logger):
    """Logs to `Service`, whose run starts when it is first needed, as `WandbLogger` does."""

    name = version = "service"

    def __init__(self):
        super().__init__()
        self._run = None

    @property
    def experiment(self):
        if self._run is None:
            self._run = Service.init()
        return self._run

    def log_metrics(self, metrics, step=None):
        self.experiment.metrics |= metrics

    def log_hyperparams(self, params, *_, **__):
        self.experiment.settings |= params


def test_two_runs_in_one_process_are_two_runs_of_every_logger(data, tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard, which is not required"
    )
    monkeypatch.setattr(Service, "runs", [])
    loggers = ["logger=tensorboard", "+logger.service={_target_: tests.detection.runs.test_loggers.ServiceLogger}"]
    for seed in (0, 1):
        train(configuration(tmp_path / f"seed{seed}", data, *loggers, f"seed={seed}", "trainer.max_steps=2"))
    first, second = Service.runs
    assert first.finished and second.finished and Service.current is None
    for seed, run in enumerate((first, second)):
        folder = tmp_path / f"seed{seed}"
        assert run.settings["seed"] == seed and run.settings["head"]["extractor"]["operator"]["sampling_ratio"] == 2
        assert run.metrics["test/AP"] == pytest.approx(json.loads((folder / "metrics.json").read_text())["stats"]["AP"], rel=1e-5)
        assert len((folder / "metrics.csv").read_text().splitlines()) > 2
        written = event_accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
        assert {"train/loss", "val/AP", "test/AP"} <= set(written.Tags()["scalars"])
        assert [event.step for event in written.Scalars("train/loss")] == [0, 1], "of this run alone"
        assert f"seed: {seed}" in (folder / "tensorboard" / "hparams.yaml").read_text()
