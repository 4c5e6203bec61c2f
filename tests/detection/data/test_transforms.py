"""Whatever moves the image moves boxes, crowd regions and proposals, and the draws depend on their key alone."""

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.data.transforms import resize_and_flip, seeded_rng


def inputs(box=(10.0, 5.0, 30.0, 15.5), size=(40, 60)):
    boxes = tv_tensors.BoundingBoxes([box], format="XYXY", canvas_size=size, dtype=torch.float32)
    image = tv_tensors.Image(torch.arange(3 * size[0] * size[1], dtype=torch.int64).remainder(256).to(torch.uint8).reshape(3, *size))
    return image, {"boxes": boxes, "crowd": boxes[:0], "proposals": boxes.clone()}


def test_flip_mirrors_edges_not_pixel_numbers():
    image, target = inputs()
    flipped, moved = resize_and_flip(flip=1.0)(image, target)
    assert torch.equal(flipped, image.flip(-1))
    for name in ("boxes", "proposals"):
        assert moved[name].tolist() == [[60 - 30, 5, 60 - 10, 15.5]]
    assert moved["crowd"].shape == (0, 4)


@pytest.mark.parametrize(
    ("short", "longest", "size"),
    [
        (80, 1000, (80, 120)),  # the short side becomes 80
        (80, 90, (60, 90)),  # the long side would be 120: it becomes 90 instead
        (90, 90, (60, 90)),
        (120, 90, (60, 90)),
        (50, None, (50, 75)),
        (None, None, (40, 60)),
        (None, 30, (20, 30)),  # max_side alone shrinks
        (None, 60, (40, 60)),
        (None, 90, (40, 60)),  # and never enlarges
    ],
)
def test_resize_scales_boxes_by_the_ratio_of_the_sizes(short, longest, size):
    image, moved = resize_and_flip(short, longest)(*inputs())
    assert image.shape[-2:] == size
    height, width = size[0] / 40, size[1] / 60
    assert moved["boxes"][0].tolist() == pytest.approx([10 * width, 5 * height, 30 * width, 15.5 * height])


@pytest.mark.parametrize(("size", "expected"), [((2, 300), (1, 30)), ((300, 2), (30, 1)), ((1, 31), (1, 30)), ((1, 30), (1, 30))])
@pytest.mark.parametrize("short", [None, 20])
def test_a_very_thin_image_keeps_a_pixel(size, expected, short):
    image, moved = resize_and_flip(short, 30)(*inputs(box=(0.0, 0.0, size[1], size[0]), size=size))
    assert image.shape[-2:] == expected
    assert moved["boxes"][0].tolist() == pytest.approx([0, 0, expected[1], expected[0]])


def test_axes_have_their_own_ratio_where_sides_are_rounded():
    image, moved = resize_and_flip(20, 1000)(*inputs(box=(0.0, 0.0, 59.0, 33.0), size=(33, 59)))
    assert image.shape[-2:] == (20, 35)  # 59 * 20 / 33 = 35.76
    assert moved["boxes"].tolist() == [[0, 0, 35, 20]]  # the whole image stays the whole image


def test_several_short_sides_are_drawn_from():
    transform = resize_and_flip([20, 40], 1000)
    heights = set()
    for epoch in range(20):
        with seeded_rng(0, epoch, 1):
            heights.add(transform(*inputs())[0].shape[-2])
    assert heights == {20, 40}
    assert resize_and_flip(np.int64(20))(*inputs())[0].shape[-2] == 20
    assert resize_and_flip(max_side=np.int64(30))(*inputs())[0].shape[-2] == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"short_side": 600.0}, r"short_side=600\.0: expected a whole number of pixels such as 600, a list of them to draw from, or null"),
        ({"short_side": "600"}, r"short_side='600': expected a whole number of pixels"),
        ({"short_side": [480, 600.0]}, r"short_side=\[480, 600\.0\]: expected a whole number of pixels"),
        ({"short_side": 0}, r"short_side=0: expected a whole number of pixels"),
        ({"max_side": 1000.0}, r"max_side=1000\.0: expected a whole number of pixels such as 1000, or null for no limit"),
        ({"flip": 1.5}, r"flip=1\.5: expected a probability from 0 to 1"),
        ({"flip": "0.5"}, r"flip='0\.5': expected a probability from 0 to 1"),
    ],
)
def test_an_argument_that_is_not_a_size_or_a_probability_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        resize_and_flip(**arguments)


def test_draws_depend_on_the_key_and_leave_no_trace():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded_rng(0, 1, 2):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded_rng(0, 1, 2):
        assert torch.equal(torch.rand(3), first)
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 1, -2)):
        with seeded_rng(*other):
            assert not torch.equal(torch.rand(3), first)


@pytest.mark.parametrize(
    ("size", "short"), [((40, 60), 64), ((40, 60), 31), ((37, 61), 50), ((33, 59), 99), ((480, 640), 600), ((40, 60), 20)]
)
def test_a_resized_mask_has_the_pixels_at_the_centres(size, short):
    columns = torch.arange(size[1], dtype=torch.int32).expand(1, *size)
    resized = resize_and_flip(short)(tv_tensors.Mask(columns))
    assert type(resized) is tv_tensors.Mask and resized.dtype == torch.int32
    width = resized.shape[-1]
    centres = (torch.arange(width) + 0.5) * size[1] / width
    assert (resized[0, 0] + 0.5 - centres).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize(("size", "short"), [((40, 60), 64), ((40, 60), 31), ((37, 61), 50), ((33, 59), 99), ((480, 640), 600)])
def test_a_mask_stays_where_its_box_is(size, short):
    """On average over objects: each edge is rounded to whole pixels by itself."""
    starts = torch.arange(20)
    edges = torch.stack([starts, starts // 2, starts + 13, starts // 2 + 11], dim=1)
    masks = torch.zeros(len(edges), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, edges.tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    target = {"boxes": tv_tensors.BoundingBoxes(edges.float(), format="XYXY", canvas_size=size), "masks": tv_tensors.Mask(masks)}
    image, moved = resize_and_flip(short)(torch.zeros(3, *size, dtype=torch.uint8), target)
    assert moved["masks"].shape[1:] == image.shape[1:]
    shift = (masks_to_boxes(moved["masks"]) + torch.tensor([0, 0, 1, 1]) - moved["boxes"]).mean(dim=0)
    assert [(shift[0] + shift[2]) / 2, (shift[1] + shift[3]) / 2] == pytest.approx([0, 0], abs=0.15)


def test_a_mask_of_the_size_asked_for_and_no_masks():
    mask = tv_tensors.Mask(torch.arange(2 * 40 * 60).remainder(2).to(torch.uint8).reshape(2, 40, 60))
    assert torch.equal(resize_and_flip(40)(mask), mask)
    assert resize_and_flip(80)(mask[:0]).shape == (0, 80, 120)


def test_max_side_alone_moves_boxes_and_masks_with_the_image():
    """Images and targets of a training transform have one size, whether they are shrunk or not."""
    for max_side, size in ((30, (20, 30)), (100, (40, 60))):
        image, target = inputs()
        mask = tv_tensors.Mask(torch.ones(1, 40, 60, dtype=torch.uint8))
        image, moved = resize_and_flip(max_side=max_side, flip=1.0)(image, target | {"masks": mask})
        assert image.shape[1:] == moved["masks"].shape[1:] == moved["boxes"].canvas_size == size
        assert moved["proposals"].tolist() == [[side * size[0] / 40 for side in (30, 5, 50, 15.5)]]
