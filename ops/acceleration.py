"""The CPU kernels of this package behind torchvision's own operators, for unmodified detectors.

`torchvision::roi_align`, `torchvision::roi_pool` and their backwards get other CPU kernels through `torch.library`. Whatever calls
`torchvision.ops.roi_align`, `RoIAlign`, `MultiScaleRoIAlign`, `roi_pool` or `RoIPool` runs them, a Faster, Mask or Keypoint R-CNN included.
Schemas, autograd and autocast stay torchvision's. CUDA stays torchvision's too, until the kernels there are measured to be faster.
"""

from types import TracebackType

import torch
import torchvision
from torch import Tensor

from roi_quantization.ops.cpu import kernels
from roi_quantization.ops.functional import ROI_POOL, place_bins, roi_align
from roi_quantization.ops.geometry import LatticeRule

_SCHEMAS = {
    "roi_align": "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, int sampling_ratio, "
    "bool aligned) -> Tensor",
    "_roi_align_backward": "(Tensor grad, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "SymInt batch_size, SymInt channels, SymInt height, SymInt width, int sampling_ratio, bool aligned) -> Tensor",
    "roi_pool": "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) -> (Tensor, Tensor)",
    "_roi_pool_backward": "(Tensor grad, Tensor rois, Tensor argmax, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "SymInt batch_size, SymInt channels, SymInt height, SymInt width) -> Tensor",
}


class accelerate_torchvision:
    """Run the CPU kernels of this package wherever torchvision's RoIAlign and RoIPool are called, until `restore` or the end of a `with`.

    ```python
    roi_quantization.accelerate_torchvision()         # for the rest of the program
    with roi_quantization.accelerate_torchvision():   # or for a part of it
        detections = detector(images)
    ```

    Values are torchvision's to the rounding of float32 (RoIPool's to the bit); sums are formed in another order. Differences: a box with
    a NaN or of an image that is not there is a ValueError, where torchvision reads whatever lies there; a NaN in the map is a bin's largest
    value, where torchvision passes over it; RoIPool of a bin of -inf alone is -inf, where torchvision's is the smallest finite number; a
    cell whose weight in RoIAlign is 0 is not read, where torchvision's product of it with infinity is NaN. Replaces kernels of the whole
    process, for all threads.

    Raises:
        RuntimeError: torchvision has other operators than those known here, or they are replaced already; nothing is changed.
    """

    _active: "accelerate_torchvision | None" = None

    def __init__(self) -> None:
        if accelerate_torchvision._active is not None:
            raise RuntimeError(
                "torchvision's RoI operators are replaced already. Call restore() of what accelerate_torchvision() returned first."
            )
        for name, known in _SCHEMAS.items():
            operator = getattr(torch.ops.torchvision, name, None)
            schema = str(operator.default._schema) if operator is not None else "missing"
            if schema != f"torchvision::{name}{known}":
                raise RuntimeError(
                    f"torchvision {torchvision.__version__} has another operator {name} than the one known here: {schema}. "
                    "Nothing was replaced; install torchvision 0.26 to 0.29, or call roi_quantization.ops directly."
                )
        library = torch.library.Library("torchvision", "IMPL")
        for name, kernel in _KERNELS.items():
            library.impl(name, kernel, "CPU")
        self._library: torch.library.Library | None = library
        accelerate_torchvision._active = self

    def restore(self) -> None:
        """Give torchvision its own kernels back. A second call does nothing."""
        if self._library is not None:
            self._library = None  # the last reference: PyTorch takes the kernels back with it
            accelerate_torchvision._active = None

    def __enter__(self) -> "accelerate_torchvision":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.restore()


def _roi_align(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int, sampling_ratio: int, aligned: bool
) -> Tensor:
    return roi_align(input, rois, (pooled_height, pooled_width), spatial_scale, sampling_ratio, aligned)


def _roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch_size: int,
    channels: int,
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    features = grad.new_empty(batch_size, channels, height, width)  # its shape alone is read before the gradient is written to it
    rule = LatticeRule(half_pixel=aligned, sampling_ratio=sampling_ratio)
    image, y, x = place_bins(rule, features, rois, (pooled_height, pooled_width), spatial_scale)
    kernels.lattice_backward(grad, None, grad.new_empty(0), image, y, x, "mean", features, False)
    return features


def _roi_pool(input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int) -> tuple[Tensor, Tensor]:
    image, y, x = place_bins(ROI_POOL, input, rois, (pooled_height, pooled_width), spatial_scale)
    return kernels.max_of_cells(input, image, y, x)


def _roi_pool_backward(
    grad: Tensor,
    rois: Tensor,
    argmax: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch_size: int,
    channels: int,
    height: int,
    width: int,
) -> Tensor:
    return kernels.scatter_to_cells(grad, argmax, rois[:, 0].long(), (batch_size, channels, height, width))


_KERNELS = {
    "roi_align": _roi_align,
    "_roi_align_backward": _roi_align_backward,
    "roi_pool": _roi_pool,
    "_roi_pool_backward": _roi_pool_backward,
}
