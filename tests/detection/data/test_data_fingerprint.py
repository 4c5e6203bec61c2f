"""What of the data is compared when a run goes on."""

from types import SimpleNamespace

import pytest
from PIL import Image

from roi_quantization.detection.data import data_fingerprint
from roi_quantization.detection.data.coco import CocoDetection
from roi_quantization.detection.data.data_fingerprint import DataFingerprint
from roi_quantization.detection.data.proposals.grid import Grid


def fingerprint(small_set, required=True, **changes):
    return DataFingerprint(SimpleNamespace(train=CocoDetection(**small_set.paths | changes), val=None, test=None), required)


def add_image(small_set):
    Image.new("RGB", (60, 40)).save(small_set.images / "d.png")
    small_set.instances["images"].append({"id": 2, "file_name": "d.png", "width": 60, "height": 40})
    small_set.write()


def remove_image(small_set):
    small_set.instances["images"] = [image for image in small_set.instances["images"] if image["id"] != 5]
    small_set.write()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_image, r"train has 1 new images \(the first is 2\)\."),
        (remove_image, r"train lacks 1 images \(the first is 5\)\."),
        (lambda s: Image.new("RGB", (60, 40)).save(s.images / "b.png"), r"1 images of train have another file .* \(the first is 3\)\."),
        (lambda s: s.change("annotations", 0, bbox=[10, 5, 20, 10.25]), r"1 images of train have other annotations \(the first is 7\)\."),
        (lambda s: s.change("annotations", 3, category_id=4), r"1 images of train have other annotations \(the first is 3\)\."),
        (lambda s: s.change("annotations", 3, iscrowd=1), r"1 images of train have other annotations \(the first is 3\)\."),
        (lambda s: s.change("categories", 0, name="comb"), r"3 images of train have other annotations \(the first is 3\)\."),
    ],
)
def test_a_change_is_named_and_refused(small_set, change, message):
    before = fingerprint(small_set).state_dict()
    change(small_set)
    with pytest.raises(ValueError, match=rf"not those that this run began with: {message} Put the old data back, .*same_data=false"):
        fingerprint(small_set).load_state_dict(before)


def test_another_picture_of_the_same_size_in_bytes_is_refused(small_set):
    for name in ("a", "b", "c"):  # uncompressed
        Image.new("RGB", (60, 40)).save(small_set.images / f"{name}.bmp")
    for number, name in enumerate("abc"):
        small_set.change("images", number, file_name=f"{name}.bmp")
    before = fingerprint(small_set).state_dict()
    Image.new("RGB", (60, 40), "red").save(small_set.images / "b.bmp")
    with pytest.raises(ValueError, match=r"1 images of train have another content \(the first is 3\)"):
        fingerprint(small_set).load_state_dict(before)
    before["train"].pop("content")
    fingerprint(small_set).load_state_dict(before)  # a checkpoint of an earlier version


def test_other_proposals_are_refused(small_set):
    before = fingerprint(small_set).state_dict()
    with pytest.raises(ValueError, match=r"3 images of train have other proposals \(the first is 3\)"):
        fingerprint(small_set, proposals=Grid([0.25])).load_state_dict(before)


def test_with_leave_the_run_goes_on_and_says_what_differs(small_set, caplog):
    before = fingerprint(small_set).state_dict()
    add_image(small_set)
    fingerprint(small_set, required=False).load_state_dict(before)
    assert "train has 1 new images" in caplog.text


def test_what_decides_nothing_may_differ(small_set, caplog):
    """The order and form of the json, and where the images lie."""
    before = fingerprint(small_set).state_dict()
    small_set.instances["images"].reverse()
    small_set.change("annotations", 0, segmentation=[[1, 2, 3, 4, 5, 6]])
    elsewhere = small_set.images.rename(small_set.images.with_name("elsewhere"))
    fingerprint(small_set, images=elsewhere).load_state_dict(before)
    assert not [record for record in caplog.records if record.name == data_fingerprint.__name__]
