"""Masks from COCO's segmentations, on images of a few pixels."""

import re

import pytest
import torch

from roi_quantization.detection.data.masks import decode, encode, find_fault, to_masks

SQUARE = [1, 1, 4, 1, 4, 3, 1, 3]  # of x from 1 to 4, y from 1 to 3
DRAWN = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.uint8)
COUNTS = [5, 2, 2, 2, 2, 2, 5]  # column by column, outside first
(RLE,) = encode(DRAWN[None])


@pytest.mark.parametrize("segmentation", [[SQUARE], {"size": [4, 5], "counts": COUNTS}, RLE])
def test_polygons_and_run_lengths_of_either_kind_are_the_same_pixels(segmentation):
    assert find_fault(segmentation, 4, 5) is None
    assert torch.equal(to_masks([segmentation], 4, 5), DRAWN[None])


def test_several_polygons_are_one_object():
    left, right = [0, 0, 1, 0, 1, 4, 0, 4], [4, 0, 5, 0, 5, 4, 4, 4]
    assert to_masks([[left, right]], 4, 5)[0].tolist() == [[1, 0, 0, 0, 1]] * 4


def test_no_objects_no_masks():
    assert to_masks([], 4, 5).shape == (0, 4, 5)
    assert encode(torch.zeros(0, 4, 5)) == []


def test_masks_are_decoded_as_they_were_encoded():
    masks = torch.stack([DRAWN, 1 - DRAWN, torch.zeros_like(DRAWN)]).bool()
    assert torch.equal(torch.from_numpy(decode(encode(masks))), masks)


@pytest.mark.parametrize(
    ("segmentation", "fault"),
    [
        ("a shape", "is 'a shape'; expected a list of polygons"),
        ({"counts": [20]}, r"expected a list of polygons .* or an RLE \{size"),
        ([[1, 2, 3, 4]], "has a polygon of 4 numbers; expected x and y of at least three corners"),
        ([SQUARE, [*SQUARE, 1]], "has a polygon of 9 numbers"),
        ([[1, 2, 3, 4, 5, None]], "has the polygon .*None.*; expected finite numbers"),
        ([[1, 2, 3, 4, 5, float("nan")]], "expected finite numbers"),
        ([1, 2, 3, 4, 5, 6], "has the polygon 1; expected finite numbers"),
        ({"size": [5, 4], "counts": COUNTS}, r"has an RLE of size \[5, 4\]; expected that of its image, \[height, width\] = \[4, 5\]"),
        ({"size": [4, 5], "counts": [5, 2]}, "counts are not whole numbers that add up to the 20 pixels of its image"),
        ({"size": [4, 5], "counts": [-5, 25]}, "counts are not whole numbers"),
        ({"size": [4, 5], "counts": RLE["counts"] * 3}, "has an RLE that does not decode"),
        ({"size": [4, 5], "counts": None}, "has an RLE that does not decode"),
    ],
)
def test_what_is_wrong_with_a_segmentation_is_said(segmentation, fault):
    assert re.search(fault, find_fault(segmentation, 4, 5))
