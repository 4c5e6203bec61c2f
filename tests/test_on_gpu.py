"""What is promised of trainings, on a GPU: pytest -m gpu. The slow ones of test_resume.py run there with ROI_TRAINER=gpu."""

import pytest
import torch

from roi_quantization.detection.runs.training_checkpoints import periodic_checkpoints
from roi_quantization.scripts.train import train
from tests.faults import power_cut
from tests.trainings import configuration, run_outcome

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("threads_as_before"),
]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("roi", ["align", "align_max", "pool", "prroi", "warp"])
def test_a_rerun_and_a_run_that_was_killed_end_as_the_first(data, tmp_path, inject_fault, roi, precision):
    """Step 3 is the second of two in its epoch."""
    knobs = ["trainer=gpu", f"trainer.precision={precision}", f"roi={roi}"]
    for name in ("uninterrupted", "again"):
        train(configuration(tmp_path / name, data, *knobs))
    inject_fault(3, power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(configuration(tmp_path / "killed", data, *knobs))
    train(configuration(tmp_path / "killed", data, *knobs, "resume=auto"))
    assert run_outcome(tmp_path / "again") == run_outcome(tmp_path / "uninterrupted")
    assert run_outcome(tmp_path / "killed") == run_outcome(tmp_path / "uninterrupted")


@pytest.mark.parametrize("fused", ["null", "false"])
def test_weights_of_a_non_finite_loss_are_in_no_checkpoint(data, tmp_path, fused):
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf)"):
        train(configuration(tmp_path, data, "trainer=gpu", "optim.groups.lr=1e20", f"optim.optimizer.fused={fused}"))
    weights = torch.load(periodic_checkpoints(tmp_path)[0], weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for name, value in weights.items() if name.endswith((".weight", ".bias")))
