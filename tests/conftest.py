"""Fixtures shared by all tests. The project ships no photographs and no weights: tests that want them skip where there are none.

The properties (`test_properties.py`) are tried on the same few examples in every run; on many, other ones each time, with
`pytest -k test_properties --hypothesis-profile=long`.
"""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

os.environ.pop("ROI_CACHE", None)  # the user's own images are not for tests to draw or to read
if not torch.cuda.is_available():  # Triton reads it when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")


no_clock = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # a busy machine is no failure
settings.register_profile("few", derandomize=True, max_examples=40, **no_clock)
settings.register_profile("long", max_examples=2000, print_blob=True, **no_clock)
settings.load_profile("few")


@pytest.fixture(scope="session", autouse=True)
def threads():
    """Two, or one for each process of `pytest -n 2`. A test about threading sets its own number."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def _folder(variable: str, default: str) -> Path:
    path = Path(os.environ.get(variable, ROOT.parent / "shared" / default))
    if not path.is_dir():
        pytest.skip(f"needs real data: {path} is not there (set {variable})")
    return path


@pytest.fixture
def real_data() -> Path:
    """Folder with `coco/` and `voc_animals/`, both in COCO's layout."""
    return _folder("ROI_DATA", "data")


@pytest.fixture
def real_weights() -> Path:
    """Folder with `vgg16_features.pth`."""
    return _folder("ROI_WEIGHTS", "weights")


@pytest.fixture
def threads_as_before():
    """For tests of trainings, which set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The folder of the images of `tests.trainings.configuration`; the first training draws them."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def uninterrupted(data, tmp_path_factory) -> dict:
    """The outcome of a short training that was not interrupted."""
    from tests import trainings  # what trains is imported where something is trained

    run, before = tmp_path_factory.mktemp("uninterrupted") / "run", torch.get_num_threads()
    trainings.train(trainings.configuration(run, data))
    torch.set_num_threads(before)
    assert torch.are_deterministic_algorithms_enabled()
    return trainings.run_outcome(run)


@pytest.fixture
def inject_fault(monkeypatch):
    """A function that calls another in the middle of a training step: `inject_fault(step, fault)`, steps counted from 0."""
    from roi_quantization.detection.model.lightning_module import DetectionModule

    training_step = DetectionModule.training_step

    def inject(step, fault):
        def watched(self, batch, batch_idx):
            if self.global_step == step:
                monkeypatch.setattr(DetectionModule, "training_step", training_step)
                fault()
            return training_step(self, batch, batch_idx)

        monkeypatch.setattr(DetectionModule, "training_step", watched)

    return inject
