"""What the scripts add to the Trainer's settings is merged with what is given, and the rest is refused by name."""

from types import SimpleNamespace

import pytest
from pytorch_lightning.callbacks import EarlyStopping, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO

from roi_quantization.detection.common.errors import InputError, MissingPackageError
from roi_quantization.detection.runs.interruption import GracefulStop
from roi_quantization.detection.runs.progress import TrainingProgressBar
from roi_quantization.detection.runs.trainer import (
    build_loggers,
    build_trainer,
    check_limits,
    check_trains_as_configured,
    closed_loggers,
    warn_of_partial_validation,
)
from tests.configuration import composed


@pytest.fixture
def trainer_of(tmp_path):
    def build(*overrides, **given):
        cfg = composed("train", "trainer=cpu", f"run_dir={tmp_path}", *overrides)
        return build_trainer(cfg.trainer, **given)

    return build


def kinds(trainer):
    return {type(callback) for callback in trainer.callbacks}


STOPPING = "{_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: val/loss}"


@pytest.mark.parametrize("callbacks", [STOPPING, f"[{STOPPING}]", f"{{stop: {STOPPING}}}"])
def test_callbacks_of_the_configuration_are_used_beside_the_scripts_own(trainer_of, callbacks):
    trainer = trainer_of(f"+trainer.callbacks={callbacks}", callbacks=[GracefulStop()])
    assert {EarlyStopping, GracefulStop, TrainingProgressBar} <= kinds(trainer)


def test_a_progress_bar_of_the_configuration_replaces_this_projects(trainer_of):
    trainer = trainer_of("+trainer.callbacks=[{_target_: pytorch_lightning.callbacks.TQDMProgressBar}]")
    assert TQDMProgressBar in kinds(trainer) and TrainingProgressBar not in kinds(trainer)
    assert not {TQDMProgressBar, TrainingProgressBar} & kinds(trainer_of("trainer.enable_progress_bar=false"))


def test_plugins_of_the_configuration_are_used(trainer_of):
    trainer = trainer_of("+trainer.plugins=[{_target_: pytorch_lightning.plugins.io.TorchCheckpointIO}]")
    assert type(trainer.strategy.checkpoint_io) is TorchCheckpointIO


def test_loggers_are_merged_or_turned_off(trainer_of, tmp_path):
    ours = CSVLogger(tmp_path, name="ours")
    other = "+trainer.logger={_target_: pytorch_lightning.loggers.CSVLogger, save_dir: ${run_dir}, name: other}"
    assert [logger.name for logger in trainer_of(other, loggers=[ours]).loggers] == ["ours", "other"]
    assert trainer_of("+trainer.logger=false", loggers=[ours]).loggers == []
    assert trainer_of("+trainer.logger=true", loggers=[ours]).loggers == [ours]
    with pytest.raises(InputError, match=r"trainer\.logger=true: there is no logger here"):
        trainer_of("+trainer.logger=true")


def test_a_training_without_a_logger_has_none():
    assert build_loggers(composed("train", "~logger").get("logger")) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+trainer.strategy=ddp_spawn", "trainer.devices=2"], r"trainer\.strategy: spawn is not supported\. Use strategy=ddp"),
        (["+trainer.strategy=ddp_notebook", "trainer.devices=2"], r"trainer\.strategy: fork is not supported"),
        (["+trainer.enable_checkpointing=false"], r"trainer\.enable_checkpointing: the scripts decide this"),
        (["trainer.devices=a"], r"Lightning does not take these settings of trainer: .*devices"),
        (["trainer.precision=half"], r"Lightning does not take these settings of trainer: Precision 'half' is invalid"),
        (["trainer.max_steps=-7"], r"Lightning does not take these settings of trainer: `max_steps`"),
        (["+trainer.steps=3"], r"^trainer\.steps: pytorch_lightning\.Trainer has no such setting"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(trainer_of, overrides, message):
    with pytest.raises(InputError, match=message):
        trainer_of(*overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+trainer.fast_dev_run=true", r"trainer\.fast_dev_run=True: it leaves out loggers and checkpoints"),
        ("+trainer.overfit_batches=3", r"trainer\.overfit_batches=3: .* Set data\.train_subset"),
        ("trainer.gradient_clip_val=-1", r"trainer\.gradient_clip_val=-1: expected a number from 0 on"),
        ("trainer.accumulate_grad_batches=0", r"trainer\.accumulate_grad_batches=0: expected a whole number from 1 on"),
        ("trainer.check_val_every_n_epoch=0", r"trainer\.check_val_every_n_epoch=0: expected a whole number from 1 on"),
        ("trainer.val_check_interval=0", r"trainer\.val_check_interval=0: expected training batches"),
    ],
)
def test_settings_that_change_the_data_of_a_training_or_nothing_are_refused(override, message):
    with pytest.raises(InputError, match=message):
        check_trains_as_configured(composed("train", override).trainer)


@pytest.mark.parametrize("none", [0, 0.0])
def test_an_evaluation_of_nothing_is_refused(none):
    cfg = composed("train", f"+trainer.limit_test_batches={none}").trainer
    with pytest.raises(InputError, match=r"trainer\.limit_test_batches=0.*: nothing would be evaluated"):
        check_limits(cfg, "test")
    check_limits(cfg, "val")


@pytest.mark.parametrize(("limit", "warns"), [("2", True), ("1", True), ("0.5", True), ("1.0", False), ("null", False)])
def test_a_choice_on_a_part_of_val_is_told(limit, warns, caplog):
    warn_of_partial_validation(composed("train", f"+trainer.limit_val_batches={limit}").trainer)
    assert ("the best checkpoint is chosen on a part of val" in caplog.text) == warns


def test_a_missing_tensorboard_names_its_extra(monkeypatch):
    def missing(self, *_, **__):
        raise ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available.")

    monkeypatch.setattr("pytorch_lightning.loggers.TensorBoardLogger.__init__", missing)
    with pytest.raises(MissingPackageError, match=r'logger: csv, tensorboard .* pip install -e "\.\[tensorboard\]", or choose logger=csv'):
        build_loggers(composed("train", "logger=tensorboard", "run_dir=unused").logger)


def test_the_run_of_a_logging_service_ends_with_the_training():
    """Two runs of a sweep in one process would be one run of Weights & Biases."""
    finished = []
    service = SimpleNamespace(experiment=SimpleNamespace(finish=lambda: finished.append("service")))
    trainer = SimpleNamespace(loggers=[service, SimpleNamespace(experiment=object())])
    with pytest.raises(RuntimeError), closed_loggers(trainer):
        raise RuntimeError
    assert finished == ["service"]
