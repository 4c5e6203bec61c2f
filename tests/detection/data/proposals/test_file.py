"""The file format of docs/proposals.md: what is read, what is refused."""

import io
import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.files import NotWrittenError
from roi_quantization.detection.data.images import ImageRecord
from roi_quantization.detection.data.proposals.file import ProposalFile, read_proposals, write_proposals
from tests.faults import full_disk

ONE, TWO, NONE = (ImageRecord(i, Path(f"{name}.png"), 60, 40) for i, name in ((1, "one"), (2, "two"), (9, "none")))
BOXES = {1: [[0, 0, 60, 40], [1.5, 2.5, 3.5, 4.5]], 2: [[5, 5, 10, 10]]}


def arrays(**changes):
    good = {
        "image_id": np.array([2, 9, 1]),
        "size": np.array([[60, 40]] * 3),
        "count": np.array([1, 0, 2]),
        "boxes": np.array(BOXES[2] + BOXES[1], np.float32),
    }
    return good | {name: np.asarray(value) for name, value in changes.items()}


def save(path, **changes):
    np.savez(path, **arrays(**changes))
    return path


def test_each_image_gets_its_own_windows(tmp_path):
    proposals = ProposalFile(save(tmp_path / "p.npz"))
    proposals.prepare([ONE, TWO, NONE])
    assert proposals(ONE).tolist() == BOXES[1]
    assert proposals(TWO).tolist() == BOXES[2]
    assert proposals(NONE).shape == (0, 4)


def test_max_proposals_keeps_the_first_or_the_best(tmp_path):
    for scores, expected in (({}, BOXES[1][0]), ({"scores": [0.1, 0.2, 0.9]}, BOXES[1][1])):
        proposals = ProposalFile(save(tmp_path / "p.npz", **scores), max_proposals=1)
        proposals.prepare([ONE])
        assert proposals(ONE).tolist() == [expected]


def test_windows_are_cut_to_the_image_and_empty_ones_dropped_and_told(tmp_path, caplog):
    path = save(tmp_path / "p.npz", boxes=[[-5, -5, 70, 50], [3, 3, 3, 9], [61, 0, 70, 9]], scores=[1.0, 1, 1])
    proposals = ProposalFile(path)
    with caplog.at_level(logging.WARNING):
        proposals.prepare([ONE, TWO])
    assert proposals(TWO).tolist() == [[0, 0, 60, 40]] and len(proposals(ONE)) == 0
    assert "dropped 2 of 3 windows" in caplog.text


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "folder" / "p.npz"
    write_proposals(path, [ONE, NONE, TWO], [np.array(BOXES[1]), np.zeros((0, 4)), np.array(BOXES[2])], [[1, 2], [], [3]])
    proposals = ProposalFile(path)
    proposals.prepare([ONE, TWO, NONE])
    assert proposals(ONE).tolist() == BOXES[1][::-1]  # best first
    assert [entry.name for entry in path.parent.iterdir()] == ["p.npz"]


def test_a_file_without_any_window(tmp_path):
    write_proposals(tmp_path / "p.npz", [ONE, TWO], [np.zeros((0, 4)), np.zeros((0, 4))], [[], []])
    proposals = ProposalFile(tmp_path / "p.npz")
    proposals.prepare([ONE, TWO])
    assert len(proposals(ONE)) == 0


def test_windows_of_another_shape_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"p\.npz: the windows of image 2 have the shape \[1000, 5\]; expected \[L, 4\]"):
        write_proposals(tmp_path / "p.npz", [TWO], [np.ones((1000, 5))])
    with pytest.raises(ValueError, match=r"p\.npz: image 1 has 2 windows and 1 scores"):
        write_proposals(tmp_path / "p.npz", [ONE, TWO], [np.array(BOXES[1]), np.array(BOXES[2])], [[1], [1, 2]])


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (
            np.array([[x, y, 20, 15] for x in range(0, 40, 5) for y in range(0, 25, 5)]),
            r"p\.npz: 28 of 40 .* as \[x, y, width, height\]",
        ),
        (np.array([[0.1, 0.2, 0.5, 0.5]] * 20), r"p\.npz: all 20 windows are below .* \(two\.png, 60 x 40\)\. They are normalised"),
    ],
)
def test_implausible_windows_are_refused(tmp_path, windows, message):
    write_proposals(tmp_path / "p.npz", [ONE, TWO], [np.zeros((0, 4)), windows])
    with pytest.raises(ValueError, match=message):
        ProposalFile(tmp_path / "p.npz").prepare([ONE, TWO])


def test_int16_stays_small(tmp_path):
    write_proposals(tmp_path / "p.npz", [TWO], [np.array(BOXES[2], np.int16)])
    assert read_proposals(tmp_path / "p.npz")["boxes"].dtype == np.int16


def test_nothing_is_left_of_a_write_that_fails(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        write_proposals(tmp_path / "p.npz", [TWO], [np.array([[0, 0, np.inf, 1]])])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path):
    path = save(tmp_path / "p.npz")
    before = path.read_bytes()
    with full_disk(2000), pytest.raises(NotWrittenError, match=r"p\.npz could not be written"):
        write_proposals(path, [TWO], [np.random.default_rng(0).random((1000, 4))])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": [1, 0, 3]}, "counts sum up to 4, but there are 3 boxes"),
        ({"count": [4, -3, 2]}, "counts sum up to 3"),
        ({"boxes": [[0, 0, 1, 1], [0, 0, np.nan, 1], [0, 0, 1, 1]]}, "1 boxes are not finite; the first is of image 1"),
        ({"scores": [np.nan, 0, 0]}, "1 scores are not finite; the first is of image 2"),
        ({"scores": [1, 2]}, r"scores has shape \(2,\), expected \(3,\)"),
        ({"boxes": np.zeros((3, 5))}, r"boxes has shape \(3, 5\), expected \(3, 4\)"),
        ({"image_id": [2, 2, 1]}, "has image 2 more than once"),
        ({"boxes": np.array([{}], object)}, "is not a proposal file"),  # a pickle, which may run code
        ({"count": [2**62, 2**62, 2**62 + 3]}, "the counts sum up to"),  # around the end of int64, to 3
        ({"count": ["1", "0", "2"]}, "count is of dtype <U1, expected whole numbers"),
        ({"count": 3}, r"count has shape \(\), expected \(3,\)"),
        ({"boxes": np.zeros((3, 4), complex)}, "boxes is of dtype complex128, expected numbers"),
        ({"boxes": 0.0}, r"boxes has shape \(\)"),
        ({"image_id": [2.0, 9.0, 1.0]}, "image_id is of dtype float64, expected whole numbers or names"),
        ({"image_id": [b"2", b"9", b"1"]}, r"image_id is of dtype \|S1, expected whole numbers or names"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"p.npz.*{message}"):
        read_proposals(save(tmp_path / "p.npz", **changes))


def test_a_missing_array_is_named(tmp_path):
    np.savez(tmp_path / "p.npz", **{name: array for name, array in arrays().items() if name != "size"})
    with pytest.raises(ValueError, match=r"p\.npz has no array 'size'"):
        read_proposals(tmp_path / "p.npz")


@pytest.mark.parametrize("kept", [0, 10, 300, -30])
def test_a_file_that_was_cut_short_is_refused(tmp_path, kept):
    path = save(tmp_path / "p.npz")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"p\.npz is not a proposal file"):
        read_proposals(path)


def test_an_array_that_claims_to_be_larger_than_memory_is_refused(tmp_path):
    """The header of 100 bytes says 2^50 windows."""
    save(tmp_path / "good.npz")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**50, 4)})
    with zipfile.ZipFile(tmp_path / "good.npz") as good, zipfile.ZipFile(tmp_path / "p.npz", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, header.getvalue() if name == "boxes.npy" else good.read(name))
    with pytest.raises(ValueError, match=r"p\.npz is not a proposal file"):
        read_proposals(tmp_path / "p.npz")


def test_a_bare_array_is_refused(tmp_path):
    np.save(tmp_path / "p.npy", np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"p\.npy is not a proposal file"):
        read_proposals(tmp_path / "p.npy")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (ImageRecord(5, Path("five.png"), 60, 40), r"no proposals for 1 of 2 images; the first is image 5 \(five\.png\)"),
        (ImageRecord(2, Path("two.png"), 40, 60), r"of image 2 are for 60 x 40 pixels, but two\.png has 40 x 60"),
    ],
)
def test_a_file_for_other_images_is_refused(tmp_path, image, message):
    with pytest.raises(ValueError, match=f"p.npz.*{message}"):
        ProposalFile(save(tmp_path / "p.npz")).prepare([ONE, image])


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no proposal file at .*p\.npz"):
        ProposalFile(tmp_path / "p.npz").prepare([ONE])
    with pytest.raises(ValueError, match=r"This split has no proposal file: set proposals\.<split>\.path"):
        ProposalFile(None).prepare([ONE])


def test_a_size_as_stored_is_refused_where_exif_turns_the_image(tmp_path):
    """Image 2 is stored as 60 x 40 and read upright, 40 x 60, which is the size of its annotations."""
    turned = ImageRecord(2, Path("two.png"), 40, 60)
    with pytest.raises(InputError, match=r"in pixels of the upright image \(after its EXIF orientation\)"):
        ProposalFile(save(tmp_path / "p.npz")).prepare([turned])


@pytest.mark.parametrize("dtype", ["u1", "u2", "u8", "i1", "i8", ">i2", "f2", "f8", "<i2"])
def test_numbers_of_every_type_are_the_same_windows(tmp_path, dtype):
    """Unsigned scores have no negative, and a wide image's size is no number of 8 or 16 bits."""
    wide = ImageRecord(2, Path("wide.png"), 40_000, 40)
    boxes, scores = np.array([[0, 0, 50, 40], [1, 1, 100, 30], [2, 2, 90, 20]]).astype(dtype), np.array([0, 120, 100]).astype(dtype)
    proposals = ProposalFile(
        save(tmp_path / "p.npz", image_id=[2], size=[[40_000, 40]], count=np.array([3], "u1"), boxes=boxes, scores=scores)
    )
    proposals.prepare([wide])
    found = proposals(wide)
    assert found.dtype == torch.float32
    assert found.tolist() == [[1, 1, 100, 30], [2, 2, 90, 20], [0, 0, 50, 40]]


def test_the_lowest_integer_score_comes_last(tmp_path):
    path = save(tmp_path / "p.npz", image_id=[1], size=[[60, 40]], count=[3], scores=np.array([-128, 5, 7], np.int8))
    proposals = ProposalFile(path, max_proposals=2)
    proposals.prepare([ONE])
    assert proposals(ONE).tolist() == BOXES[1][::-1]


def test_a_window_without_area_in_float32_is_dropped(tmp_path):
    boxes = np.array([[10, 10, 10 + 1e-9, 20], [0, 0, 5, 5], [0, 0, 6, 6]])
    proposals = ProposalFile(save(tmp_path / "p.npz", boxes=boxes))
    proposals.prepare([ONE, TWO])
    assert len(proposals(TWO)) == 0 and len(proposals(ONE)) == 2
