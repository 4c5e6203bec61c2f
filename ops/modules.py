"""The operators as modules, named and called as torchvision's: `RoIAlign(7, 1 / 16, 2, aligned=True)(input, rois)`.

An attribute that is set later counts from the next call on.
"""

from typing import Literal

from torch import Tensor, nn

from roi_quantization.ops import functional


class _RoIModule(nn.Module):
    def __init__(self, output_size: functional.Size, spatial_scale: float) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self).items() if name != "training" and not name.startswith("_"))


class RoIPool(_RoIModule):
    """RoIPool as a module, with the arguments of `torchvision.ops.RoIPool`. The operator is `ops.roi_pool`.

    Args:
        output_size: P, bins: one number, or (height, width).
        spatial_scale: cells per pixel, 1 / stride.
    """

    def forward(self, input: Tensor, rois: functional.Boxes) -> Tensor:
        """Pool `[N, C, H, W]` at boxes in pixels, one `[L, 4]` an image or `[K, 5]`: `[K, C, P, P]`. Errors: `ops.lattice_pool`."""
        return functional.roi_pool(input, rois, self.output_size, self.spatial_scale)


class RoIAlign(_RoIModule):
    """RoIAlign as a module, with the arguments of `torchvision.ops.RoIAlign`, and `reduce`. The operator is `ops.roi_align`.

    Args:
        output_size: P, bins: one number, or (height, width).
        spatial_scale: cells per pixel, 1 / stride.
        sampling_ratio: samples per bin along each axis; 0 or less: adaptive, ceil(extent / P).
        aligned: whether cell centres lie at i + 0.5, so that half a cell is subtracted. False is torchvision's default.
        reduce: mean or max of a bin's samples.
    """

    def __init__(
        self,
        output_size: functional.Size,
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = False,
        reduce: Literal["mean", "max"] = "mean",
    ) -> None:
        super().__init__(output_size, spatial_scale)
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.reduce = reduce

    def forward(self, input: Tensor, rois: functional.Boxes) -> Tensor:
        """Pool `[N, C, H, W]` at boxes in pixels, one `[L, 4]` an image or `[K, 5]`: `[K, C, P, P]`. Errors: `ops.lattice_pool`."""
        return functional.roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned, self.reduce)


class RoIWarp(_RoIModule):
    """RoIWarp as a module. The operator is `ops.roi_warp`.

    Args:
        output_size: P, bins: one number, or (height, width).
        spatial_scale: cells per pixel, 1 / stride.
        sampling_ratio: samples per bin along each axis; 0 or less: adaptive, ceil(extent / P).
        aligned: whether cell centres lie at i + 0.5, so that half a cell is subtracted. False fits torchvision's weights.
        reduce: mean or max of a bin's samples.
    """

    def __init__(
        self,
        output_size: functional.Size,
        spatial_scale: float,
        sampling_ratio: int = 2,
        aligned: bool = True,
        reduce: Literal["mean", "max"] = "mean",
    ) -> None:
        super().__init__(output_size, spatial_scale)
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.reduce = reduce

    def forward(self, input: Tensor, rois: functional.Boxes) -> Tensor:
        """Pool `[N, C, H, W]` at boxes in pixels, one `[L, 4]` an image or `[K, 5]`: `[K, C, P, P]`. Errors: `ops.lattice_pool`."""
        return functional.roi_warp(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned, self.reduce)


class PrRoIPool(_RoIModule):
    """Precise RoI pooling as a module. The operator is `ops.prroi_pool`.

    Args:
        output_size: P, bins: one number, or (height, width).
        spatial_scale: cells per pixel, 1 / stride.
        half_pixel: whether cell centres lie at i + 0.5; False is the released layer.
    """

    def __init__(self, output_size: functional.Size, spatial_scale: float, half_pixel: bool = False) -> None:
        super().__init__(output_size, spatial_scale)
        self.half_pixel = half_pixel

    def forward(self, input: Tensor, rois: functional.Boxes) -> Tensor:
        """Pool `[N, C, H, W]` at boxes in pixels, one `[L, 4]` an image or `[K, 5]`: `[K, C, P, P]`. Errors: `ops.lattice_pool`."""
        return functional.prroi_pool(input, rois, self.output_size, self.spatial_scale, self.half_pixel)
