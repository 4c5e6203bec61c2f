"""What is legal and implausible is counted and named, and refused where nothing sound is left."""

import logging
import shutil

import numpy as np
import pytest

from roi_quantization.detection.data.coco import CocoDetection
from roi_quantization.detection.data.module import DetectionData
from roi_quantization.detection.data.plausibility import judge_annotations, judge_boxes, judge_images, judge_splits, judge_windows
from roi_quantization.detection.data.proposals.grid import Grid

SIZE = np.array([640, 480])


def scattered(n=200, seed=0):
    """Boxes x1, y1, x2, y2 inside images of 640 x 480, some of which touch a border."""
    rng = np.random.default_rng(seed)
    edges = np.sort(rng.uniform(-0.1, 1.1, (n, 2, 2)).clip(0, 1), axis=1) * SIZE
    edges[:, 1] = np.maximum(edges[:, 1], edges[:, 0] + 8)
    return np.concatenate([edges[:, 0], edges[:, 1]], axis=1) - np.tile(np.maximum(edges[:, 1] - SIZE, 0), 2)


def xywh(boxes):
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def centred(boxes):
    return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)


def findings(judge, boxes):
    return [(finding.text, finding.is_fatal) for finding in judge(boxes, np.tile(SIZE, (len(boxes), 1)), "number {}".format)]


class TestBoxes:
    def judged(self, boxes):
        return findings(judge_boxes, boxes)

    @pytest.mark.parametrize("count", [1, 5, 200])
    def test_plausible_boxes_have_no_findings(self, count):
        assert self.judged(xywh(scattered())[:count]) == []
        assert self.judged(np.zeros((0, 4))) == []

    @pytest.mark.parametrize(
        ("wrong", "order"),
        [(scattered(), r"[x1, y1, x2, y2] (100% fit)"), (centred(scattered()), "[centre x, centre y, width, height] (100%")],
    )
    def test_another_order_of_the_coordinates_is_refused(self, wrong, order):
        ((text, is_fatal),) = self.judged(wrong)
        assert f"more plausible as {order}" in text or f"or {order}" in text
        assert is_fatal
        ((text, is_fatal),) = self.judged(wrong[np.flatnonzero((wrong[:, :2] + wrong[:, 2:] > SIZE + 1).any(axis=1))[:5]])
        assert text.startswith("5 of 5 boxes reach more than a pixel out of their image; the first is number 0") and not is_fatal

    @pytest.mark.parametrize("scale", [SIZE, 2 * SIZE, 1000 * SIZE])
    def test_boxes_of_less_than_a_pixel_are_refused(self, scale):
        (text, is_fatal), *_ = self.judged(xywh(scattered()) / np.tile(scale, 2))
        assert text.startswith("all 200 boxes are below a pixel; the first is number 0. They are normalised") and is_fatal

    def test_a_few_boxes_are_counted(self):
        boxes = xywh(scattered())
        boxes[7], boxes[9] = [630, 100, 12, 30], [3, 3, 0.5, 0.5]
        (tiny, tiny_is_fatal), (outside, outside_is_fatal) = self.judged(boxes)
        assert tiny == "1 of 200 boxes are smaller than a pixel; the first is number 9. Are they in pixels?"
        assert outside.startswith("1 of 200 boxes reach more than a pixel out of their image; the first is number 7. They are cut")
        assert not tiny_is_fatal and not outside_is_fatal
        boxes[7, 0], boxes[9] = 628.9, [3, 3, 1, 1]
        assert self.judged(boxes) == [], "less than a pixel outside"

    def test_boxes_of_smaller_images_and_percentages(self):
        for boxes, reach in (
            (xywh(scattered()) / 2, "50% of the width and 50% of the height"),
            (xywh(scattered()) / 640 * 100, "16% of the"),
        ):
            ((text, is_fatal),) = self.judged(boxes)
            assert text.startswith(f"no box ends beyond {reach}") and not is_fatal

    def test_objects_that_are_listed_twice(self):
        boxes, ids = xywh(scattered()), np.arange(200) // 3
        assert not list(judge_annotations(ids, ids % 2, boxes, str))
        again = np.r_[np.arange(200), 5, 6, 7, 8]
        (finding,) = judge_annotations(ids[again], ids[again] % 2, boxes[again], str)
        assert finding.text == "4 of 204 objects are annotated more than once; the first is 200. Remove the copies" and not finding.is_fatal
        assert not list(judge_annotations(ids[again], np.arange(204), boxes[again], str)), "of another category"
        assert not list(judge_annotations(np.zeros(0), np.zeros(0), np.zeros((0, 4)), str))


class TestWindows:
    def judged(self, boxes):
        return findings(judge_windows, boxes)

    def test_plausible_windows_have_no_findings(self):
        assert self.judged(scattered()) == [] == self.judged(np.zeros((0, 4)))

    def test_widths_and_heights_are_refused(self):
        ((text, is_fatal),) = self.judged(xywh(scattered()))
        assert "more plausible as [x, y, width, height]" in text and is_fatal

    def test_normalised_windows_are_refused(self):
        for windows in (scattered(), xywh(scattered())):
            (text, is_fatal), *_ = self.judged(windows / np.tile(SIZE, 2))
            assert text.startswith("all 200 windows are below a pixel") and is_fatal

    def test_windows_of_larger_images_are_refused(self):
        ((text, is_fatal),) = self.judged(4 * scattered())
        assert "They were made for other images" in text and is_fatal

    def test_a_few_windows_are_counted(self):
        windows = scattered()
        windows[[3, 8]] = [[600, 10, 650, 50], [30, 30, 20, 20]]
        ((text, is_fatal),) = self.judged(windows)
        assert text.startswith("2 of 200 windows have no area or reach more than a pixel out of their image; the first is number 3")
        assert not is_fatal


def test_one_file_of_two_images_and_one_name_of_two_categories():
    assert not list(judge_images({1: "a.jpg", 2: "b/a.jpg"}, {1: "cat", 2: "dog"}))
    image, category = judge_images({1: "a.jpg", 2: "./a.jpg", 3: "b.jpg"}, {1: "cat", 2: "dog", 9: "cat"})
    assert image.text.startswith("1 of 3 images have the file of another; the first is 'a.jpg' with the ids 1, 2.")
    assert category.text.startswith("1 of 3 categories have the name of another; the first is 'cat' with the ids 1, 9.")


def test_training_images_in_other_splits(tmp_path):
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "train")
    for name, content in (
        ("train/1.jpg", "one"),
        ("train/2.jpg", "two"),
        ("test/1.jpg", "one"),
        ("test/2.jpg", "TWO"),
        ("test/3.jpg", "one"),
    ):
        (tmp_path / name).write_text(content)
    train = [tmp_path / "train/1.jpg", tmp_path / "train/2.jpg"]
    (finding,) = judge_splits({"train": train, "val": [tmp_path / "link/2.jpg"]})
    assert finding.text.startswith(f"1 of 1 images of val are training images; the first is {tmp_path}/train/2.jpg.")
    (finding,) = judge_splits({"train": train, "test": [tmp_path / f"test/{number}.jpg" for number in (1, 2, 3)]})
    assert finding.text.startswith(f"1 of 3 images of test are training images; the first is {tmp_path}/test/1.jpg."), "a copy"
    (finding,) = judge_splits({"val": train, "test": train})
    assert f"of test are images of val, on which the best checkpoint is chosen; the first is {tmp_path}/train/1.jpg" in finding.text


class TestDataSets:
    """The findings of a data set, as it is opened."""

    def test_annotations_are_named_with_their_image(self, small_set, caplog):
        with caplog.at_level(logging.WARNING):
            CocoDetection(**small_set.paths)
        assert caplog.messages == [
            f"{small_set.annotations}: 1 of 4 boxes reach more than a pixel out of their image; the first is annotation 2 of image 7 "
            "(a.png), bbox [50, 30, 20, 20]. They are cut to the image. Was the image resized after it was annotated?"
        ]

    def test_normalised_boxes_are_refused(self, small_set):
        for number in range(4):
            small_set.change("annotations", number, bbox=[0.1, 0.1, 0.2, 0.2])
        with pytest.raises(ValueError, match=r"instances\.json: all 4 boxes are below a pixel; .*They are normalised: multiply"):
            CocoDetection(**small_set.paths)

    def test_areas_of_0_and_ignored_objects_are_counted(self, small_set, caplog):
        small_set.change("annotations", 1, bbox=[40, 20, 20, 20])
        for number in (1, 3):
            small_set.change("annotations", number, area=0)
        small_set.change("annotations", 2, ignore=1)  # a crowd region
        small_set.change("annotations", 3, ignore=1)
        dataset = CocoDetection(**small_set.paths)
        assert len(dataset.coco.anns) == 4  # read anew, and judged once
        assert caplog.messages == [
            f"{small_set.annotations}: 2 of 4 annotations have area 0, though their boxes have one; the first is annotation 2 of image 7 "
            "(a.png), bbox [40, 20, 20, 20]. They count as small objects: write the area in pixels, or leave it out for that of the box",
            f"{small_set.annotations}: 1 of 4 annotations have ignore and not iscrowd; the first is annotation 4 of image 3 (b.png), bbox "
            "[1, 2, 3, 4]. They count as objects, as in COCO's metrics: set iscrowd to 1 where they are to be ignored",
        ]

    def test_areas_that_are_left_out_are_those_of_the_boxes(self, small_set, caplog):
        small_set.change("annotations", 1, bbox=[40, 20, 20, 20])
        for annotation in small_set.instances["annotations"]:
            del annotation["area"]
        small_set.write()
        CocoDetection(**small_set.paths)
        assert caplog.messages == []

    def data(self, small_set, **splits):
        paths = {"images": str(small_set.images), "annotations": str(small_set.annotations)}
        made = DetectionData(small_set.images.parent, **{"train": paths, "val": None, "test": None} | splits, proposals=Grid([0.5]))
        made.setup()
        return made

    def test_training_without_objects_is_refused(self, small_set):
        for number in range(4):
            small_set.change("annotations", number, iscrowd=1)
        with pytest.raises(ValueError, match=r"the train split has no objects in 3 images; crowd regions .* There is nothing"):
            self.data(small_set)

    def test_validation_without_objects_is_logged(self, small_set, tmp_path, caplog):
        other = tmp_path / "other.json"
        shutil.copy(small_set.annotations, other)
        for number in range(4):
            small_set.change("annotations", number, iscrowd=1)
        splits = {"train": {"images": "images", "annotations": "other.json"}, "val": {"images": "images", "annotations": "instances.json"}}
        assert self.data(small_set, **splits).val.num_objects == 0
        assert "the val split has no objects in 3 images" in caplog.text and "Its AP is undefined" in caplog.text

    def test_categories_without_training_objects_are_logged_once(self, small_set, caplog):
        held_out = {"images": "images", "annotations": "instances.json", "ids": [3, 5]}
        self.data(small_set, val=held_out)
        assert "no training objects" not in caplog.text
        small_set.change("annotations", 0, category_id=4)
        self.data(small_set, val=held_out)
        assert [m for m in caplog.messages if "no training objects" in m] == [
            "1 of 3 categories has no training objects: brush. None of them will be found, and where val or test have some their AP of 0 "
            "lowers the mean. Annotate some, take more images for training, or choose others with data.classes"
        ]
        small_set.change("annotations", 1, iscrowd=1)
        small_set.change("annotations", 0, iscrowd=1)
        self.data(small_set, val=held_out)
        assert "2 of 3 categories have no training objects: plane; brush. " in caplog.text, "crowd regions are no objects"

    def test_a_split_that_holds_training_images_is_logged_once(self, small_set, caplog):
        held_out = {"images": "images", "annotations": "instances.json", "part": [0.6, 1.0]}
        self.data(small_set, train=held_out | {"part": None}, test=held_out)
        assert [m for m in caplog.messages if "training images" in m] == [
            f"{small_set.images.parent}: 1 of 1 images of test are training images; the first is {small_set.images}/b.png. Results on "
            "them are too good: remove them from one of the splits"
        ]

    def test_parts_of_the_same_images_have_none_in_common(self, small_set, caplog):
        split = {"images": "images", "annotations": "instances.json"}
        self.data(small_set, train=split | {"part": [0, 0.7]}, val=split | {"part": [0.7, 1]})
        assert "training images" not in caplog.text

    @pytest.mark.parametrize("name", ["coco", "voc_animals"])
    def test_published_sets_are_plausible(self, real_data, name, caplog):
        for path in sorted((real_data / name / "annotations").glob("instances_*.json")):
            folder = real_data / name / path.stem.removeprefix("instances_")
            CocoDetection(folder, path, Grid([0.5]))
        assert caplog.messages == []
