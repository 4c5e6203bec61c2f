"""What does quantizing RoI coordinates cost a detector? The operators, a Fast R-CNN that measures them, and their configurations.

Public are `load` and `Detector`, which detect objects in pictures; `compose`, `train` and `evaluate`, which run a configuration;
`accelerate_torchvision`; and the operators in `roi_quantization.ops`.

In a checkout the subpackages are folders of its top level, which the installation puts under this name (pyproject.toml).
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roi_quantization.detection.runs.composition import compose as compose
    from roi_quantization.detection.runs.detector import Detector as Detector
    from roi_quantization.detection.runs.detector import load as load
    from roi_quantization.ops.acceleration import accelerate_torchvision as accelerate_torchvision
    from roi_quantization.scripts.eval import evaluate as evaluate
    from roi_quantization.scripts.train import train as train

# imported when first asked for: a script that is not installed has no PyTorch
_LAZY = {
    "accelerate_torchvision": "roi_quantization.ops.acceleration",
    "compose": "roi_quantization.detection.runs.composition",
    "Detector": "roi_quantization.detection.runs.detector",
    "evaluate": "roi_quantization.scripts.eval",
    "load": "roi_quantization.detection.runs.detector",
    "train": "roi_quantization.scripts.train",
}

__version__ = "0.2.0"


def _check_installed() -> None:
    """End the program where the subpackages cannot be imported, or are those of another checkout."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "pyproject.toml").is_file():
        return  # an installed copy: everything lies in this folder
    found = find_spec(f"{__name__}.ops")
    if found is None or found.origin is None:
        sys.exit(f"roi_quantization is not installed. Run: pip install -e {checkout}")
    if Path(found.origin).resolve().parents[1] != checkout:
        sys.exit(
            f"{checkout} is not the checkout that is installed, which is {Path(found.origin).resolve().parents[1]}. "
            f"Run: pip install -e {checkout}"
        )


_check_installed()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]
