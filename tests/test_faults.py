"""Failures of the machine, of the data and of the loss: an error that says what to do, and no checkpoint lost."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException

from roi_quantization.detection.common import files
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.files import NotWrittenError
from roi_quantization.detection.runs.checkpoint import load_checkpoint
from roi_quantization.detection.runs.interruption import GracefulStop, TerminateOnNonFiniteLoss, explain_errors, reraise_signal
from roi_quantization.detection.runs.setup import check_metric
from roi_quantization.detection.runs.step_flags import StepFlags
from roi_quantization.detection.runs.training_checkpoints import periodic_checkpoints
from roi_quantization.scripts.train import train
from tests.faults import full_disk, power_cut
from tests.trainings import configuration, run_outcome

pytestmark = pytest.mark.usefixtures("threads_as_before")


def test_a_non_finite_loss_ends_the_run_and_names_the_batch(data, tmp_path):
    message = r"the loss is nan in step \d \(epoch \d, batch \d, images \[.*the largest weight .*e\+\d\d.*resume="
    with pytest.raises(FloatingPointError, match=message):
        train(configuration(tmp_path, data, "optim.groups.lr=1e20"))
    found = json.loads((tmp_path / "nan_loss.json").read_text())
    assert len(found["image_ids"]) == 4 and found["seed"] == 0
    assert periodic_checkpoints(tmp_path), "no checkpoint is lost"

    (tmp_path / "nan_loss.json").unlink()
    with pytest.raises(FloatingPointError, match=f"step {found['step']} "):
        train(configuration(tmp_path, data, "optim.groups.lr=1e20", f"resume={tmp_path}"))
    assert json.loads((tmp_path / "nan_loss.json").read_text()) == found, "it reaches the same batch again"


class LateFlags(StepFlags):
    """Are read as a GPU's."""

    def _start_copy(self, flags):
        return flags.clone(), SimpleNamespace(synchronize=lambda: None)


@pytest.fixture
def watched(tmp_path):
    """The callback, the model and the trainer of a training of one weight that has come to the batch of image 7."""
    model = torch.nn.Linear(1, 1, bias=False)
    trainer = SimpleNamespace(global_step=0, current_epoch=0, global_rank=0, world_size=1, optimizers=[], precision_plugin=None)
    trainer.optimizers.append(torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))
    watch = TerminateOnNonFiniteLoss(tmp_path, 0, GracefulStop())
    watch.on_train_batch_start(trainer, model, ([], [{"image_id": 7}]), 0)
    return watch, model, trainer


def test_without_a_checkpoint_the_same_command_reaches_the_batch_again(watched):
    watch, model, trainer = watched
    with pytest.raises(FloatingPointError, match=r"images \[7\]\).* and the same command comes to this batch again\. If"):
        watch.on_before_backward(trainer, model, torch.tensor(float("nan")))


def late_step(watch, model, trainer, factor):
    """A step on a device that is not waited for, with this factor of its loss."""
    loss = factor * model(torch.ones(1, 1)).sum()
    watch.on_before_backward(trainer, model, loss)
    model.zero_grad()
    loss.backward()
    trainer.optimizers[0].step()
    trainer.global_step += 1


READERS = {
    "the next step": lambda watch, trainer, model: watch.on_before_backward(trainer, model, torch.tensor(1.0)),
    "a checkpoint": lambda watch, trainer, model: watch.on_save_checkpoint(trainer, model, {}),
    "a validation": lambda watch, trainer, model: watch.on_validation_start(trainer, model),
    "the end": lambda watch, trainer, model: watch.on_train_end(trainer, model),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_device_that_is_not_waited_for_drops_the_update_and_tells_before_anything_is_kept(watched, reader):
    watch, model, trainer = watched
    watch.flags = LateFlags()
    late_step(watch, model, trainer, 1.0)
    weight = model.weight.item()
    late_step(watch, model, trainer, float("inf"))
    assert model.weight.item() == weight
    watch.on_train_batch_start(trainer, model, ([], [{"image_id": 8}]), 1)
    largest = re.escape(f"the largest weight {abs(weight):.3g}")
    with pytest.raises(FloatingPointError, match=rf"the loss is -?inf in step 1 \(epoch 0, batch 0, images \[7\]\), {largest}"):
        READERS[reader](watch, trainer, model)


@pytest.mark.parametrize(
    "file",
    [
        "step_0000003.ckpt",
        "results.json",
        *(pytest.param(file, marks=pytest.mark.slow) for file in ("best.ckpt", "metrics.csv", "last.ckpt")),
    ],
)
def test_a_full_disk_loses_nothing_and_the_run_goes_on(uninterrupted, data, tmp_path, monkeypatch, file):
    """The disk is full while this file is written; metrics.csv is Lightning's, the others are written atomically."""
    folder = tmp_path / "run"
    real, happened = files.atomic_file, []

    @contextmanager
    def atomic_file(path):
        now = os.path.basename(path) == file and not happened and (file != "best.ckpt" or periodic_checkpoints(folder))
        with full_disk(1) if now else nullcontext():
            happened.extend([path] * bool(now))
            with real(path) as opened:
                yield opened

    def save(self):
        now = file == "metrics.csv" and not happened and periodic_checkpoints(folder)
        with full_disk(1) if now else nullcontext():
            happened.extend([file] * bool(now))
            written(self)

    written = CSVLogger.save
    monkeypatch.setattr(CSVLogger, "save", save)
    monkeypatch.setattr(files, "atomic_file", atomic_file)
    with pytest.raises(NotWrittenError, match=rf"{tmp_path}.* could not be written: File too large.*Make room there.*resume=auto"):
        train(configuration(folder, data))
    assert happened and not (folder / "metrics.json").exists() and not list(folder.glob(".*.tmp"))
    for path in folder.glob("*.ckpt"):
        load_checkpoint(path)
    train(configuration(folder, data, f"resume={folder}"))
    assert run_outcome(folder) == uninterrupted


def test_a_run_folder_that_is_moved_away_is_not_created_again(uninterrupted, data, tmp_path, inject_fault):
    run, moved = tmp_path / "run", tmp_path / "moved"
    inject_fault(3, lambda: run.rename(moved))
    with pytest.raises(FileNotFoundError, match=rf"the run folder {run} is gone.*resume=<the folder>"):
        train(configuration(run, data))
    assert [path.name for path in periodic_checkpoints(moved)] == ["step_0000003.ckpt", "step_0000002.ckpt"]
    assert not list(tmp_path.glob("run/*.ckpt")), "the run is not split"
    train(configuration(moved, data, f"resume={moved}"))
    assert run_outcome(moved) == uninterrupted


def test_a_killed_data_loader_worker_says_why_and_how_to_go_on(uninterrupted, data, tmp_path, inject_fault):
    """As the system kills one when memory runs out."""
    inject_fault(3, lambda: [os.kill(process.pid, signal.SIGKILL) for process in multiprocessing.active_children()])
    message = r"a data-loader worker died: .*pid.*memory has run out.*data\.num_workers.*resume=auto"
    with pytest.raises(RuntimeError, match=message):
        train(configuration(tmp_path, data, "data.num_workers=1"))
    assert [path.name for path in periodic_checkpoints(tmp_path)] == ["step_0000003.ckpt", "step_0000002.ckpt"]
    train(configuration(tmp_path, data, f"resume={tmp_path}"))
    assert run_outcome(tmp_path) == uninterrupted


def test_changed_data_are_refused_unless_same_data_is_false(data, tmp_path, inject_fault):
    root, run = shutil.copytree(data, tmp_path / "data"), tmp_path / "run"
    inject_fault(3, power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(configuration(run, root))
    path = root / "annotations/instances_train.json"
    instances = json.loads(path.read_text())
    instances["annotations"][0]["bbox"][0] += 1
    path.write_text(json.dumps(instances))
    message = r"the data are not those that this run began with: 1 images of train have other annotations \(the first is \d+\)"
    with pytest.raises(ValueError, match=message):
        train(configuration(run, root, f"resume={run}"))
    assert [path.name for path in periodic_checkpoints(run)] == ["step_0000003.ckpt", "step_0000002.ckpt"]
    train(configuration(run, root, f"resume={run}", "checkpoint.same_data=false"))
    assert (run / "metrics.json").is_file()


def test_mistakes_that_would_show_after_training_are_errors_before_it(data, tmp_path):
    for override, message in [
        ("cross=[aling]", "there is no operator aling. Choose from align, "),
        ("optimized_metric=test/AP", "optimized_metric=test/AP: the best checkpoint is chosen on the val split, by one of val/AP, "),
        ("optimized_metric=val/AP_small", "by one of val/AP, val/AP50, val/AP75, val/loss, "),
        ("trainer.precision=bf16-true", "rounds boxes as well.* bf16-mixed"),
        ("trainer.max_steps=100", r"trainer.max_steps=100: with trainer.max_epochs=\d+ training would end after \d+ steps"),
        ("trainer.max_epochs=-1", "optim.schedule needs the length of the training. Set trainer.max_epochs or trainer.max_steps"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(configuration(tmp_path, data, override))
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.optimizer.betas=[2,2]"], r"optim\.optimizer: Invalid beta parameter at index 0: 2"),
        (["optim.optimizer.betas=3"], r"optim\.optimizer: "),
        (["optim.schedule.warmup_fraction=2"], r"optim\.schedule\.warmup_fraction=2: expected a number from 0 to 1"),
        (["average=ema", "average.multi_avg_fn.decay=2"], r"average: Invalid decay value 2"),
    ],
)
def test_what_a_library_refuses_has_the_name_of_the_setting(data, tmp_path, overrides, message):
    with pytest.raises(InputError, match=f"^{message}"):
        train(configuration(tmp_path, data, *overrides))


def test_without_objects_ap_chooses_no_checkpoint():
    assert check_metric("val/loss", validates=True, objects=0) == "min"
    with pytest.raises(ValueError, match="the val split has no objects"):
        check_metric("val/AP", validates=True, objects=0)


def test_a_stopped_evaluation_has_the_exit_status_of_its_signal(tmp_path):
    with pytest.raises(SIGTERMException) as ended, explain_errors(tmp_path):
        raise SIGTERMException
    assert ended.value.code == 143


def test_a_stop_outside_of_training_is_raised():
    with pytest.raises(SIGTERMException), reraise_signal():
        raise SIGTERMException
