"""Selective search: what it finds, alone and in several processes."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from roi_quantization.detection.data.images import ImageRecord
from roi_quantization.detection.data.proposals.recall import recall
from roi_quantization.detection.data.proposals.selective_search import SelectiveSearch, search

OPTIONS = {"quality": False, "max_side": 500, "min_side": 5, "max_proposals": 2000}


@pytest.fixture
def images(tmp_path):
    """Three grey images with a dark rectangle each, 80 x 60."""
    records = []
    for number in (1, 2, 3):
        pixels = np.full((60, 80, 3), 200, np.uint8)
        pixels[10:40, 10 * number : 10 * number + 30] = 20
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        records.append(ImageRecord(number, tmp_path / f"{number}.png", 80, 60))
    return records


def test_it_finds_what_stands_out(images, tmp_path):
    pytest.importorskip("cv2.ximgproc")
    import torch

    provider = SelectiveSearch(tmp_path / "cache", min_side=5)
    provider.prepare(images)
    rectangles = [torch.tensor([[10.0 * number, 10, 10 * number + 30, 40]]) for number in (1, 2, 3)]
    assert recall([provider(image) for image in images], rectangles, [0.8]) == {0.8: 1.0}


def test_windows_are_in_pixels_of_the_image_where_it_was_shrunk(images):
    pytest.importorskip("cv2.ximgproc")
    windows = search(images[0], **OPTIONS | {"max_side": 40})
    assert windows.dtype == np.int16 and windows[:, 2].max() == 80 and windows[:, 3].max() == 60


def test_two_searches_agree_and_small_windows_and_surplus_are_left_out(real_data):
    pytest.importorskip("cv2.ximgproc")
    path = real_data / "voc_animals/val/2008_008034.jpg"
    image = ImageRecord(1, path, *Image.open(path).size)
    options = OPTIONS | {"max_side": 120, "min_side": 20, "max_proposals": 20}
    first = search(image, **options)
    assert np.array_equal(first, search(image, **options))
    assert len(first) == 20 and (first[:, 2:] - first[:, :2]).min() >= 20


def test_several_processes_find_what_one_does(images, tmp_path, capfd):
    pytest.importorskip("cv2.ximgproc")
    records = [replace(images[number % 3], id=number) for number in range(8)]
    alone, together = (SelectiveSearch(tmp_path / name, num_workers=workers) for name, workers in (("alone", 1), ("together", 2)))
    windows = [np.concatenate(list(provider._search_all(records))) for provider in (alone, together)]
    assert len(windows[0]) and np.array_equal(*windows)
    assert "8/8" in capfd.readouterr().err, "the bar"


@pytest.mark.parametrize("workers", [1, 2])
def test_an_image_that_does_not_decode_is_named_as_it_is(images, tmp_path, workers):
    pytest.importorskip("cv2.ximgproc")
    images[1].path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^\S*2\.png \(image 2\) does not decode"):
        SelectiveSearch(tmp_path / "cache", num_workers=workers).prepare(images)


def test_other_settings_are_other_windows(images, tmp_path):
    pytest.importorskip("cv2.ximgproc")
    for min_side in (5, 25):
        provider = SelectiveSearch(tmp_path / "cache", min_side=min_side)
        provider.prepare(images)
        sides = provider(images[0])[:, 2:] - provider(images[0])[:, :2]
        assert min_side <= sides.min() < 25 + min_side
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 2


def test_without_contrib_modules_the_message_says_what_to_install(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[selective-search\]".*proposals=grid'):
        SelectiveSearch(tmp_path).prepare(images)
