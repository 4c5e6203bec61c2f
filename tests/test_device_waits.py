"""A training step does not wait for a GPU. Without one, a device whose tensors have no content shows it: reading them is an error."""

from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch.overrides import TorchFunctionMode

from roi_quantization import ops
from roi_quantization.detection.data.loading_time import LoadingTimeMonitor, TimedDataLoader
from roi_quantization.detection.model.lightning_module import DetectionModule
from roi_quantization.detection.model.optim import one_cycle, parameter_groups
from roi_quantization.detection.runs.interruption import GracefulStop, TerminateOnNonFiniteLoss
from roi_quantization.detection.runs.progress import TrainingProgressBar
from roi_quantization.detection.runs.step_flags import StepFlags
from tests.detection.model.test_fast_rcnn import batch, make

STEPS = 4


class NoDevice(CPUAccelerator):
    def setup_device(self, device):
        assert device.type == "meta"


class Unread(SingleDeviceStrategy):
    """Trains without content, and leaves it where it is in the end."""

    def __init__(self):
        super().__init__(torch.device("meta"), NoDevice())

    def reduce(self, tensor, *args, **kwargs):
        return torch.tensor(STEPS)  # Lightning reads the length of the loader, before the first step

    def teardown(self):
        self.lightning_module.trainer._logger_connector.reset_metrics()
        self.lightning_module.trainer._results.clear()


class UnreadFlags(StepFlags):
    """Of a device that has noticed nothing."""

    def _start_copy(self, flags):
        assert flags.device.type == "meta"
        return torch.zeros(flags.shape), SimpleNamespace(synchronize=lambda: None)


class NoValuesFromPython(TorchFunctionMode):
    """A number that Python sends to a GPU waits for it too, and is no error on a device without content."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            assert out.device.type == "cpu", f"{function.__name__}{args} waits for the device"
        return out


class Watched(DetectionModule):
    """Whose steps after the first, in which Lightning creates its sums, are watched."""

    def on_train_start(self):
        with mock.patch.object(torch.Tensor, "cpu", lambda count: torch.zeros(count.shape, dtype=count.dtype)):
            super().on_train_start()  # copies the number of averages to the CPU

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 1:
            self.watch = NoValuesFromPython()
            self.watch.__enter__()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == STEPS - 1:
            self.watch.__exit__(None, None, None)


def fit(tmp_path, module, **options):
    stop = GracefulStop()
    watch = TerminateOnNonFiniteLoss(tmp_path, 0, stop)
    if not torch.cuda.is_available():
        watch.flags = UnreadFlags()
    trainer = pl.Trainer(
        max_steps=STEPS, callbacks=[stop, watch, LoadingTimeMonitor(), TrainingProgressBar()], logger=False, gradient_clip_val=1.0,
        log_every_n_steps=10, enable_checkpointing=False, enable_model_summary=False, default_root_dir=tmp_path, **options,
    )  # fmt: skip
    trainer.fit(module, TimedDataLoader([batch((64, 64), (48, 80))] * STEPS, batch_size=None, pin_memory=torch.cuda.is_available()))
    return trainer


def module_of(kind, operator=ops.roi_align, average=False):
    detector = make()
    detector.roi_heads.box_roi_pool.operator = operator
    groups, adamw = partial(parameter_groups, lr=1e-3, weight_decay=0.1), partial(torch.optim.AdamW, fused=None)
    return kind(detector, groups, adamw, one_cycle, average=torch.optim.swa_utils.AveragedModel if average else None)


@pytest.mark.parametrize("average", [False, True])
def test_a_step_reads_nothing_from_the_device_and_sends_no_numbers(tmp_path, average):
    trainer = fit(tmp_path, module_of(Watched, average=average), strategy=Unread())
    assert trainer.global_step == STEPS and next(trainer.lightning_module.detector.parameters()).is_meta


def test_the_device_without_content_refuses_what_a_gpu_would_wait_for(tmp_path):
    class Reading(DetectionModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/rounded", round(loss.item()))
            return loss

    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):
        fit(tmp_path, module_of(Reading), strategy=Unread())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("operator", [ops.roi_align, ops.roi_pool])
def test_pytorch_sees_no_wait_for_a_gpu(tmp_path, operator):
    class Strict(DetectionModule):
        def on_train_batch_start(self, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("error" if batch_idx else "default")  # the first compiles

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == STEPS - 1:
                torch.cuda.set_sync_debug_mode("default")

    try:
        assert fit(tmp_path, module_of(Strict, operator), accelerator="cuda", devices=1).global_step == STEPS
    finally:
        torch.cuda.set_sync_debug_mode("default")
