"""What holds of transforms, annotations, subsets and proposal files whatever is in them; see `tests/conftest.py` for how much is tried."""

import json
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision import tv_tensors
from torchvision.ops import box_iou

from roi_quantization.detection.data.annotations import choose_ids, choose_part
from roi_quantization.detection.data.coco import CocoDetection
from roi_quantization.detection.data.images import ImageRecord
from roi_quantization.detection.data.proposals.file import ProposalFile, write_proposals
from roi_quantization.detection.data.proposals.grid import Grid
from roi_quantization.detection.data.transforms import resize_and_flip, seeded_rng
from roi_quantization.detection.data.voc import convert

from .test_voc import xml


@st.composite
def scenes(draw, least=1):
    """`(height, width)` of an image and boxes `[L, 4]` in it, whole pixels, `least` wide and high at least."""
    height, width = draw(st.integers(30, 60)), draw(st.integers(30, 60))

    def edges(size):
        start = draw(st.integers(0, size - least))
        return start, draw(st.integers(start + least, size))

    pairs = [(edges(width), edges(height)) for _ in range(draw(st.integers(1, 4)))]
    return (height, width), torch.tensor([[x1, y1, x2, y2] for (x1, x2), (y1, y2) in pairs], dtype=torch.float32)


@st.composite
def resizes(draw):
    short_side = draw(st.integers(20, 100))
    return {"short_side": short_side, "max_side": draw(st.integers(short_side + 1, 150))}


def transformed(transform, size, boxes, image=None):
    """-> image, boxes."""
    image = torch.zeros(3, *size, dtype=torch.uint8) if image is None else image
    image, boxes = transform(tv_tensors.Image(image), tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size))
    return image.as_subclass(torch.Tensor), boxes.as_subclass(torch.Tensor)


@given(scenes(least=8), resizes(), st.booleans())
def test_a_box_moves_with_its_pixels(scene, sides, flip):
    """A white rectangle on black is found again, by what is brighter than half, to a pixel."""
    size, boxes = scene
    x1, y1, x2, y2 = boxes[0].int().tolist()
    image = torch.zeros(3, *size, dtype=torch.uint8)
    image[:, y1:y2, x1:x2] = 255
    image, moved = transformed(resize_and_flip(**sides, flip=float(flip)), size, boxes[:1], image)
    rows, columns = (image[0] > 127).nonzero().T
    found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert_close(found[None].float(), moved, rtol=0, atol=1)


@given(scenes(), resizes())
def test_sides_are_as_asked_for_and_the_shape_stays(scene, sides):
    size, boxes = scene
    short, longest = sorted(transformed(resize_and_flip(**sides), size, boxes)[0].shape[1:])
    assert short <= sides["short_side"] and longest <= sides["max_side"]
    assert short == sides["short_side"] or longest == sides["max_side"]
    assert longest * min(size) / max(size) == pytest.approx(short, abs=1)


@given(scenes(), resizes())
def test_a_resize_keeps_the_iou_of_boxes(scene, sides):
    """Exactly, though the two axes may have their own factors: these cancel."""
    size, boxes = scene
    _, resized = transformed(resize_and_flip(**sides), size, boxes)
    assert_close(box_iou(resized, resized), box_iou(boxes, boxes), rtol=0, atol=1e-5)


@given(scenes())
def test_two_flips_are_none(scene):
    size, boxes = scene
    image = torch.arange(3 * size[0] * size[1]).remainder(251).to(torch.uint8).view(3, *size)
    twice = transformed(resize_and_flip(flip=1.0), size, *reversed(transformed(resize_and_flip(flip=1.0), size, boxes, image)))
    assert torch.equal(twice[0], image) and torch.equal(twice[1], boxes)


@given(scenes(), st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 600_000)))
def test_the_same_key_draws_the_same(scene, key):
    transform = resize_and_flip(short_side=[20, 25, 30, 35], max_side=100, flip=0.5)
    results = []
    for _ in range(2):
        torch.rand(1)  # the global generator moves on between the two
        with seeded_rng(*key):
            results.append(transformed(transform, *scene))
    assert results[0][0].shape == results[1][0].shape and torch.equal(results[0][1], results[1][1])


IDS = st.lists(st.integers(-5, 600_000), min_size=1, max_size=60, unique=True)
SEEDS = st.integers(0, 1000)


CUTS = st.lists(st.floats(0, 1, exclude_min=True, exclude_max=True), max_size=3, unique=True)


@given(IDS, CUTS, SEEDS, st.randoms(use_true_random=False))
def test_parts_that_meet_share_no_image_and_leave_none_out(ids, cuts, seed, random):
    ends = list(pairwise([0, *sorted(cuts), 1]))
    parts = [choose_part(ids, low, high, seed) for low, high in ends]
    assert sorted(i for part in parts for i in part) == sorted(ids)
    assert all(part == sorted(part) for part in parts)
    assert [choose_part(random.sample(ids, len(ids)), low, high, seed) for low, high in ends] == parts


@given(IDS, SEEDS, st.data())
def test_a_smaller_subset_is_part_of_a_larger_one(ids, seed, data):
    more = data.draw(st.integers(1, len(ids)))
    fewer = data.draw(st.integers(1, more))
    subset = choose_ids(ids, subset=fewer, seed=seed)
    assert len(subset) == fewer and subset == sorted(set(subset)) and set(subset) <= set(choose_ids(ids, subset=more, seed=seed))
    assert choose_ids(ids[::-1], subset=fewer, seed=seed) == subset == choose_ids(ids, ids=subset[::-1])


@st.composite
def instances(draw):
    """An instances json with images, annotations and categories in any order; boxes may reach out of their image, not lie outside."""
    image_ids = draw(st.lists(st.integers(1, 600_000), min_size=1, max_size=5, unique=True))
    category_ids = draw(st.lists(st.integers(1, 90), min_size=1, max_size=4, unique=True))
    quarter = 0.25  # of a pixel: float32 has it exactly
    annotations = [
        {
            "image_id": draw(st.sampled_from(image_ids)),
            "category_id": draw(st.sampled_from(category_ids)),
            "bbox": [draw(st.integers(-40, 150)) * quarter for _ in "xy"] + [draw(st.integers(41, 200)) * quarter for _ in "wh"],
            "iscrowd": draw(st.integers(0, 1)),
        }
        for _ in range(draw(st.integers(0, 12)))
    ]
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 60, "height": 40} for i in image_ids],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"category {i}"} for i in category_ids],
    }


@given(instances())
def test_each_image_has_its_own_annotations_in_their_order(instances):
    """And `coco` has them as they were written."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        path.write_text(json.dumps(instances))
        for image in instances["images"]:
            (Path(folder) / image["file_name"]).touch()
        dataset = CocoDetection(folder, path, Grid([0.5]))
        coco = dataset.coco
    assert dataset.image_ids == sorted(image["id"] for image in instances["images"])
    for index, image_id in enumerate(dataset.image_ids):
        written = [a for a in instances["annotations"] if a["image_id"] == image_id and a["bbox"][1] < 40]
        edges = [[max(x, 0), max(y, 0), min(x + w, 60), min(y + h, 40)] for x, y, w, h in (a["bbox"] for a in written)]
        objects = [(e, a["category_id"]) for e, a in zip(edges, written, strict=True) if not a["iscrowd"]]
        boxes, labels, crowd = dataset.ground_truth(index)
        assert list(zip(boxes.tolist(), (dataset.label_to_category_id[i] for i in labels.tolist()), strict=True)) == objects
        assert crowd.tolist() == [e for e, a in zip(edges, written, strict=True) if a["iscrowd"]]
        assert [{key: a[key] for key in written[0]} for a in coco.imgToAnns.get(image_id, [])] == written


@st.composite
def voc_objects(draw):
    (x1, x2), (y1, y2) = (sorted(draw(st.tuples(st.integers(1, size), st.integers(1, size)))) for size in (60, 40))
    return draw(st.sampled_from(["cat", "dog"])), draw(st.integers(0, 1)), (x1, y1, x2, y2)


@given(st.lists(st.lists(voc_objects(), max_size=4), min_size=1, max_size=4))
def test_vocs_pixels_become_the_edges_around_them(images):
    """Pixel 1 to pixel n, both inside, is 0 to n."""
    assume(any(images))  # a set without any object is refused
    with TemporaryDirectory() as folder:
        root, out = Path(folder) / "VOC", Path(folder) / "out"
        for part in ("Annotations", "JPEGImages"):
            (root / part).mkdir(parents=True)
        for number, objects in enumerate(images):
            (root / f"Annotations/{number}.xml").write_text(xml(*objects))
            (root / f"JPEGImages/{number}.jpg").touch()
        convert(root, out)
        dataset = CocoDetection(out / "images", out / "annotations/instances_all.json", Grid([0.5]))
    names = {label: category["name"] for label, category in enumerate(dataset.categories, start=1)}
    for index, objects in enumerate(images):
        edges = [(name, difficult, [x1 - 1, y1 - 1, x2, y2]) for name, difficult, (x1, y1, x2, y2) in objects]
        boxes, labels, crowd = dataset.ground_truth(index)
        found = zip((names[label] for label in labels.tolist()), boxes.tolist(), strict=True)
        assert list(found) == [(name, e) for name, difficult, e in edges if not difficult]
        assert crowd.tolist() == [e for _, difficult, e in edges if difficult]


@st.composite
def windows(draw):
    """Image records, windows `[L, 4]` of each that may reach out of it or have no area, and scores or None."""
    ids = draw(st.lists(st.integers(0, 600_000), min_size=1, max_size=4, unique=True))
    records = [ImageRecord(i, Path(f"{i}.jpg"), draw(st.integers(1, 60)), draw(st.integers(1, 60))) for i in ids]
    edges = st.lists(st.floats(-20, 80, width=32), min_size=2, max_size=2).map(sorted)
    window = st.tuples(edges, edges).map(lambda axes: [edge for ends in zip(*axes, strict=True) for edge in ends])
    boxes = [np.array(draw(st.lists(window, max_size=6)), np.float32).reshape(-1, 4) for _ in ids]
    if draw(st.booleans()):
        return records, [np.round(of_image).astype(np.int16) for of_image in boxes], None
    if draw(st.booleans()):
        return records, boxes, None
    return records, boxes, [[draw(st.sampled_from([0.1, 0.5, 0.9])) for _ in of_image] for of_image in boxes]


@given(windows(), st.none() | st.integers(1, 4), st.randoms(use_true_random=False))
def test_a_proposal_file_gives_back_what_was_written(windows, most, random):
    """Cut to its image, what has an area then; the best first where there are scores, those that are equal in the order written."""
    records, boxes, scores = windows
    with TemporaryDirectory() as folder:
        path = Path(folder) / "proposals.npz"
        write_proposals(path, records, boxes, scores)
        proposals = ProposalFile(path, max_proposals=most)
        proposals.prepare(random.sample(records, len(records)))
    for number, record in enumerate(records):
        cut = np.clip(boxes[number], 0, [record.width, record.height] * 2).astype(np.float32)
        of_image = list(zip(cut.tolist(), scores[number] if scores else [0] * len(cut), strict=True))
        kept = [(box, score) for box, score in of_image if box[2] > box[0] and box[3] > box[1]]
        assert proposals(record).tolist() == [box for box, _ in sorted(kept, key=lambda entry: -entry[1])][:most]


@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([0.1, 0.3, 0.7, 1.0]), st.sampled_from([0.5, 1.0, 2.0]))
def test_a_grid_lies_in_its_image_and_covers_it(width, height, scale, ratio):
    assume(scale * min(width, height) >= 4)
    grid = Grid([scale], [ratio], step=0.5)(ImageRecord(1, Path("x"), width, height))
    x1, y1, x2, y2 = grid.T
    assert (x1 >= 0).all() and (y1 >= 0).all() and (x2 <= width + 1e-3).all() and (y2 <= height + 1e-3).all()
    for low, high, size in ((x1, x2, width), (y1, y2, height)):
        starts = low.unique()
        assert starts[0] == 0
        assert high.max() == pytest.approx(size, abs=1e-3)
        assert (starts.diff() <= 0.5 * (high - low).max() + 1e-3).all(), "neighbours are no further apart than asked for"
