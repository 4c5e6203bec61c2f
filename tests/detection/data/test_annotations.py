"""The instances json: what is accepted, what is refused and how the message helps, and which images a subset is."""

import json
import logging

import pytest

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.data.annotations import as_coco, choose_classes, choose_ids, choose_images, read_instances, restrict


def test_missing_fields_that_can_be_known_are_filled_in(small_set):
    for annotation in small_set.instances["annotations"]:
        for key in ("id", "area", "iscrowd"):
            annotation.pop(key)
    small_set.write()
    first = read_instances(small_set.annotations)["annotations"][0]
    assert (first["id"], first["area"], first["iscrowd"]) == (1, 20 * 10.25, 0)


def test_an_area_that_is_missing_is_that_of_the_mask_where_masks_are_read(small_set):
    """As COCO's: COCOeval sorts masks into sizes by it, and boxes too."""
    for annotation in small_set.instances["annotations"]:
        annotation["segmentation"] = [[10, 5, 20, 5, 20, 15]]
    small_set.instances["annotations"][0].pop("area")
    small_set.write()
    of_mask, given = (read_instances(small_set.annotations, masks=True)["annotations"][number]["area"] for number in (0, 1))
    assert of_mask == pytest.approx(50, abs=10) and given == 100
    assert read_instances(small_set.annotations)["annotations"][0]["area"] == 20 * 10.25


@pytest.mark.parametrize("size", [{"width": 60.0}, {"height": 40.0}, {"width": 60.0, "height": 40.0}])
def test_whole_sizes_may_be_floats(small_set, size):
    small_set.change("images", 0, **size)
    image = read_instances(small_set.annotations)["images"][0]
    assert (image["width"], image["height"]) == (60, 40) and type(image["width"]) is type(image["height"]) is int


def test_boxes_without_area_in_their_image_are_dropped_counted_and_told(small_set, caplog):
    small_set.change("annotations", 0, bbox=[10, 10, 1e-7, 5])  # no width in float32
    small_set.change("annotations", 1, bbox=[60, 0, 5, 5])  # begins where the image ends
    with caplog.at_level(logging.WARNING):
        instances = read_instances(small_set.annotations)
    assert [annotation["id"] for annotation in instances["annotations"]] == [3, 4]
    assert "dropped 2 boxes" in caplog.text and "instances.json" in caplog.text


def test_a_missing_file_shows_the_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)nowhere\.json.*train2017\.zip.*annotations_trainval2017\.zip"):
        read_instances(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', "not a json file, or is truncated"),
        ("[1, 2]", "holds a list"),
        ("[" * 100_000 + "]" * 100_000, "not a json file.*recursion"),
        ('{"images": [' + "1" * 10_000 + "]}", "not a json file.*Exceeds the limit"),
        ('{"info": {}}', "no list 'images'.*this file: info"),
        ('{"images": [], "annotations": [], "categories": {}}', "no list 'categories'"),
        ('{"images": [{"id": 1, "file_name": "a", "width": 2}], "annotations": [], "categories": []}', r"images\[0\] has no 'height'"),
    ],
)
def test_a_broken_or_foreign_json_is_named_with_what_is_missing(tmp_path, text, message):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"captions.json.*{message}"):
        read_instances(path)


@pytest.mark.parametrize(
    ("section", "number", "values", "message"),
    [
        ("annotations", 3, {"image_id": 99}, "1 of 4 annotations have an unknown image_id; the first is 99"),
        ("annotations", 3, {"category_id": 5}, "1 of 4 annotations have an unknown category_id; the first is 5"),
        ("annotations", 3, {"bbox": [1, 2, 3]}, r"annotation 4 of image 3 has bbox \[1, 2, 3\]"),
        ("annotations", 3, {"bbox": [1, 2, 3, float("nan")]}, "annotation 4 of image 3"),
        ("annotations", 3, {"id": 1}, "2 annotations have the id 1; give each of the 4 an id of its own"),
        ("images", 0, {"id": 3}, r"2 images have the id 3 \('a\.png', 'b\.png'\); give each of the 3 images an id of its own"),
        ("categories", 0, {"id": 4}, r"2 categories have the id 4 \('brush', 'plane'\)"),
        ("images", 0, {"id": "a7"}, "must be integers, but one is 'a7'"),
        ("images", 0, {"id": True}, "must be integers, but one is True"),
        ("images", 0, {"id": 7.0}, "must be integers, but one is 7.0"),
        ("images", 0, {"id": [7]}, r"the ids of images must be integers, but one is \[7\]"),
        ("images", 0, {"id": 10**30}, "must be integers"),
        ("categories", 0, {"name": ["brush"]}, r"category 90 has the name \['brush'\]; expected a string"),
        ("annotations", 3, {"image_id": {}}, r"the image_ids of annotations must be integers, but one is \{\}"),
        ("annotations", 3, {"bbox": [1, 2, 3, 10**400]}, r"annotation 4 of image 3 has bbox \[1, 2, 3, 10+\.\.\.; expected four finite"),
        ("annotations", 3, {"area": float("inf")}, "annotation 4 of image 3 has area inf"),
        ("annotations", 3, {"area": "large"}, "annotation 4 of image 3 has area 'large'"),
        ("annotations", 3, {"iscrowd": "no"}, "annotation 4 of image 3 has iscrowd 'no'; expected 0 or 1"),
        ("annotations", 3, {"id": [4]}, r"annotations\[3\] of image 3 has id \[4\]; expected an integer"),
        ("images", 0, {"file_name": "../../etc/passwd"}, r"image 7 has file_name '\.\./\.\./etc/passwd'; expected a name in the folder"),
        ("images", 0, {"file_name": "a/../../x.png"}, "image 7 has file_name"),
        ("images", 0, {"file_name": "/etc/passwd"}, "image 7 has file_name '/etc/passwd'"),
        ("images", 0, {"file_name": "C:\\data\\1.png"}, "image 7 has file_name .*1.png'; expected a name in the folder of images"),
        ("images", 0, {"file_name": "a\0.png"}, r"image 7 has file_name 'a\\x00\.png'"),
        ("images", 0, {"file_name": ""}, "image 7 has file_name ''"),
        ("images", 0, {"file_name": None}, "image 7 has file_name None"),
        ("images", 0, {"width": 100_000, "height": 100_000}, r"image 7 \(a\.png\): 100000 x 100000 is too large to be a photograph"),
        ("images", 0, {"width": 10**9}, r"image 7 \(a\.png\): 1000000000 x 40 is too large"),
        ("images", 0, {"width": 1e999}, "image 7 has size inf x 40"),
        ("images", 0, {"width": True}, "image 7 has size True x 40"),
        ("images", 0, {"width": 60.5}, "image 7 has size 60.5 x 40; expected whole pixels"),
        ("images", 0, {"width": float("nan")}, "image 7 has size nan x 40; expected whole pixels"),
        ("images", 0, {"height": 0}, "image 7 has size 60 x 0"),
        ("images", 0, {"width": "60"}, "image 7 has size '60' x 40; expected whole pixels"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(small_set, section, number, values, message):
    small_set.change(section, number, **values)
    with pytest.raises(ValueError, match=message):
        read_instances(small_set.annotations)


def test_a_restricted_set_keeps_all_categories(small_set, capsys):
    coco = as_coco(restrict(read_instances(small_set.annotations), [3, 5]))
    assert coco.getImgIds() == [3, 5] and coco.getCatIds() == [90, 4, 17] and list(coco.anns) == [4]
    assert capsys.readouterr().out == ""


def test_a_class_may_be_chosen_by_a_name_that_yaml_reads_as_a_number(small_set):
    for number, name in enumerate("012"):
        small_set.change("categories", number, name=name)
    chosen = choose_classes(read_instances(small_set.annotations), [0, "2"])
    assert [category["id"] for category in chosen["categories"]] == [90, 17]
    assert [annotation["id"] for annotation in chosen["annotations"]] == [1, 4]
    with pytest.raises(ValueError, match=r"classes=1: expected a list of names, such as \[0, 1\]"):
        choose_classes(read_instances(small_set.annotations), 1)


@pytest.mark.parametrize("part", [0.5, [0.5], ["a", "b"], "ab"])
def test_a_part_that_is_not_two_shares_is_refused(small_set, part):
    with pytest.raises(InputError, match=r"part=.*: expected two shares of the images, such as \[0, 0\.8\], or null for all"):
        choose_images(read_instances(small_set.annotations), part=part)


class TestChooseIds:
    def test_a_subset_is_the_same_everywhere(self):
        # Hard-wired on purpose: these numbers must never change, or figures of the same `data.subset` no longer compare.
        assert choose_ids(range(100, 120), subset=5) == choose_ids(range(119, 99, -1), subset=5) == [101, 108, 110, 118, 119]

    def test_another_seed_is_another_subset(self):
        assert choose_ids(range(1000), subset=5, seed=1) != choose_ids(range(1000), subset=5, seed=2)

    def test_ids_come_from_a_list_or_a_file(self, tmp_path):
        (tmp_path / "ids.txt").write_text("3\n1\n")
        assert choose_ids([1, 2, 3], ids=[3, 1]) == choose_ids([1, 2, 3], ids=tmp_path / "ids.txt") == [1, 3]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"subset": 4}, "subset=4 of 3 images: choose a whole number between 1 and 3"),
            ({"subset": 0}, "choose a whole number between 1 and 3"),
            ({"subset": 0.5}, r"subset=0\.5 of 3 images: choose a whole number between 1 and 3"),
            ({"ids": 1}, r"ids=1: expected a list of image ids, such as \[1,2\], or a text file"),
            ({"ids": ["a"]}, r"ids=\['a'\]: expected a list of image ids"),
            ({"ids": [1, 8, 9]}, "2 of 3 image ids are not in the annotations; the first is 8"),
            ({"ids": [1], "subset": 1}, "exclude each other"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            choose_ids([1, 2, 3], **options)

    def test_a_file_of_something_else_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"ids=nope\.txt: there is no such file\. Expected a text file of image ids, or a list"):
            choose_ids([1], ids="nope.txt")
        (tmp_path / "ids.txt").write_text(json.dumps({"ids": [1]}))
        with pytest.raises(ValueError, match=r"ids\.txt: expected image ids"):
            choose_ids([1], ids=tmp_path / "ids.txt")


def test_segmentations_are_kept_where_masks_are_asked_for(small_set):
    corners = [[10.5, 5, 30.5, 5, 30.5, 15.25]]
    for number in range(4):
        small_set.change("annotations", number, segmentation=corners)
    assert "segmentation" not in read_instances(small_set.annotations)["annotations"][0]
    assert read_instances(small_set.annotations, masks=True)["annotations"][0]["segmentation"] == corners


def test_boxes_alone_and_broken_segmentations_are_named_where_masks_are_asked_for(small_set):
    with pytest.raises(
        InputError, match=r"4 of 4 annotations have a bbox only; the first is annotation 1 of image 7 \(a\.png\)\. .*masks=false"
    ):
        read_instances(small_set.annotations, masks=True)
    for number in range(4):
        small_set.change("annotations", number, segmentation=[[0, 0, 9, 0, 9, 9]])
    small_set.change("annotations", 3, segmentation=[[0, 0, 9, 0]])
    with pytest.raises(InputError, match=r"json: the segmentation of annotation 4 of image 3 \(b\.png\) has a polygon of 4 numbers"):
        read_instances(small_set.annotations, masks=True)
