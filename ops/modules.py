"""The operators as modules, named and called as torchvision's: `RoIAlign(7, 1 / 16, 2, aligned=True)(features, boxes)`."""

from torch import Tensor, nn

from roi_quantization.ops import functional


class _RoIModule(nn.Module):
    def __init__(self, output_size: functional.Size, spatial_scale: float, **options: object) -> None:
        super().__init__()
        self.output_size, self.spatial_scale, self.options = output_size, spatial_scale, options

    def extra_repr(self) -> str:
        options = "".join(f", {k}={v}" for k, v in self.options.items())
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}{options}"


class RoIPool(_RoIModule):
    """See `ops.roi_pool`."""

    def __init__(self, output_size: functional.Size, spatial_scale: float) -> None:
        super().__init__(output_size, spatial_scale)

    def forward(self, features: Tensor, boxes: functional.Boxes) -> Tensor:
        return functional.roi_pool(features, boxes, self.output_size, self.spatial_scale)


class RoIAlign(_RoIModule):
    """See `ops.roi_align`."""

    def __init__(
        self, output_size: functional.Size, spatial_scale: float, sampling_ratio: int, aligned: bool = False, reduce: str = "mean"
    ) -> None:
        super().__init__(output_size, spatial_scale, sampling_ratio=sampling_ratio, aligned=aligned, reduce=reduce)

    def forward(self, features: Tensor, boxes: functional.Boxes) -> Tensor:
        return functional.roi_align(features, boxes, self.output_size, self.spatial_scale, **self.options)


class RoIWarp(_RoIModule):
    """See `ops.roi_warp`."""

    def __init__(
        self, output_size: functional.Size, spatial_scale: float, sampling_ratio: int = 2, aligned: bool = True, reduce: str = "mean"
    ) -> None:
        super().__init__(output_size, spatial_scale, sampling_ratio=sampling_ratio, aligned=aligned, reduce=reduce)

    def forward(self, features: Tensor, boxes: functional.Boxes) -> Tensor:
        return functional.roi_warp(features, boxes, self.output_size, self.spatial_scale, **self.options)


class PrRoIPool(_RoIModule):
    """See `ops.prroi_pool`."""

    def __init__(self, output_size: functional.Size, spatial_scale: float, half_pixel: bool = False) -> None:
        super().__init__(output_size, spatial_scale, half_pixel=half_pixel)

    def forward(self, features: Tensor, boxes: functional.Boxes) -> Tensor:
        return functional.prroi_pool(features, boxes, self.output_size, self.spatial_scale, **self.options)
