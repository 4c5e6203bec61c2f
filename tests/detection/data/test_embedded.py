"""The embedded set: what is drawn, that its boxes are tight, and when it is made anew."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation

from roi_quantization.detection.common.files import NotWrittenError
from roi_quantization.detection.data import embedded
from roi_quantization.detection.data.annotations import read_instances
from roi_quantization.detection.data.embedded import SHAPES, EmbeddedSet
from roi_quantization.detection.data.masks import to_masks
from tests.faults import full_disk

SMALL = EmbeddedSet(train=6, val=3, test=2)
PLAIN = EmbeddedSet(texture=0, noise=0, lines=0, blobs=0, objects=(1, 1), contrast=120)


def drawn(settings, *key):
    return settings.draw(np.random.default_rng(key))


def test_boxes_are_the_tight_boxes_of_what_is_seen():
    """The same picture with and without its object: the pixels that differ span the box, to the pixel that its edge goes through."""
    for number in range(20):
        with_object, (found,) = drawn(PLAIN, number)
        without, _ = drawn(replace(PLAIN, objects=(0, 0)), number)
        rows, columns = np.nonzero(np.abs(with_object.astype(int) - without).max(axis=2) > 5)
        seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        x, y, width, height = found["bbox"]
        assert np.abs(seen - [x, y, x + width, y + height]).max() < 1.25, found  # a corner may cover next to nothing of its pixel


def test_masks_are_what_is_seen():
    """As above: each pixel of the mask differs, and each that differs is of the mask or within two of it, where edges and tips are. Rings
    have holes."""
    kinds = set()
    for number in range(20):
        with_object, (found,) = drawn(PLAIN, number)
        without, _ = drawn(replace(PLAIN, objects=(0, 0)), number)
        seen = np.abs(with_object.astype(int) - without).max(axis=2) > 5
        (mask,) = to_masks([found["segmentation"]], 256, 256).numpy().astype(bool)
        assert seen[mask].all() and binary_dilation(mask, iterations=2)[seen].all()
        assert mask.sum() == pytest.approx(found["area"], rel=0.03)
        kinds.add(SHAPES[found["category_id"]][0])
    assert "ring" in kinds


def test_boxes_have_fractions():
    boxes = np.array([drawn(PLAIN, number)[1][0]["bbox"] for number in range(50)])
    assert 0.4 < np.mod(boxes, 1).mean() < 0.6


def test_objects_keep_the_sizes_and_distances_of_the_settings():
    settings = EmbeddedSet()
    for number in range(20):
        _, objects = drawn(settings, number)
        assert 1 <= len(objects) <= 5
        boxes = np.array([entry["bbox"] for entry in objects])
        longer = boxes[:, 2:].max(axis=1)
        assert (longer >= 32 - 1e-3).all() and (longer <= 128 + 1e-3).all()
        assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 256).all()


def test_area_is_that_of_the_shape():
    expected = {"disc": np.pi / 4, "ring": np.pi / 4 * (1 - 0.55**2), "square": 1, "triangle": 0.5}
    upright = replace(PLAIN, rotation=0)
    for number in range(30):
        _, (found,) = drawn(upright, number)
        name = SHAPES[found["category_id"]][0]
        if name in expected:
            assert found["area"] / (found["bbox"][2] * found["bbox"][3]) == pytest.approx(expected[name], rel=2e-3)


def test_a_set_is_coco_on_disk(tmp_path):
    SMALL(tmp_path / "set")
    ids = []
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        instances = read_instances(tmp_path / "set/annotations" / f"instances_{split}.json")
        assert len(instances["images"]) == count
        assert Image.open(tmp_path / "set" / split / instances["images"][0]["file_name"]).size == (256, 256)
        assert [category["id"] for category in instances["categories"]] == [2, 3, 7, 11, 18]
        ids += [image["id"] for image in instances["images"]]
    assert len(set(ids)) == 11


def test_splits_are_drawn_independently_and_alike_every_time(tmp_path):
    SMALL(tmp_path / "a")
    replace(SMALL, train=2)(tmp_path / "b")
    for split in ("val", "test"):
        for path in sorted((tmp_path / "a" / split).iterdir()):
            assert path.read_bytes() == (tmp_path / "b" / split / path.name).read_bytes()
    pictures = [np.asarray(Image.open(next((tmp_path / "a" / split).iterdir()))) for split in ("train", "val", "test")]
    assert all((a != b).any() for a, b in pairwise(pictures))


def test_a_set_is_made_once_and_anew_by_another_version(tmp_path, monkeypatch):
    root = tmp_path / "deep" / "set"
    SMALL(root)
    (root / "witness").touch()
    EmbeddedSet(train=6, val=3, test=2, objects=[1, 5])(root)  # a list, as a config has it, is the same setting
    assert (root / "witness").exists()
    monkeypatch.setattr(embedded, "DRAWING_VERSION", 0)
    SMALL(root)
    assert not (root / "witness").exists()
    assert json.loads((root / "complete.json").read_text())["drawing"] == 0
    assert sorted(entry.name for entry in root.parent.iterdir()) == [".set.lock", "set"]


def test_a_set_with_other_settings_is_not_replaced(tmp_path):
    """Another training may be reading it."""
    SMALL(tmp_path / "set")
    with pytest.raises(FileExistsError, match=r"noise is 1\.5 there and 3\.0 here; seed is 0 there and 1 here\. .*data\.root=.*set_2"):
        replace(SMALL, seed=1, noise=3.0)(tmp_path / "set")
    SMALL(tmp_path / "set")


def test_a_folder_that_cannot_be_written_names_roi_cache(tmp_path):
    (tmp_path / "data").write_text("a file in the place of the folder")
    with pytest.raises(NotWrittenError, match=r"data/embedded could not be written.* ROI_CACHE to a folder that can be written"):
        SMALL(tmp_path / "data/embedded")


def test_nothing_is_left_of_a_set_that_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "_clouds", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        SMALL(tmp_path / "set")
    assert [entry.name for entry in tmp_path.iterdir()] == [".set.lock"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"something else than an embedded set .*data\.root"):
        SMALL(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_full_disk_leaves_the_set_that_was_there(tmp_path, monkeypatch):
    SMALL(tmp_path / "set")
    monkeypatch.setattr(embedded, "DRAWING_VERSION", 0)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with full_disk(10_000), pytest.raises(NotWrittenError, match=r"set could not be written: .* Make room there"):
        SMALL(tmp_path / "set")
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    monkeypatch.undo()
    assert SMALL._is_at(tmp_path / "set")


def test_a_folder_of_something_else_with_a_file_of_the_same_name_is_left_alone(tmp_path):
    (tmp_path / "complete.json").write_text('{"download": "done"}')
    with pytest.raises(FileExistsError, match="holds something else than an embedded set"):
        SMALL(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "complete.json"]
