"""The cache: what is computed, what is found again, and what a killed run leaves."""

import os
import signal
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest

from roi_quantization.detection.common.files import NotWrittenError
from roi_quantization.detection.data.images import ImageRecord
from roi_quantization.detection.data.proposals import cache as module
from roi_quantization.detection.data.proposals.cache import ProposalCache
from roi_quantization.detection.data.proposals.file import ProposalFile


@pytest.fixture
def images(tmp_path):
    """Six files that are never opened, of 80 x 60 pixels."""
    records = []
    (tmp_path / "val").mkdir()
    for number in range(1, 7):
        (tmp_path / f"val/{number}.png").write_bytes(bytes(number))
        records.append(ImageRecord(number, tmp_path / f"val/{number}.png", 80, 60))
    return records


class Computed(list):
    """Ids of the images whose windows were computed; stops before image `until`, as a killed run does."""

    def __call__(self, images, until=None):
        for image in images:
            if image.id == until:
                raise KeyboardInterrupt
            self.append(image.id)
            yield np.tile(np.int16([0, 0, image.id, image.id]), (image.id, 1))


@pytest.fixture
def cache(tmp_path):
    return ProposalCache(tmp_path / "cache", "method")


def lengths(boxes):
    return [len(of_image) for of_image in boxes]


def files(cache):
    return sorted(path.name for path in cache.folder.glob("*.npz"))


def test_a_set_is_one_compact_file_that_serves_its_subsets(cache, images):
    computed = Computed()
    assert lengths(cache.get(images, computed)) == [1, 2, 3, 4, 5, 6]
    boxes = cache.get(images[3:1:-1], computed)
    assert lengths(boxes) == [4, 3] and boxes[0].dtype == np.int16
    assert computed == [1, 2, 3, 4, 5, 6] and len(files(cache)) == 1
    assert files(cache)[0].startswith("method_val_"), "it tells the folder of the images"


def test_a_set_that_grows_is_completed(cache, images):
    computed = Computed()
    cache.get(images[:2], computed)
    assert lengths(cache.get(images[:4], computed)) == [1, 2, 3, 4]
    assert computed == [1, 2, 3, 4]


def test_an_image_that_was_exchanged_is_noticed(cache, images):
    computed = Computed()
    cache.get(images, computed)
    images[1].path.write_bytes(b"xy")  # another file of the same size
    images[2] = replace(images[2], width=81)  # another size
    cache.get(images, computed)
    assert computed[6:] == [2, 3]


def test_what_was_done_before_an_end_is_kept(cache, images, monkeypatch):
    monkeypatch.setattr(module, "PART", 2)
    computed = Computed()
    with pytest.raises(KeyboardInterrupt):
        cache.get(images, lambda missing: computed(missing, until=6))
    assert len(files(cache)) == 2, "two whole parts; image 5 was alone in the third"
    assert lengths(cache.get(images, computed)) == [1, 2, 3, 4, 5, 6]
    assert computed == [1, 2, 3, 4, 5, 5, 6]
    assert len(files(cache)) == 1, "the parts are joined"


def test_a_killed_process_leaves_parts_and_nothing_half_written(cache, images, monkeypatch):
    """SIGKILL: no handler runs, and the lock is the system's to free."""
    monkeypatch.setattr(module, "PART", 2)

    def killed(missing):
        yield from Computed()(missing[:3])
        (cache.folder / ".method_val_0.npz.1.tmp").write_bytes(b"PK, and half of the rest")
        os.kill(os.getpid(), signal.SIGKILL)

    process = get_context("fork").Process(target=cache.get, args=(images, killed))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    computed = Computed()
    assert lengths(cache.get(images, computed)) == [1, 2, 3, 4, 5, 6]
    assert computed == [3, 4, 5, 6]
    assert len(files(cache)) == 1 and not list(cache.folder.glob(".*.tmp"))


def test_a_damaged_file_is_named_and_computed_again(cache, images, caplog):
    computed = Computed()
    cache.get(images, computed)
    path = cache.folder / files(cache)[0]
    path.write_bytes(path.read_bytes()[:200])
    assert lengths(cache.get(images, computed)) == [1, 2, 3, 4, 5, 6]
    assert len(computed) == 12 and f"{path} is damaged" in caplog.text


def test_a_picture_of_the_same_name_and_size_in_another_folder_is_another(cache, images, tmp_path):
    computed = Computed()
    cache.get(images[:1], computed)
    (tmp_path / "other").mkdir()
    other = replace(images[0], path=tmp_path / "other/1.png")
    other.path.write_bytes(b"x")
    cache.get([other], computed)
    assert computed == [1, 1]
    other.path.write_bytes(images[0].path.read_bytes())
    cache.get([other], computed)
    assert computed == [1, 1], "a copy is the same picture"


def test_a_folder_that_cannot_be_written_names_roi_cache(images, tmp_path):
    (tmp_path / "data").write_text("a file in the place of the folder")
    with pytest.raises(NotWrittenError, match=r"data/proposals could not be written.* ROI_CACHE to a folder that can be written"):
        ProposalCache(tmp_path / "data/proposals", "method").get(images, Computed())


def test_images_of_two_sets_may_share_ids(cache, images):
    computed = Computed()
    cache.get(images[:1], computed)
    cache.get([replace(images[1], id=1)], computed)
    assert computed == [1, 1]


def test_the_file_is_a_proposal_file_for_others_too(cache, images):
    cache.get(images, Computed())
    proposals = ProposalFile(cache.folder / files(cache)[0])
    proposals.prepare(images)
    with pytest.raises(ValueError, match=r"no proposals for 1 of 1 images; the first is image 99"):
        proposals.prepare([replace(images[0], id=99)])
