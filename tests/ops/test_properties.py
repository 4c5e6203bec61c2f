"""What holds for every map and every box, each in one sentence; the maps and boxes are Hypothesis's (`tests/conftest.py` says how many).

Edges lie on sixteenths of a cell and scales are powers of two, so that projecting, moving and mirroring a box is exact, and two ways to the
same place do not fall to different sides of a rounding.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from .presets import PRESETS, WITHOUT_BOX_GRADIENT, preset

MEAN = sorted(name for name in PRESETS if name == "prroi" or preset(name).keywords["reduce"] == "mean")
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # up to the order of a sum in float64
CELL = 16  # edges are whole numbers of sixteenths


@dataclass
class Scene:
    """A call of an operator: `boxes` `[K, 5]` in pixels, of which a cell has `1 / scale`."""

    operator: str
    features: Tensor
    boxes: Tensor
    output_size: tuple[int, int]
    scale: float

    def pooled(self, **changes) -> Tensor:
        call = replace(self, **changes)
        return preset(call.operator)(call.features, call.boxes, call.output_size, call.scale)

    def moved(self, *cells: float) -> Tensor:
        """The boxes, moved by so many cells (x1, y1, x2, y2)."""
        return self.boxes + torch.tensor([0.0, *cells], dtype=torch.float64) / self.scale

    @property
    def size(self) -> tuple[int, int]:
        return self.features.shape[-2:]


seeds = st.integers(0, 2**32 - 1)


@st.composite
def scenes(draw, operators=tuple(PRESETS), margin=None, bins=(1, 2, 3, 4), off_halves=False):
    """`margin`: cells between boxes, more than a cell wide (at one cell, a least extent, the gradient has a kink), and the ends of the map;
    None lets boxes be anywhere and without area.

    `off_halves`: no edge lies in the middle of a cell, where rounding takes a side.
    """
    height, width = draw(st.integers(4, 9)), draw(st.integers(4, 9))
    scale = draw(st.sampled_from([1.0, 1 / 4, 1 / 16, 2.0]))
    images = draw(st.integers(1, 2))

    def edges(size):
        low, high, least = (-2 * CELL, (size + 2) * CELL, 0) if margin is None else (margin * CELL, (size - margin) * CELL, CELL + 1)
        start = draw(st.integers(low, high - least))
        end = draw(st.integers(start + least, high))
        if off_halves:  # outwards, so that a box does not lose its least extent
            start, end = start - (start % CELL == CELL // 2), end + (end % CELL == CELL // 2)
        return start / CELL / scale, end / CELL / scale

    boxes = []
    for _ in range(draw(st.integers(1, 4))):
        (x1, x2), (y1, y2) = edges(width), edges(height)
        boxes.append([draw(st.integers(0, images - 1)), x1, y1, x2, y2])
    return Scene(
        operator=draw(st.sampled_from(operators)),
        features=torch.randn(images, 3, height, width, generator=torch.Generator().manual_seed(draw(seeds)), dtype=torch.float64),
        boxes=torch.tensor(boxes, dtype=torch.float64),
        output_size=(draw(st.sampled_from(bins)), draw(st.sampled_from(bins))),
        scale=scale,
    )


def noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1), dtype=like.dtype)


@given(scenes(MEAN), st.floats(-3, 3), st.floats(-3, 3))
def test_a_mean_is_linear_in_the_features(scene, a, b):
    other = noise(scene.features)
    assert_close(scene.pooled(features=a * scene.features + b * other), a * scene.pooled() + b * scene.pooled(features=other), **EXACT)


@given(scenes(), st.floats(0, 3))
def test_larger_features_pool_to_larger_ones_and_a_positive_factor_passes_through(scene, factor):
    larger = scene.features + noise(scene.features).abs()
    assert (scene.pooled(features=larger) >= scene.pooled() - 1e-12).all()
    assert_close(scene.pooled(features=factor * scene.features), factor * scene.pooled(), **EXACT)


@given(scenes())
def test_the_gradient_of_the_features_is_the_adjoint(scene):
    """`<pool(F), G> = <F, pool'(G)>`: by linearity for a mean, by Euler's theorem for a maximum, which a positive factor passes through."""
    features = scene.features.requires_grad_()
    pooled = scene.pooled()
    gradient = noise(pooled)
    pooled.backward(gradient)
    assert_close((pooled * gradient).sum(), (features * features.grad).sum(), **EXACT)


@given(scenes())
def test_a_constant_map_gives_no_more_than_the_constant_anywhere(scene):
    pooled = scene.pooled(features=torch.ones_like(scene.features))
    assert (pooled >= 0).all() and (pooled <= 1 + 1e-12).all()


@given(scenes(sorted(set(PRESETS) - {"pool_floor"}), margin=1))
def test_a_constant_map_gives_the_constant_inside(scene):
    """Not so `pool_floor`, whose bins have a cell at least: where there are more of them than cells, the last lie off the map."""
    assert_close(scene.pooled(features=torch.ones_like(scene.features)), torch.ones_like(scene.pooled()), **EXACT)


@given(scenes(sorted(set(PRESETS) - set(MEAN) | {"align", "align_adaptive"})))
def test_the_largest_sample_is_no_smaller_than_their_mean(scene):
    if scene.operator in MEAN:
        mean, largest = scene.pooled(), preset(scene.operator, reduce="max")(scene.features, scene.boxes, scene.output_size, scene.scale)
    else:
        mean, largest = preset(scene.operator, reduce="mean")(scene.features, scene.boxes, scene.output_size, scene.scale), scene.pooled()
    assert (largest >= mean - 1e-12).all()


@given(scenes(margin=1), st.integers(-2, 2), st.integers(-2, 2))
def test_moving_map_and_boxes_by_whole_cells_changes_nothing(scene, dy, dx):
    """As long as both stay on the map, for which it gets a margin of zeros."""
    padded = torch.nn.functional.pad(scene.features, (3, 3, 3, 3))
    here = scene.pooled(features=padded, boxes=scene.moved(3, 3, 3, 3))
    there = scene.pooled(features=padded.roll((dy, dx), (2, 3)), boxes=scene.moved(3 + dx, 3 + dy, 3 + dx, 3 + dy))
    assert_close(there, here, **EXACT)


@given(scenes(), st.sampled_from([1 / 32, 1 / 2, 2.0, 8.0]))
def test_boxes_in_other_pixels_are_the_same_boxes(scene, factor):
    scaled = torch.cat([scene.boxes[:, :1], scene.boxes[:, 1:] * factor], dim=1)
    assert torch.equal(scene.pooled(boxes=scaled, scale=scene.scale / factor), scene.pooled())


@given(scenes())
def test_x_and_y_are_treated_alike(scene):
    turned = scene.pooled(
        features=scene.features.transpose(2, 3), boxes=scene.boxes[:, [0, 2, 1, 4, 3]], output_size=scene.output_size[::-1]
    )
    assert_close(turned.transpose(2, 3), scene.pooled(), **EXACT)


# what an operator takes the map's middle for: half the cells, or, without the half pixel, half way between the outermost centres
MIRRORED = dict.fromkeys(["align", "align_max", "align_adaptive", "align_1_sample", "warp", "warp_max", "pool_bins", "pool_exclusive"], 0)
MIRRORED |= dict.fromkeys(["prroi", "align_no_half_pixel"], 1)


@given(scenes(sorted(MIRRORED), margin=1, bins=(1, 2, 4), off_halves=True))
def test_a_mirrored_map_gives_mirrored_features(scene):
    """Not so where one end is treated otherwise than the other: by Caffe's `+ 1`, by a floor, by a sample at the start of its bin."""
    image, x1, y1, x2, y2 = scene.boxes.T
    right = (scene.size[1] - MIRRORED[scene.operator]) / scene.scale
    mirrored = scene.pooled(features=scene.features.flip(3), boxes=torch.stack([image, right - x2, y1, right - x1, y2], dim=1))
    assert_close(mirrored.flip(3), scene.pooled(), **EXACT)


@given(scenes(), st.randoms(use_true_random=False))
def test_the_order_of_boxes_images_and_channels_is_kept(scene, random):
    def order(count):
        return torch.tensor(random.sample(range(count), count))

    pooled, boxes, channels, images = scene.pooled(), order(len(scene.boxes)), order(3), order(len(scene.features))
    assert torch.equal(scene.pooled(boxes=scene.boxes[boxes]), pooled[boxes])
    assert torch.equal(scene.pooled(features=scene.features[:, channels]), pooled[:, channels])
    renamed = torch.cat([images.argsort()[scene.boxes[:, :1].long()], scene.boxes[:, 1:]], dim=1)
    assert torch.equal(scene.pooled(features=scene.features[images], boxes=renamed), pooled)


@given(scenes())
def test_a_batch_is_its_images_one_by_one(scene):
    lists = [scene.boxes[scene.boxes[:, 0] == image, 1:] for image in range(len(scene.features))]
    alone = [scene.pooled(features=f[None], boxes=[b]) for f, b in zip(scene.features, lists, strict=True)]
    assert torch.equal(scene.pooled(boxes=lists), torch.cat(alone))


@given(scenes())
def test_the_memory_format_does_not_matter(scene):
    channels_last = scene.pooled(features=scene.features.contiguous(memory_format=torch.channels_last))
    strided = scene.pooled(features=torch.stack([scene.features, noise(scene.features)], dim=-1)[..., 0])
    assert torch.equal(channels_last, scene.pooled()) and torch.equal(strided, scene.pooled())


@given(scenes(["align", "align_max"], bins=(1, 2, 4)))
def test_a_bin_twice_as_large_has_the_samples_of_four(scene):
    """The same ones to the last bit, where bins are dyadic: a sample on the border of what counts must not fall to either side of it."""
    height, width = scene.output_size
    coarse = preset(scene.operator, sampling_ratio=4)(scene.features, scene.boxes, (height, width), scene.scale)
    fine = scene.pooled(output_size=(2 * height, 2 * width))
    join = torch.nn.functional.max_pool2d if scene.operator == "align_max" else torch.nn.functional.avg_pool2d
    assert_close(join(fine, 2), coarse, **EXACT)


@given(scenes(["prroi"]))
def test_an_integral_over_four_bins_is_the_sum_of_theirs(scene):
    height, width = scene.output_size
    fine = scene.pooled(output_size=(2 * height, 2 * width))
    assert_close(torch.nn.functional.avg_pool2d(fine, 2), scene.pooled(), **EXACT)


def ramp(scene: Scene, slope_y: float, slope_x: float) -> Tensor:
    """The map whose value at index `(y, x)` is `1 + slope_y y + slope_x x`."""
    y, x = (torch.arange(size, dtype=torch.float64) for size in scene.size)
    return (1 + slope_y * y[:, None] + slope_x * x).expand_as(scene.features)


SLOPES = st.floats(-3, 3)


@given(scenes(["prroi", "align", "align_adaptive", "align_1_sample", "align_no_half_pixel"], margin=1), st.booleans(), SLOPES, SLOPES)
def test_the_mean_of_a_ramp_over_a_bin_is_its_value_in_the_middle(scene, half_pixel, slope_y, slope_x):
    """Interpolation is exact there, and so are the integral and any samples that lie evenly about the middle."""
    pooled = preset(scene.operator, half_pixel=half_pixel)(ramp(scene, slope_y, slope_x), scene.boxes, scene.output_size, scene.scale)
    x1, y1, x2, y2 = (scene.boxes[:, 1:] * scene.scale - 0.5 * half_pixel).T
    y, x = (
        start[:, None] + (torch.arange(bins, dtype=torch.float64) + 0.5) / bins * (end - start)[:, None]
        for start, end, bins in ((y1, y2, scene.output_size[0]), (x1, x2, scene.output_size[1]))
    )
    expected = 1 + slope_y * y[:, :, None] + slope_x * x[:, None, :]
    assert_close(pooled, expected[:, None].expand_as(pooled), **EXACT)


@given(scenes(sorted(set(MEAN) - {"warp_mnc"}), margin=1), SLOPES)
def test_an_edge_moves_a_bin_on_a_ramp_by_its_share(scene, slope):
    """Of `1 - t` for x1 and of `t` for x2, `t` the bin's place in the box; through a rounding as well."""
    boxes = scene.boxes.requires_grad_()
    pooled = scene.pooled(features=ramp(scene, 0, slope))
    last = scene.output_size[1] - 1
    pooled[:, 0, 0, last].sum().backward()
    t = (last + 0.5) / scene.output_size[1]
    expected = slope * scene.scale * torch.tensor([1 - t, 0, t, 0], dtype=torch.float64)
    assert_close(boxes.grad[:, 1:], expected.expand(len(boxes), 4), **EXACT)


@given(scenes(sorted(WITHOUT_BOX_GRADIENT)))
def test_whole_cells_are_cells_of_the_map(scene):
    pooled = scene.pooled()
    cells = torch.cat([scene.features.flatten(), torch.zeros(1, dtype=torch.float64)])  # 0: a bin off the map
    assert torch.isin(pooled, cells).all()


@pytest.mark.parametrize("name", sorted(set(PRESETS) - set(MIRRORED)))
def test_the_other_operators_do_not_mirror(name):
    features = torch.arange(12.0).expand(1, 1, 12, 12)
    box, mirrored = torch.tensor([[0.0, 2.25, 2.0, 7.75, 9.0]]), torch.tensor([[0.0, 4.25, 2.0, 9.75, 9.0]])
    assert not torch.allclose(preset(name)(features.flip(3), mirrored, 2, 1.0).flip(3), preset(name)(features, box, 2, 1.0))
