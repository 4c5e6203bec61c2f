"""The data set: what an item holds, and what is checked before the first one is read."""

import pytest
import torch

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.data.coco import CocoDetection, collate
from roi_quantization.detection.data.proposals.grid import Grid
from roi_quantization.detection.data.transforms import resize_and_flip


def test_an_item_holds_float_boxes_contiguous_labels_and_crowd_apart(small_set):
    dataset = CocoDetection(**small_set.paths)
    assert dataset.image_ids == [3, 5, 7]
    image, target = dataset[2]
    assert image.dtype == torch.uint8 and image.shape == (3, 40, 60) and type(image) is torch.Tensor
    # [x, y, w, h] -> edges; the second sticks out of the 60 x 40 image and is cut
    assert target["boxes"].tolist() == [[10.5, 5, 30.5, 15.25], [50, 30, 60, 40]]
    assert target["labels"].tolist() == [3, 1]  # categories 90 and 4 of 4, 17, 90
    assert target["crowd"].tolist() == [[0, 0, 30, 30]]
    assert target["proposals"].shape[1] == 4 and len(target["proposals"]) > 0
    assert (target["image_id"], target["original_size"]) == (7, (40, 60))
    assert target.keys() == {"boxes", "labels", "crowd", "proposals", "image_id", "original_size"}
    for name in ("boxes", "crowd", "proposals"):
        assert target[name].dtype == torch.float32 and type(target[name]) is torch.Tensor


def test_categories_and_labels_ascend_with_the_category_id(small_set):
    dataset = CocoDetection(**small_set.paths)
    assert dataset.categories == [{"id": 4, "name": "plane"}, {"id": 17, "name": "cat"}, {"id": 90, "name": "brush"}]
    assert dataset.label_to_category_id == {1: 4, 2: 17, 3: 90}


def test_images_without_objects_are_kept_unless_told_otherwise(small_set):
    _, target = CocoDetection(**small_set.paths)[1]
    assert target["boxes"].shape == target["crowd"].shape == (0, 4) and target["labels"].shape == (0,)
    assert CocoDetection(**small_set.paths, keep_empty=False).image_ids == [3, 7]


def test_an_image_with_crowd_alone_has_no_objects(small_set):
    for number in (0, 1):
        small_set.change("annotations", number, iscrowd=1)
    assert CocoDetection(**small_set.paths, keep_empty=False).image_ids == [3]
    _, target = CocoDetection(**small_set.paths)[2]
    assert len(target["boxes"]) == 0 and len(target["crowd"]) == 3


def test_coco_holds_exactly_the_images_of_the_set_as_annotated(small_set):
    dataset = CocoDetection(**small_set.paths, ids=[7])
    assert dataset.coco.getImgIds() == [7] and len(dataset) == 1
    assert dataset.coco.anns[2]["bbox"] == [50, 30, 20, 20]  # not cut: COCOeval is to see what COCO says
    assert dataset.coco.anns[3]["iscrowd"] == 1


def test_objects_of_pycocotools_are_made_for_evaluation_alone(small_set):
    """Training reads flat arrays, whose memory the data-loader workers share."""
    dataset = CocoDetection(**small_set.paths)
    for index in range(3):
        dataset[index]
    assert "coco" not in vars(dataset)
    assert dataset.coco is dataset.coco


def test_annotations_that_change_before_the_evaluation_are_refused(small_set):
    dataset = CocoDetection(**small_set.paths)
    content = small_set.paths["annotations"].read_bytes()
    small_set.change("annotations", 0, bbox=[1, 2, 3, 4])
    with pytest.raises(InputError, match=r"has changed since this program began.* Restore it, and go on"):
        _ = dataset.coco
    small_set.paths["annotations"].write_bytes(content)
    assert len(dataset.coco.imgs) == 3


def test_the_flip_of_an_image_depends_on_seed_epoch_and_id_not_on_order(small_set):
    def flips(seed, epoch, order=(0, 1, 2)):
        dataset = CocoDetection(**small_set.paths, transform=resize_and_flip(flip=0.5), seed=seed)
        dataset.set_epoch(epoch)
        plain = CocoDetection(**small_set.paths)
        return {index: not torch.equal(dataset[index][0], plain[index][0]) for index in order}

    assert flips(0, 3) == flips(0, 3, order=(2, 0, 1))
    assert len({tuple(flips(0, epoch).values()) for epoch in range(10)}) > 1
    assert len({tuple(flips(seed, 0).values()) for seed in range(10)}) > 1


def test_masks_move_with_the_image_and_belong_to_the_objects_alone(small_set):
    """Image 7 has two objects, whose masks are drawn left and right, and a crowd region."""
    for number, (low, high) in enumerate([(10, 30), (50, 60), (0, 30), (0, 60)]):
        small_set.change("annotations", number, segmentation=[[low, 0, high, 0, high, 40, low, 40]])
    for flip, columns in ((0.0, [(20, 60), (100, 120)]), (1.0, [(60, 100), (0, 20)])):
        dataset = CocoDetection(**small_set.paths, masks=True, transform=resize_and_flip(80, 120, flip=flip))
        masks = dataset[2][1]["masks"]
        assert masks.dtype == torch.uint8 and masks.shape == (2, 80, 120) and type(masks) is torch.Tensor
        for mask, (low, high) in zip(masks, columns, strict=True):
            assert mask.sum() == mask[:, low:high].sum() == 80 * (high - low)
    assert dataset[1][1]["masks"].shape == (0, 80, 120), "an image without objects"
    assert dataset.coco.anns[3]["segmentation"], "COCOeval is to see the crowd's"


def test_collate_keeps_lists(small_set):
    dataset = CocoDetection(**small_set.paths)
    images, targets = collate([dataset[0], dataset[2]])
    assert isinstance(images, list) and [target["image_id"] for target in targets] == [3, 7]


def test_a_missing_folder_shows_the_layout(small_set, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)val2017 is not a folder of images.*val2017\.zip"):
        CocoDetection(**small_set.paths | {"images": tmp_path / "val2017"})


def test_an_image_may_be_a_link_to_another_folder(small_set, tmp_path):
    (small_set.images / "b.png").rename(tmp_path / "b.png")
    (small_set.images / "b.png").symlink_to(tmp_path / "b.png")
    assert CocoDetection(**small_set.paths)[0][0].shape == (3, 40, 60)


def test_missing_images_are_counted_before_training_starts(small_set):
    (small_set.images / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 images .* the first is b\.png \(image 3\)"):
        CocoDetection(**small_set.paths)
    assert len(CocoDetection(**small_set.paths, ids=[5, 7])) == 2  # only what is used need be there
    small_set.change("images", 1, file_name="val/0001.png")
    with pytest.raises(FileNotFoundError, match=r"the first is val/0001\.png \(image 3\)"):
        CocoDetection(**small_set.paths)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        (
            "images\\b.png",
            r"write / in the place of each\. images/b\.png is in {root}: set data\.<split>\.images={root}, or b\.png is there: rem",
        ),
        (
            "images/b.png",
            r"\(image 3\)\. images/b\.png is in {root}: set data\.<split>\.images={root}, or b\.png is there: remove the folder from",
        ),
        ("train/b.png", r"\(image 3\)\. b\.png is there: remove the folder from file_name$"),
        ("train\\b.png", r"write / in the place of each\. b\.png is there: remove the folder from file_name$"),
        ("train\\d.png", r"write / in the place of each\. Do images and annotations belong together\?$"),
        ("d.png", r"\. Is the archive unpacked as a whole"),
    ],
)
def test_a_file_name_from_windows_or_with_a_folder_says_what_to_write(small_set, name, remedy):
    small_set.change("images", 1, file_name=name)
    with pytest.raises(FileNotFoundError, match=remedy.format(root=small_set.images.parent)):
        CocoDetection(**small_set.paths)


def test_coco_as_published(real_data):
    """80 categories with ids 1..90, boxes with fractions, crowd regions, images without objects."""
    folder = real_data / "coco"
    paths = {"images": folder / "val2017", "annotations": folder / "annotations/instances_val2017.json"}
    dataset = CocoDetection(**paths, proposals=Grid([0.5]), transform=resize_and_flip(600, 1000))
    assert len(dataset.categories) == 80 and dataset.label_to_category_id[80] == 90
    assert sum(len(dataset[index][1]["boxes"]) + len(dataset[index][1]["crowd"]) for index in range(len(dataset))) == 382
    image, target = dataset[0]
    assert min(image.shape[1:]) == 600 or max(image.shape[1:]) == 1000
    assert target["proposals"].max() <= max(image.shape[1:])
