"""Fixtures shared by all tests. The project ships no photographs and no weights: tests that want them skip where there are none."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

if not torch.cuda.is_available():  # Triton reads it when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    """Enough to test threading; what runs beside the tests is left a core."""
    torch.set_num_threads(2)


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
