"""Pictures of a folder: what is read, and the reason for what is not."""

import logging

import pytest
from PIL import Image

from roi_quantization.detection.data.image_folder import UNREADABLE, find_images, read_images


@pytest.fixture
def folder(tmp_path):
    """Two pictures, a linked one, and six that cannot be read, beside other files."""
    folder = tmp_path / "photos"
    (folder / "deep.jpg").mkdir(parents=True)
    for path in (folder / "b.PNG", folder / "deep.jpg/a.jpg", tmp_path / "elsewhere/c.jpg"):
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (6, 4)).save(path)
    (folder / "linked.jpg").symlink_to(tmp_path / "elsewhere/c.jpg")
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    for name in ("phone.HEIC", "drawing.svg", "empty.jpg", "notes.txt", "b.xml", "README"):
        (folder / name).touch()
    return folder


def test_what_cannot_be_read_has_a_reason(folder, caplog):
    with caplog.at_level(logging.INFO):
        records, unreadable = read_images(find_images(folder))
    assert [record.path.relative_to(folder).as_posix() for record in records] == ["b.PNG", "deep.jpg/a.jpg", "linked.jpg"]
    reasons = {path.name: reason for path, reason in unreadable.items()}
    assert reasons.pop("empty.jpg").startswith("cannot identify image file")
    assert reasons == {
        "phone.HEIC": "Pillow does not read .HEIC; convert it to .jpg or .png",
        "drawing.svg": "Pillow does not read .svg; convert it to .jpg or .png",
        "gone.jpg": "it is a link to a file that does not exist",
        "gone": "it is a link to a file that does not exist",
        "more": "it is a link to a folder, which is not followed; give that folder with image=",
    }
    assert "3 files are no pictures and are passed over (1 README, 1 .xml, 1 .txt)" in caplog.text
    assert ".heic" in UNREADABLE and ".png" not in UNREADABLE


def test_a_folder_without_pictures_is_named(folder):
    for path in folder.iterdir():
        if path.suffix not in (".txt", ".xml"):
            path.unlink() if not path.is_dir() or path.is_symlink() else (path / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="there are no pictures in this folder"):
        find_images(folder)
