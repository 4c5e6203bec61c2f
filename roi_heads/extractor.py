"""Features to RoI features: the place where an operator of `ops/` meets a detector."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from roi_quantization.ops.inputs import pair_of_bins

RoIOperator = Callable[..., Tensor]
"""`(features [N, C, H, W], boxes: list of [L, 4], output_size, spatial_scale) -> [K, C, P, P]`"""


class RoIExtractor(MultiScaleRoIAlign):
    """Applies one RoI operator to one feature map, with the signature that torchvision's `RoIHeads` calls.

    It derives from `MultiScaleRoIAlign` because torchvision's `FasterRCNN(box_roi_pool=...)` takes nothing else; what it computes is the
    operator alone.

    Args:
        operator: any callable `(features, boxes, output_size, spatial_scale)`, such as `functools.partial(ops.roi_align,
            sampling_ratio=2)`.
        output_size: P, the pooled height and width in bins, or `(height, width)`; the operator gets an int where they are equal.
        spatial_scale: cells per pixel, 1 / stride of the feature map.
    """

    def __init__(self, operator: RoIOperator, output_size: int | Sequence[int], spatial_scale: float):
        super().__init__(featmap_names=["0"], output_size=pair_of_bins(output_size), sampling_ratio=0)
        self.operator = operator
        self.spatial_scale = spatial_scale

    def forward(self, features: Tensor | Mapping[str, Tensor], boxes: list[Tensor], image_shapes: object = None) -> Tensor:
        """
        Args:
            features: the map `[N, C, H, W]`, or a mapping that holds it alone (torchvision's backbones give one).
            boxes: one `[L, 4]` an image, `(x1, y1, x2, y2)` in pixels.
            image_shapes: not used; torchvision passes it to find the scale of each map.

        Returns:
            `[K, C, P, P]`, K the number of boxes of all images, in their order.
        """
        if isinstance(features, Mapping):
            if len(features) != 1:
                raise ValueError(f"a RoI operator works on one feature map, the backbone gives {len(features)}: {', '.join(features)}")
            (features,) = features.values()
        return self.operator(features, boxes, self._bins(), self.spatial_scale)

    def _bins(self) -> int | tuple[int, int]:
        height, width = self.output_size
        return height if height == width else (height, width)

    def __repr__(self) -> str:
        return f"RoIExtractor(operator={self.operator}, output_size={self._bins()}, spatial_scale={self.spatial_scale})"
