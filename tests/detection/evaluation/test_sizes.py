"""Size in feature cells: COCO's own ranges at stride 16, and what moves when the stride or the image's scale does."""

import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from pytest import approx

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.data.transforms import resize_and_flip
from roi_quantization.detection.evaluation.coco import evaluate
from roi_quantization.detection.evaluation.sizes import average_precision_by_cells, resize_scales, resize_sides
from tests.detection.evaluation.coco_sets import annotation, coco, random_set, result

NAMES = ["< 2 cells", "2 to 6 cells", "> 6 cells"]


def test_at_stride_16_it_is_cocos_small_medium_large():
    annotations, results = random_set(np.random.default_rng(0))
    ids = range(1, 13)
    stats = evaluate(coco(*annotations, images=ids), results, ids).stats
    table = average_precision_by_cells(coco(*annotations, images=ids), results, ids, stride=16)
    assert [table[name]["AP"] for name in NAMES] == approx([stats[f"AP_{size}"] for size in ("small", "medium", "large")], nan_ok=True)


def test_an_object_of_50_pixels_is_three_cells_at_stride_16_and_one_and_a_half_at_32():
    crowd = annotation(1, [0, 200, 50, 50], iscrowd=1)  # not counted among the objects
    gt, results = coco(annotation(1, [0, 0, 50, 50]), crowd), [result(1, [0, 0, 50, 50])]
    at_16, at_32 = (average_precision_by_cells(gt, results, [1], stride) for stride in (16, 32))
    assert [at_16[name]["objects"] for name in NAMES] == [0, 1, 0]
    assert [at_32[name]["objects"] for name in NAMES] == [1, 0, 0]
    assert at_16["2 to 6 cells"]["AP"] == approx(100)
    assert math.isnan(at_16["< 2 cells"]["AP"])


def test_an_image_shown_at_twice_its_size_has_objects_of_twice_as_many_cells():
    gt = coco(annotation(1, [0, 0, 20, 20]), annotation(2, [0, 0, 20, 20]))
    results = [result(1, [0, 0, 20, 20]), result(2, [300, 300, 20, 20])]
    table = average_precision_by_cells(gt, results, [1, 2], 16, scales={1: 2.0, 2: 1.0})
    assert [table[name]["objects"] for name in NAMES] == [1, 1, 0]
    assert table["2 to 6 cells"]["AP"] == approx(100)  # the false detection is small, and counts there
    assert table["< 2 cells"]["AP"] == 0
    assert gt.anns[1]["bbox"] == [0, 0, 20, 20]  # as it was


def test_other_borders():
    gt, results = coco(annotation(1, [0, 0, 50, 50])), [result(1, [0, 0, 50, 50], score=0.5)]
    table = average_precision_by_cells(gt, results, [1], 16, borders=(1, 2, 4, 8))
    assert {name: row["objects"] for name, row in table.items()} == {
        "< 1 cells": 0, "1 to 2 cells": 0, "2 to 4 cells": 1, "4 to 8 cells": 0, "> 8 cells": 0,
    }  # fmt: skip
    for borders in ((), (2, 1), (0, 1)):
        with pytest.raises(ValueError, match="positive and ascending"):
            average_precision_by_cells(gt, results, [1], 16, borders=borders)


def test_every_image_needs_its_scale():
    with pytest.raises(ValueError, match="lacks 1 of the images, the first is 2"):
        average_precision_by_cells(coco(annotation(1)), [], [1, 2], 16, scales={1: 1.0})


@pytest.mark.parametrize(
    ("short_side", "max_side", "expected"),
    [
        (240, None, 0.5),
        (600, 640, 1.0),
        (240, 1000, 0.5),
        (600, 700, 700 / 640),
        (None, 128, 0.2),
        (None, 640, 1.0),
        (None, 1000, 1.0),
    ],
)
def test_scales_are_those_of_the_transform(short_side, max_side, expected):
    """Images of 640 x 480."""
    scale = resize_scales(coco(), short_side, max_side)[1]
    assert scale == approx(expected)
    _, height, width = resize_and_flip(short_side, max_side)(torch.zeros(3, 480, 640, dtype=torch.uint8)).shape
    assert (height, width) == (approx(480 * scale, abs=1), approx(640 * scale, abs=1))


def test_images_that_keep_their_size_have_no_scales():
    assert resize_scales(coco(), None, None) is None


def test_sides_are_read_from_the_configuration_of_this_projects_transform_alone():
    name = "roi_quantization.detection.data.transforms.resize_and_flip"
    for target in (name, name.removeprefix("roi_quantization.")):
        assert resize_sides({"_target_": target, "short_side": 600, "max_side": 1000, "flip": 0.0}) == (600, 1000)
    assert resize_sides(None) == (None, None)
    with pytest.raises(InputError, match=r"data\.eval_transform is torchvision\.transforms\.v2\.Resize: to what size .* is not known"):
        resize_sides({"_target_": "torchvision.transforms.v2.Resize", "size": 300})
    several = OmegaConf.create({"_target_": target, "short_side": [480, 600]})
    with pytest.raises(InputError, match=r"short_side=\[480, 600\] is drawn from for each image"):
        resize_sides(several)
