"""Features to RoI features: the place where an operator of `ops/` meets a detector."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import _filter_input, _setup_scales

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
        return _pool(self.operator, features, boxes, self.output_size, self.spatial_scale)

    def __repr__(self) -> str:
        return f"RoIExtractor(operator={self.operator}, output_size={_bins(self.output_size)}, spatial_scale={self.spatial_scale})"


class MultiScaleRoIExtractor(MultiScaleRoIAlign):
    """Applies one RoI operator to a feature pyramid: each box on the level that torchvision's `MultiScaleRoIAlign` reads it from.

    Scales and levels are computed by torchvision's code, from the maps and images of each call. (`MultiScaleRoIAlign` keeps the scales of
    its first call. They are the same as long as no image is so small that its padding changes them.)

    Args:
        operator: see `RoIExtractor`.
        pooler: the one that this takes the place of. Its names of maps, output size and canonical level are kept.
    """

    def __init__(self, operator: RoIOperator, pooler: MultiScaleRoIAlign):
        super().__init__(
            pooler.featmap_names,
            pooler.output_size,
            sampling_ratio=0,
            canonical_scale=pooler.canonical_scale,
            canonical_level=pooler.canonical_level,
        )
        self.operator = operator

    def forward(self, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """
        Args:
            features: the maps by name, finest first, each `[N, C, H, W]`.
            boxes: one `[L, 4]` an image, `(x1, y1, x2, y2)` in pixels.
            image_shapes: (height, width) of each image in pixels, without its padding.

        Returns:
            `[K, C, P, P]`, K the number of boxes of all images, in their order.
        """
        maps = _filter_input(features, self.featmap_names)
        scales, map_levels = _setup_scales(maps, image_shapes, self.canonical_scale, self.canonical_level)
        levels = map_levels(boxes)
        by_image = levels.split([len(of_image) for of_image in boxes])
        pooled = maps[0].new_zeros(len(levels), maps[0].shape[1], *self.output_size)
        for level, (features_of_level, scale) in enumerate(zip(maps, scales, strict=True)):
            there = [of_image[at == level] for of_image, at in zip(boxes, by_image, strict=True)]
            of_level = _pool(self.operator, features_of_level, there, self.output_size, scale)
            pooled[levels == level] = of_level.to(pooled.dtype)  # autocast may choose another for each level
        return pooled

    def __repr__(self) -> str:
        return f"MultiScaleRoIExtractor(operator={self.operator}, maps={self.featmap_names}, output_size={_bins(self.output_size)})"


@contextmanager
def replaced_operator(model: nn.Module, operator: RoIOperator) -> Iterator[None]:
    """Let all extractors of a model use another operator inside the context."""
    extractors = [module for module in model.modules() if isinstance(module, RoIExtractor | MultiScaleRoIExtractor)]
    own = [extractor.operator for extractor in extractors]
    try:
        for extractor in extractors:
            extractor.operator = operator
        yield
    finally:
        for extractor, before in zip(extractors, own, strict=True):
            extractor.operator = before


def _pool(operator: RoIOperator, features: Tensor, boxes: list[Tensor], size: tuple[int, int], scale: float) -> Tensor:
    """Call the operator, and check that the head gets the size it is made for."""
    pooled = operator(features, boxes, _bins(size), scale)
    if tuple(pooled.shape[2:]) != tuple(size):
        got = " x ".join(map(str, pooled.shape[2:]))
        raise ValueError(f"the RoI operator gives {got} bins, the head wants {size[0]} x {size[1]}. Let it use its argument output_size")
    return pooled


def _bins(size: tuple[int, int]) -> int | tuple[int, int]:
    """An int where height and width are equal."""
    height, width = size
    return height if height == width else (height, width)
