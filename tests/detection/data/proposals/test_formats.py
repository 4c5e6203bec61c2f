"""Detectron's pickle and MATLAB's selective search: by hand, through the provider that reads them."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from roi_quantization.detection.data.images import ImageRecord
from roi_quantization.detection.data.proposals.file import ProposalFile

ONE, TWO = ImageRecord(139, Path("000000000139.jpg"), 60, 40), ImageRecord(285, Path("000000000285.jpg"), 60, 40)
BOXES = [np.float32([[0, 0, 59, 39], [1.5, 2, 3, 4]]), np.float32([[5, 6, 7, 8]])]  # the last pixel inside; the first is the whole image
SCORES = [np.float32([0.1, 0.9]), np.float32([0.5])]
CONTINUOUS = [[[1.5, 2, 4, 5], [0, 0, 60, 40]], [[5, 6, 8, 9]]]  # best first


def provider(path, images=(ONE, TWO), **options):
    made = ProposalFile(path, **options)
    made.prepare(images)
    return made


def save(path, content):
    path.write_bytes(pickle.dumps(content))
    return path


class TestDetectron:
    @pytest.mark.parametrize(
        ("ids", "boxes", "scores"),
        [
            ([139, 285], BOXES, SCORES),
            (np.array([139, 285]), np.array([*BOXES, None], object)[:2], SCORES),
            ([np.int64(139), np.int64(285)], BOXES, [scores[:, None] for scores in SCORES]),
            (["139", "285"], BOXES, SCORES),
            (["000000000139", "000000000285"], BOXES, SCORES),
        ],
    )
    def test_lists_and_arrays_by_id_or_name(self, tmp_path, ids, boxes, scores):
        made = provider(save(tmp_path / "p.pkl", {"ids": ids, "boxes": boxes, "scores": scores}))
        assert [made(image).tolist() for image in (ONE, TWO)] == CONTINUOUS

    def test_the_old_name_of_ids_and_no_scores(self, tmp_path):
        made = provider(save(tmp_path / "p.pkl", {"indexes": [285, 139], "boxes": BOXES[::-1]}), max_proposals=1)
        assert made(ONE).tolist() == [[0, 0, 60, 40]], "the first"

    def test_detectron2s_boxes_are_continuous(self, tmp_path):
        content = {"ids": [139, 285], "boxes": BOXES, "objectness_logits": SCORES, "bbox_mode": 0}
        assert provider(save(tmp_path / "p.pkl", content))(TWO).tolist() == [[5, 6, 7, 8]]

    def test_an_image_may_have_no_windows(self, tmp_path):
        made = provider(save(tmp_path / "p.pkl", {"ids": [139, 285], "boxes": [BOXES[0], np.zeros((0, 4))], "scores": [SCORES[0], []]}))
        assert made(TWO).shape == (0, 4)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([1, 2], "holds a list; expected a dict with lists ids, boxes and scores"),
            ({"boxes": BOXES}, r"has boxes; expected ids \(or indexes\) and boxes"),
            ({"ids": [139], "boxes": BOXES}, "has 1 ids, 2 boxes; expected an entry of each for every image"),
            ({"ids": [139, 285], "boxes": [np.ones((1, 5))] * 2}, r"expected boxes of four numbers, \[L, 4\] for each image"),
            ({"ids": [139, 285], "boxes": BOXES, "bbox_mode": 1}, r"has bbox_mode 1; expected 0"),
            ({"ids": [139, 139], "boxes": BOXES}, "has image 139 more than once"),
            ({"ids": [139, 285], "boxes": BOXES, "scores": [SCORES[0], SCORES[0]]}, "image 285 has 1 boxes and 2 scores"),
            ({"ids": [139, 285], "boxes": BOXES, "scores": SCORES[::-1]}, "image 139 has 2 boxes and 1 scores"),
            ({"ids": [139, 285], "boxes": [np.ones((5, 8)), BOXES[1]]}, r"\[L, 4\] for each image; image 139 has the shape \[5, 8\]"),
            ({"ids": [139, 285], "boxes": [np.ones(8), BOXES[1]]}, r"image 139 has the shape \[8\]"),
            (
                {"ids": [1, 2], "boxes": BOXES},
                r"no proposals for 2 of 2 images; the first is image 139 .* the file has 1, 2, .*another set",
            ),
            ({"ids": [139, 285], "boxes": [BOXES[0] * 2, BOXES[1]]}, r"image 139 reach to x = 119, y = 79, but \S+ has 60 x 40: were they"),
            ({"ids": [139, 285], "boxes": [BOXES[0] - 9, BOXES[1]]}, "image 139 begin at -9, but"),
        ],
    )
    def test_what_does_not_fit_is_named(self, tmp_path, content, message):
        with pytest.raises(ValueError, match=rf"p\.pkl:? .*{message}"):
            provider(save(tmp_path / "p.pkl", content))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"ids": 2}, "ids is of type int; expected a list"),
            ({"ids": [139.5, 285]}, "has the id 139.5 beside 139.5; expected whole numbers or names"),
            ({"ids": [139, "285"]}, "has the id '285' beside 139; expected whole numbers or names, not both"),
            ({"ids": [[139], [285]]}, "expected boxes of four numbers"),
            ({"ids": [float("inf"), 285]}, "expected boxes of four numbers"),
            ({"ids": [10**30, 285]}, "image_id is of dtype object"),
            ({"boxes": {139: BOXES[0], 285: BOXES[1]}}, "boxes is of type dict; expected a list"),
            ({"bbox_mode": np.zeros(2)}, r"has bbox_mode \[0\. 0\.\]; expected 0"),
        ],
    )
    def test_other_types_are_named(self, tmp_path, changes, message):
        with pytest.raises(ValueError, match=rf"p\.pkl:? {message}"):
            provider(save(tmp_path / "p.pkl", {"ids": [139, 285], "boxes": BOXES} | changes))

    def test_names_are_names_and_ids_are_ids(self, tmp_path):
        """Pictures 1.jpg ... 12.jpg that were converted in the order of their names: 10.jpg has id 2."""
        names = sorted(map(str, range(1, 13)))
        images = [ImageRecord(number, Path(f"images/{name}.jpg"), 60, 40) for number, name in enumerate(names, 1)]
        boxes = [np.float32([[0, 0, int(name), int(name)]]) for name in names]  # tells its image
        for ids in (names, [int(name) for name in names]):
            path = save(tmp_path / "p.pkl", {"indexes": ids, "boxes": boxes, "bbox_mode": 0})
            with pytest.raises(ValueError, match=r"by id and by name, and gives image 2 \(10\.jpg\) different windows\. .*match_by=name"):
                provider(path, images)
            made = provider(path, images, match_by="name")
            assert [made(image)[0, 2].item() for image in images] == [int(name) for name in names]
            made = provider(path, images, match_by="id")
            assert [made(images[int(name) - 1])[0, 2].item() for name in names] == [int(name) for name in names]
        savemat(tmp_path / "p.mat", {"boxes": cells([[[1, 1, int(n), int(n)]] for n in names]), "images": cells(names).T})
        made = provider(tmp_path / "p.mat", images)
        assert [made(image)[0, 2].item() for image in images] == [int(name) for name in names]
        with pytest.raises(ValueError, match="match_by=stem: expected id or name"):
            ProposalFile("p.pkl", match_by="stem")

    def test_one_name_in_two_folders_is_two_images(self, tmp_path):
        images = [ImageRecord(number, Path(f"/data/{name}.jpg"), 60, 40) for number, name in ((1, "cam1/0001"), (2, "cam2/0001"))]
        for ids in (["cam2/0001", "cam1/0001"], ["cam2/0001.jpg", "cam1/0001.jpg"]):
            made = provider(save(tmp_path / "p.pkl", {"ids": ids, "boxes": BOXES, "bbox_mode": 0}), images)
            assert (len(made(images[0])), len(made(images[1]))) == (1, 2)
        with pytest.raises(ValueError, match=r"has one entry for /data/cam1/0001\.jpg and /data/cam2/0001\.jpg"):
            provider(save(tmp_path / "p.pkl", {"ids": ["0001"], "boxes": BOXES[:1]}), images)

    def test_a_pickle_that_wants_to_run_code_is_refused(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "trace"),)

        with pytest.raises(ValueError, match=r"p\.pkl asks for posix\.mkdir, and was not read"):
            provider(save(tmp_path / "p.pkl", {"ids": [139, Evil()], "boxes": BOXES}))
        assert not (tmp_path / "trace").exists()


def cells(entries):
    array = np.empty((1, len(entries)), object)
    array[0, :] = entries
    return array


class TestMat:
    # MATLAB's first pixel is 1, and boxes end with the last one inside: rows 3 to 40 and columns 11 to 60 are (10, 2, 60, 40)
    BOXES = (np.array([[3, 11, 40, 60], [1, 1, 40, 60]], np.uint16), np.array([[1, 1, 1, 1]], np.uint16))
    NAMES = ("000000000139", "000000000285")

    def save(self, path, **changes):
        savemat(path, {"boxes": cells(self.BOXES), "images": cells(self.NAMES).T} | changes)
        return path

    def test_rows_before_columns_from_1_with_the_last_inside(self, tmp_path):
        made = provider(self.save(tmp_path / "p.mat"), [TWO, ONE])
        assert made(ONE).tolist() == [[10, 2, 60, 40], [0, 0, 60, 40]], "in the order of the file: the best first"
        assert made(TWO).tolist() == [[0, 0, 1, 1]]

    def test_the_other_order_of_columns(self, tmp_path):
        swapped = [boxes[:, [1, 0, 3, 2]] for boxes in self.BOXES]
        path = self.save(tmp_path / "p.mat", boxes=cells(swapped))
        assert provider(path, mat_columns="xyxy")(ONE).tolist() == [[10, 2, 60, 40], [0, 0, 60, 40]]
        with pytest.raises(ValueError, match=r"reach to x = 40, y = 60, but \S+ has 60 x 40.*mat_columns"):
            provider(path)
        with pytest.raises(ValueError, match="mat_columns=xywh: expected yxyx or xyxy"):
            provider(path, mat_columns="xywh")

    def test_what_is_missing_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"p\.mat has no cell array 'images'"):
            provider(self.save(tmp_path / "p.mat", images=[]))
        with pytest.raises(ValueError, match=r"p\.mat has no cell array 'boxes'"):
            provider(self.save(tmp_path / "p.mat", boxes=self.BOXES[0]))
        with pytest.raises(ValueError, match="has 1 ids, 2 boxes"):
            provider(self.save(tmp_path / "p.mat", images=cells(self.NAMES[:1])))

    @pytest.mark.parametrize("of_image", [np.zeros((3, 5)), {"a": 1}, "text", cells(["a", "b", "c", "d"])])
    def test_boxes_of_another_shape_or_type_are_named(self, tmp_path, of_image):
        with pytest.raises(ValueError, match=r"p\.mat: expected boxes of four numbers"):
            provider(self.save(tmp_path / "p.mat", boxes=cells([self.BOXES[0], of_image])))

    def test_a_damaged_file_is_named(self, tmp_path):
        path = self.save(tmp_path / "p.mat")
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(ValueError, match=r"p\.mat is not a complete \.mat file"):
            provider(path)
