"""Features to RoI features: the place where an operator of `ops/` meets a detector."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign, box_area
from torchvision.ops.poolers import _filter_input, _setup_scales

from roi_quantization import ops
from roi_quantization.ops.inputs import check_boxes, check_scale, pair_of_bins, prepare

RoIOperator = Callable[..., Tensor]
"""`(features [N, C, H, W], boxes: list of [L, 4], output_size, spatial_scale) -> [K, C, P, P]`"""

MODULES = (ops.RoIAlign, ops.RoIPool, ops.RoIWarp, ops.PrRoIPool)
MODULES += tuple(getattr(torchvision.ops, name) for name in ("RoIAlign", "RoIPool", "PSRoIAlign", "PSRoIPool"))
"""Operators that have their own output size and scale and are called `(input, rois)`."""

PADDING = 31
"""So many pixels torchvision's detectors add at most below and to the right of an image, up to a multiple of 32."""

MARGIN = 4
"""So many cells a map may have more or less than follow from its scale: convolutions without padding lose some."""


class RoIExtractor(MultiScaleRoIAlign):
    """Applies one RoI operator to one feature map, with the signature that torchvision's `RoIHeads` calls.

    It derives from `MultiScaleRoIAlign` because torchvision's `FasterRCNN(box_roi_pool=...)` takes nothing else; what it computes is the
    operator alone.

    Args:
        operator: any callable `(features, boxes, output_size, spatial_scale)`, such as `functools.partial(ops.roi_align,
            sampling_ratio=2)`.
        output_size: P, the pooled height and width in bins, or `(height, width)`; the operator gets an int where they are equal.
        spatial_scale: cells per pixel, 1 / stride of the feature map. `MultiScaleRoIAlign` infers it, this does not.
    """

    def __init__(self, operator: RoIOperator, output_size: int | Sequence[int], spatial_scale: float):
        _check_operator(operator)
        check_scale(spatial_scale)
        super().__init__(featmap_names=["0"], output_size=pair_of_bins(output_size), sampling_ratio=0)
        self.operator = operator
        self.spatial_scale = spatial_scale

    def forward(
        self, features: Tensor | Mapping[str, Tensor], boxes: list[Tensor], image_shapes: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """Pool boxes from the one map.

        Args:
            features: the map `[N, C, H, W]`, or a mapping that holds it alone (torchvision's backbones give one).
            boxes: one `[L, 4]` an image, `(x1, y1, x2, y2)` in pixels.
            image_shapes: (height, width) of each image in pixels, without its padding, as torchvision passes them. Where they are given as
                integers, the size of the map is compared with them; not in code that is compiled, exported or traced.

        Returns:
            `[K, C, P, P]`, K the number of boxes of all images, in their order.

        Raises:
            ValueError: `spatial_scale` does not fit the sizes of the map and the images, and another power of two does; several maps; or
                the operator gives another number of bins.
            TypeError, ValueError: what the operator raises, such as those of `ops` for a box that is NaN (on a CPU).
        """
        if isinstance(features, Mapping):
            if len(features) != 1:
                raise ValueError(f"a RoI operator works on one feature map, the backbone gives {len(features)}: {', '.join(features)}")
            (features,) = features.values()
        _check_map(features, self.spatial_scale, image_shapes)
        return _pool(self.operator, features, boxes, self.output_size, self.spatial_scale)

    def __repr__(self) -> str:
        return f"RoIExtractor(operator={self.operator}, output_size={_bins(self.output_size)}, spatial_scale={self.spatial_scale})"


class MultiScaleRoIExtractor(MultiScaleRoIAlign):
    """Applies one RoI operator to a feature pyramid: each box on the level that torchvision's `MultiScaleRoIAlign` reads it from.

    Scales and levels are computed by torchvision's code, from the maps and images of each call. (`MultiScaleRoIAlign` keeps the scales of
    its first call. They are the same as long as no image is so small that its padding changes them.)

    The operator is called as it is. In a detector with torchvision's weights it needs what they were trained with: the pooler's number of
    samples and no shift by half a pixel, as `functools.partial(ops.roi_warp, sampling_ratio=pooler.sampling_ratio, aligned=False)`. Each
    pooler of a detector is replaced by itself: `box_roi_pool`, `mask_roi_pool` and `keypoint_roi_pool`.

    Args:
        operator: see `RoIExtractor`.
        pooler: the one that this takes the place of. Its names of maps, output size and canonical level are kept, its `sampling_ratio` is
            not.
    """

    def __init__(self, operator: RoIOperator, pooler: MultiScaleRoIAlign):
        _check_operator(operator)
        if not isinstance(pooler, MultiScaleRoIAlign):
            raise ValueError(
                f"pooler: expected the MultiScaleRoIAlign to take the place of, such as detector.roi_heads.box_roi_pool, got {pooler!r}"
            )
        super().__init__(
            pooler.featmap_names,
            pooler.output_size,
            sampling_ratio=0,
            canonical_scale=pooler.canonical_scale,
            canonical_level=pooler.canonical_level,
        )
        self.operator = operator

    def forward(self, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool each box from the map that torchvision chooses for its size.

        Args:
            features: the maps by name, finest first, each `[N, C, H, W]`.
            boxes: one `[L, 4]` an image, `(x1, y1, x2, y2)` in pixels.
            image_shapes: (height, width) of each image in pixels, without its padding.

        Returns:
            `[K, C, P, P]`, K the number of boxes of all images, in their order.

        Raises:
            TypeError, ValueError: none of the maps is there, or the finest is not the first; boxes of another shape, type or device, or not
                one tensor an image; a box that is NaN or infinite (on a CPU; elsewhere the operator decides, and those of `ops` give NaN);
                the operator gives another number of bins, or raises the error.
        """
        maps = _filter_input(features, self.featmap_names)
        if not maps:
            raise ValueError(f"features: expected some of the maps {', '.join(self.featmap_names)}, got {', '.join(features) or 'none'}")
        image, coordinates, _ = prepare(maps[0], boxes, self.output_size, differentiable_boxes=True)
        if maps[0].is_cpu:  # here, because the operator sees the boxes of one map, and would number them otherwise
            check_boxes(image, coordinates.detach(), maps[0].detach())
        scales, map_levels = _setup_scales(maps, image_shapes, self.canonical_scale, self.canonical_level)
        if scales != sorted(scales, reverse=True):
            raise ValueError(f"features: expected the finest map first, got the scales {', '.join(map(_fraction, scales))}: reverse them")
        # NaN and a negative area have no level, and torchvision leaves their output 0. Here they go with the boxes without area, to the
        # finest map. Where rounded scales leave out a level, its boxes have the coarsest map.
        has_level = box_area(torch.cat(boxes).detach()) >= 0
        levels = torch.where(has_level, map_levels(boxes), 0).clamp(0, len(maps) - 1)
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


def _check_operator(operator: RoIOperator) -> None:
    """Raise ValueError for what is not called as an operator, such as a module in the place of a function."""
    kind = operator if isinstance(operator, type) else type(operator)
    has_own_size = issubclass(kind, MultiScaleRoIAlign) or getattr(kind, "forward", None) in {module.forward for module in MODULES}
    if has_own_size or not callable(operator):
        what = f"{kind.__name__}, which has an output size and a scale of its own" if has_own_size else repr(operator)
        raise ValueError(
            f"operator: got {what}. Expected a function, such as functools.partial(roi_align, sampling_ratio=2, aligned=True) with the "
            "roi_align of roi_quantization.ops, or a callable (features, boxes, output_size, spatial_scale) of your own"
        )


def _pool(operator: RoIOperator, features: Tensor, boxes: list[Tensor], size: tuple[int, int], scale: float) -> Tensor:
    """Call the operator, and check that the head gets the size it is made for."""
    pooled = operator(features, boxes, _bins(size), scale)
    if tuple(pooled.shape[2:]) != tuple(size):
        got = " x ".join(map(str, pooled.shape[2:]))
        raise ValueError(f"the RoI operator gives {got} bins, the head wants {size[0]} x {size[1]}. Let it use its argument output_size")
    return pooled


def _check_map(features: Tensor, scale: float, image_shapes: Sequence[Sequence[int]] | None) -> None:
    """Raise ValueError where the scale does not fit the sizes of map and images, and another power of two does.

    It has to be another that fits: a map that is larger may be of images that were padded to some fixed size. Only Python's integers are
    looked at, so that no device is waited for and no guard is added to a graph.
    """
    if image_shapes is None or torch.compiler.is_compiling() or not isinstance(features, Tensor):
        return
    cells, shapes = tuple(features.shape[2:]), [tuple(shape) for shape in image_shapes]
    sizes = [*cells, *(side for shape in shapes for side in shape)]
    if not shapes or not all(isinstance(size, int) and size > 0 for size in sizes) or any(len(shape) != 2 for shape in shapes):
        return
    pixels = [max(sides) for sides in zip(*shapes, strict=True)]

    def fits(scale: float) -> bool:
        return all(scale * n - MARGIN <= there <= scale * (n + PADDING) + MARGIN for n, there in zip(pixels, cells, strict=True))

    longer = pixels.index(max(pixels))
    fitting = 2.0 ** round(math.log2(cells[longer] / pixels[longer]))
    if not fits(scale) and fits(fitting):
        sides, expected = (" x ".join(f"{n:g}" for n in size) for size in (pixels, [round(scale * n, 1) for n in pixels]))
        raise ValueError(
            f"spatial_scale={_fraction(scale)}: the map has {cells[0]} x {cells[1]} cells for images of {sides} pixels (height x width), "
            f"and about {expected} are expected. The scale is the number of cells per pixel, 1 / stride. "
            f"Set spatial_scale={_fraction(fitting)}"
        )


def _fraction(scale: float) -> str:
    return f"1/{1 / scale:g}" if scale < 1 else f"{scale:g}"


def _bins(size: tuple[int, int]) -> int | tuple[int, int]:
    """An int where height and width are equal."""
    height, width = size
    return height if height == width else (height, width)
