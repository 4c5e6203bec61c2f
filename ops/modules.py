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
    """Calls `ops.roi_pool`, which explains the arguments, with those given here."""

    def forward(self, input: Tensor, rois: functional.Boxes) -> Tensor:
        return functional.roi_pool(input, rois, self.output_size, self.spatial_scale)


class RoIAlign(_RoIModule):
    """Calls `ops.roi_align`, which explains the arguments, with those given here."""

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
        return functional.roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned, self.reduce)


class RoIWarp(_RoIModule):
    """Calls `ops.roi_warp`, which explains the arguments, with those given here."""

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
        return functional.roi_warp(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned, self.reduce)


class PrRoIPool(_RoIModule):
    """Calls `ops.prroi_pool`, which explains the arguments, with those given here."""

    def __init__(self, output_size: functional.Size, spatial_scale: float, half_pixel: bool = False) -> None:
        super().__init__(output_size, spatial_scale)
        self.half_pixel = half_pixel

    def forward(self, input: Tensor, rois: functional.Boxes) -> Tensor:
        return functional.prroi_pool(input, rois, self.output_size, self.spatial_scale, self.half_pixel)
