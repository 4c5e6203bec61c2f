"""Selective search: what it finds, and when the cache is used."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from detection.data import selective_search
from detection.data.images import ImageRecord
from detection.data.proposals import recall
from detection.data.selective_search import SelectiveSearch


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

    search = SelectiveSearch(tmp_path / "cache", min_side=5)
    search.prepare(images)
    rectangles = [torch.tensor([[10.0 * number, 10, 10 * number + 30, 40]]) for number in (1, 2, 3)]
    assert recall([search(image) for image in images], rectangles, [0.8]) == {0.8: 1.0}


def test_windows_are_in_pixels_of_the_image_where_it_was_shrunk(images):
    pytest.importorskip("cv2.ximgproc")
    windows = SelectiveSearch("unused", max_side=40, min_side=5).search(images[0])
    assert windows.dtype == np.int16 and windows[:, 2].max() == 80 and windows[:, 3].max() == 60


def test_two_searches_agree_and_small_windows_and_surplus_are_left_out(real_data):
    pytest.importorskip("cv2.ximgproc")
    path = real_data / "voc_animals/val/2008_008034.jpg"
    image = ImageRecord(1, path, *Image.open(path).size)
    search = SelectiveSearch("unused", max_side=120, min_side=20, max_proposals=20)
    first = search.search(image)
    assert np.array_equal(first, search.search(image))
    assert len(first) == 20 and (first[:, 2:] - first[:, :2]).min() >= 20


class TestCache:
    @pytest.fixture
    def searched(self, monkeypatch):
        """Ids of the images that were searched; the search itself is stood in for."""
        pytest.importorskip("cv2.ximgproc")
        ids = []

        def search(self, image):
            ids.append(image.id)
            return np.array([[0, 0, image.id, image.id]], np.int16)

        monkeypatch.setattr(SelectiveSearch, "search", search)
        return ids

    def test_each_image_is_searched_once(self, images, tmp_path, searched):
        for _ in range(2):
            search = SelectiveSearch(tmp_path / "cache")
            search.prepare(images)
            assert [search(image).tolist() for image in images] == [[[0, 0, i, i]] for i in (1, 2, 3)]
        assert sorted(searched) == [1, 2, 3]

    def test_other_settings_or_another_image_are_noticed(self, images, tmp_path, searched):
        SelectiveSearch(tmp_path / "cache").prepare(images)
        SelectiveSearch(tmp_path / "cache", min_side=11).prepare(images)
        assert len(searched) == 6
        Image.new("RGB", (80, 60)).save(images[0].path)
        SelectiveSearch(tmp_path / "cache").prepare(images)
        SelectiveSearch(tmp_path / "cache").prepare([replace(images[0], id=4), *images[1:]])
        assert len(searched) == 12

    def test_images_of_two_splits_may_share_ids(self, images, tmp_path, searched):
        search = SelectiveSearch(tmp_path / "cache")
        search.prepare([images[0]])
        search.prepare([replace(images[1], id=1)])
        assert len(search(images[0])) == len(search(replace(images[1], id=1))) == 1

    def test_an_interrupted_search_goes_on_where_it_was(self, images, tmp_path, searched, monkeypatch):
        monkeypatch.setattr(selective_search, "CHUNK", 1)
        images[2].path.rename(tmp_path / "hidden")
        search = SelectiveSearch(tmp_path / "cache")
        search.prepare(images[:2])
        (tmp_path / "hidden").rename(images[2].path)
        search.prepare(images)
        assert sorted(searched) == [1, 2, 3]


def test_without_contrib_modules_the_message_says_what_to_install(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[selective-search\]".*proposals=grid'):
        SelectiveSearch(tmp_path).prepare(images)
