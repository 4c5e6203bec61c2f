"""What holds of `to_original` for any box and image size; see `tests/conftest.py` for how many are tried."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision import tv_tensors

from roi_quantization.detection.data.transforms import resize_and_flip
from roi_quantization.detection.model.fast_rcnn import to_original

SIZES = st.tuples(st.integers(8, 80), st.integers(8, 80))  # height, width
PARTS = st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4)


def box_in(size, parts):
    """The box whose edges lie at these parts of the image."""
    (x1, x2), (y1, y2) = sorted(parts[:2]), sorted(parts[2:])
    return torch.tensor([[x1, y1, x2, y2]]) * torch.tensor(size[::-1] * 2, dtype=torch.float32)


@given(SIZES, PARTS, st.integers(4, 60), st.integers(20, 100))
def test_a_box_that_a_resize_moved_is_moved_back(size, parts, short_side, max_side):
    box = box_in(size, parts)
    box_of_image = tv_tensors.BoundingBoxes(box, format="XYXY", canvas_size=size)
    image, resized = resize_and_flip(short_side, max(max_side, short_side + 1))(tv_tensors.Image(torch.zeros(3, *size)), box_of_image)
    back = to_original(resized.as_subclass(torch.Tensor), tuple(image.shape[1:]), size)
    assert_close(back, box, rtol=0, atol=1e-3)


@given(SIZES, SIZES, PARTS)
def test_an_edge_keeps_its_part_of_the_image_and_stays_in_it(shape, original, parts):
    assert_close(to_original(box_in(shape, parts), shape, original), box_in(original, parts))
    beyond = box_in(shape, [3 * part - 1 for part in parts])
    assert_close(to_original(beyond, shape, original), box_in(original, [min(max(3 * part - 1, 0), 1) for part in parts]))
