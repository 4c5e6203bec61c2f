"""A VOC folder made by hand becomes a set in COCO's layout that the data module reads."""

import json
import shlex

import numpy as np
import pytest
from hydra.utils import instantiate
from PIL import Image

from roi_quantization.detection.data.coco import CocoDetection
from roi_quantization.detection.data.proposals.grid import Grid
from roi_quantization.detection.data.voc import convert, main
from tests.configuration import composed

OBJECT = """<object><name>{name}</name><truncated>0</truncated><difficult>{difficult}</difficult>
    <bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"""


def xml(*objects, size="<size><width>60</width><height>40</height><depth>3</depth></size>"):
    entries = [OBJECT.format(name=name, difficult=difficult, **dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)))
               for name, difficult, box in objects]  # fmt: skip
    return f"<annotation><filename>wrong.jpg</filename>{size}{''.join(entries)}</annotation>"


@pytest.fixture
def root(tmp_path):
    """Three images: two objects, of which one is difficult; none; and one with fractions whose size is not told."""
    root = tmp_path / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for stem in ("000005", "000007", "2008_000001"):
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(root / f"JPEGImages/{stem}.jpg")
    (root / "Annotations/000005.xml").write_text(xml(("dog", 0, (1, 1, 60, 40)), ("cat", 1, (11, 3, 20, 40))))
    (root / "Annotations/000007.xml").write_text(xml())
    (root / "Annotations/2008_000001.xml").write_text(xml(("dog", 0, (45.7, 1, 50.7, 10)), size=""))
    (root / "ImageSets/Main/train.txt").write_text("000005\n000007\n")
    (root / "ImageSets/Main/val.txt").write_text("2008_000001\n\n")
    (root / "ImageSets/Main/dog_train.txt").write_text("000005  1\n000007 -1\n")
    return root


ALL = ["000005", "000007", "2008_000001"]


def instances(out, split):
    return json.loads((out / f"annotations/instances_{split}.json").read_text())


def test_boxes_become_continuous_and_difficult_ones_crowd(root, tmp_path):
    out = tmp_path / "out"
    assert convert(root, out) == {"train": 2, "val": 1}
    train = instances(out, "train")
    assert train["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}] == instances(out, "val")["categories"]
    dog, cat = train["annotations"]
    assert (dog["bbox"], dog["area"], dog["iscrowd"], dog["category_id"]) == ([0, 0, 60, 40], 2400, 0, 2), "the whole image"
    assert (cat["bbox"], cat["iscrowd"], cat["ignore"]) == ([10, 2, 10, 38], 1, 1)
    (val,) = instances(out, "val")["annotations"]
    assert val["bbox"] == pytest.approx([44.7, 0, 6, 10])
    assert instances(out, "val")["images"] == [{"id": 3, "file_name": "2008_000001.jpg", "width": 60, "height": 40}]


@pytest.mark.parametrize("options", [[], ["--copy"]])
def test_the_command_writes_a_set_that_is_read(root, tmp_path, capsys, options):
    out = tmp_path / "out"
    for _ in range(2):  # again does no harm
        main([str(root), str(out), *options])
    text = capsys.readouterr().out
    assert f"train (2 images), val (1 images). Train on it with\n  python train.py data=voc data.root={out}\n" in text
    assert "The boxes were read as VOC's: pixels count from 1" in text
    assert (out / "images").is_symlink() == (not options)
    main([str(root), str(out), *options, "--convention=voc"])
    assert "read as VOC's" not in capsys.readouterr().out
    dataset = CocoDetection(out / "images", out / "annotations/instances_train.json", Grid([0.5]))
    _, target = dataset[0]
    assert target["boxes"].tolist() == [[0, 0, 60, 40]] and target["labels"].tolist() == [2]
    assert target["crowd"].tolist() == [[10, 2, 20, 40]]
    assert len(dataset[1][1]["boxes"]) == 0


def test_a_folder_without_lists_is_one_split(root, tmp_path):
    for path in (root / "ImageSets/Main").iterdir():
        path.unlink()
    assert convert(root, tmp_path / "out") == {"all": 3}


@pytest.mark.parametrize("lists", [{}, {"default": ALL}, {"train": ALL[:2], "val": ALL[2:]}, {"train": ALL[:2], "test": ALL[2:]}])
def test_the_printed_overrides_train_on_the_set(root, tmp_path, capsys, lists):
    for path in (root / "ImageSets/Main").iterdir():
        path.unlink()
    for split, stems in lists.items():
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(stems))
    main([str(root), str(tmp_path / "out")])
    overrides = capsys.readouterr().out.partition("python train.py ")[2]
    data = instantiate(composed("train", *shlex.split(overrides)).data)
    data.setup()
    assert len(data.train) == 2 and len(data.val) == len(data.test) == 1
    assert not set(data.train.image_ids) & set(data.val.image_ids)


def test_lists_may_have_a_bom_names_with_spaces_labels_and_a_name_twice(root, tmp_path, caplog):
    for folder, ending in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        for old, new in (("000005", "ali"), ("000007", "ali (1)"), ("2008_000001", "ali 1")):
            (root / folder / f"{old}.{ending}").rename(root / folder / f"{new}.{ending}")
    (root / "ImageSets/Main/train.txt").write_bytes(b"\xef\xbb\xbfali  1\r\nali (1)\r\nali (1)\r\n")
    (root / "ImageSets/Main/val.txt").write_text("ali 1\n")
    assert convert(root, tmp_path / "out") == {"train": 2, "val": 1}
    assert [image["file_name"] for image in instances(tmp_path / "out", "train")["images"]] == ["ali.jpg", "ali (1).jpg"]
    assert [image["file_name"] for image in instances(tmp_path / "out", "val")["images"]] == ["ali 1.jpg"]
    assert "train.txt names 1 images more than once; the first is ali (1)" in caplog.text


def test_only_pictures_are_taken_for_pictures(root, tmp_path):
    for name in ("000005.txt", "000005.xml", "000007.json", "2008_000001.eps"):
        (root / "JPEGImages" / name).touch()
    convert(root, tmp_path / "out")
    assert [image["file_name"] for image in instances(tmp_path / "out", "train")["images"]] == ["000005.jpg", "000007.jpg"]


def test_two_pictures_of_one_name_are_told_apart_by_the_filename(root, tmp_path):
    Image.new("L", (60, 40)).save(root / "JPEGImages/000005.png")
    path = root / "Annotations/000005.xml"
    with pytest.raises(ValueError, match=r"000005\.xml may be of 000005\.jpg or 000005\.png, and its <filename> 'wrong\.jpg' is none"):
        convert(root, tmp_path / "out")
    path.write_text(path.read_text().replace("wrong.jpg", "000005.jpg"))
    convert(root, tmp_path / "out")
    assert instances(tmp_path / "out", "train")["images"][0]["file_name"] == "000005.jpg"


@pytest.mark.parametrize(
    ("declaration", "encoding", "name"),
    [
        ("<?xml version='1.0' encoding='GB2312'?>", "gb2312", "狗"),
        ("<?xml version='1.0' encoding='Shift_JIS'?>\n", "shift_jis", "犬"),
        ("<?xml version='1.0' encoding='ISO-8859-1'?>", "latin-1", "chié"),
        ("<?xml version='1.0' encoding='UTF-16'?>", "utf-16", "狗"),
        ("", "utf-8-sig", "狗"),
    ],
)
def test_xml_of_other_encodings_is_read(root, tmp_path, declaration, encoding, name):
    (root / "Annotations/000005.xml").write_bytes((declaration + xml((name, 0, (1, 1, 60, 40)))).encode(encoding))
    convert(root, tmp_path / "out")
    assert [category["name"] for category in instances(tmp_path / "out", "train")["categories"]] == sorted(["dog", name])


def test_a_namespace_is_passed_over(root, tmp_path):
    path = root / "Annotations/000005.xml"
    path.write_text(path.read_text().replace("<annotation>", "<annotation xmlns='http://example.org/voc'>"))
    convert(root, tmp_path / "out")
    assert len(instances(tmp_path / "out", "train")["annotations"]) == 2


def test_a_set_without_any_object_is_refused(root, tmp_path):
    for path in (root / "Annotations").iterdir():
        path.write_text(xml())
    with pytest.raises(ValueError, match="Annotations: none of 3 files has an <object>"):
        convert(root, tmp_path / "out")


@pytest.mark.parametrize(("convention", "box"), [("edges", [0, 5, 59, 30]), ("zero-based", [0, 5, 60, 31]), ("voc", [0, 4, 59, 31])])
def test_a_set_that_counts_from_0_needs_its_convention(root, tmp_path, convention, box):
    (root / "Annotations/000005.xml").write_text(xml(("dog", 0, (0, 5, 59, 35))))
    with pytest.raises(ValueError, match=r"000005\.xml: an object \(dog\) has box 0, 5, 59, 35, and VOC counts .*--convention"):
        convert(root, tmp_path / "out")
    main([str(root), str(tmp_path / "out"), f"--convention={convention}"])
    (annotation,) = instances(tmp_path / "out", "train")["annotations"]
    assert annotation["bbox"] == box and annotation["area"] == box[2] * box[3]


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("Annotations/000005.xml", "<annotation>", r"000005\.xml is no complete XML file"),
        (
            "Annotations/000005.xml",
            "<?xml version='1.0' encoding='klingon'?><annotation/>",
            r"is no complete XML file: .*klingon",
        ),
        ("Annotations/000005.xml", "<annotations><image/></annotations>", r"000005\.xml has the root <annotations>; expected VOC's"),
        ("Annotations/000005.xml", xml(("dog", "maybe", (1, 1, 4, 9))), r"an object \(dog\) has difficult 'maybe'; expected 0 or 1"),
        ("Annotations/000005.xml", xml(("dog", 0, (5, 1, 4, 9))), r"000005\.xml: an object has name 'dog' and box 5, 1, 4, 9; expected"),
        ("Annotations/000005.xml", xml(("", 0, (1, 1, 4, 9))), r"000005\.xml: an object has name ''"),
        ("Annotations/000005.xml", xml(("dog", 0, (1, 1, 4, "x"))), r"an object \(dog\) has no bndbox with four numbers"),
        ("Annotations/000099.xml", xml(), r"000099\.xml is of an image that is not there: expected \S+JPEGImages/000099\.jpg"),
        ("ImageSets/Main/val.txt", "000099\n", r"val\.txt names 1 images without annotations; expected Annotations/000099\.xml"),
    ],
)
def test_what_is_wrong_is_named(root, tmp_path, path, text, message):
    (root / path).write_text(text)
    with pytest.raises(SystemExit, match=f"^voc: .*{message}"):
        main([str(root), str(tmp_path / "out")])


def test_another_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Annotations is not there: expected VOC's layout, JPEGImages/ and Annotations/"):
        convert(tmp_path, tmp_path / "out")


def test_other_images_are_not_overwritten(root, tmp_path):
    (tmp_path / "out/images").mkdir(parents=True)
    with pytest.raises(ValueError, match="images exists and is not"):
        convert(root, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (xml(("dog", 0, ("1", 1, "1e999", 5))), r"an object has name 'dog' and box 1, 1, inf, 5"),
        (xml(("dog", 0, ("nan", 1, 5, 5))), r"an object has name 'dog' and box nan"),
        (xml(size="<size><width>1e999</width><height>40</height></size>"), "expected width and height of the image in whole pixels"),
        (
            "<!DOCTYPE a [<!ENTITY e0 'ha'>"
            + "".join(f"<!ENTITY e{n} '{f'&e{n - 1};' * 10}'>" for n in range(1, 12))
            + "]><annotation>&e11;</annotation>",
            "is no complete XML file: .*amplification",
        ),
    ],
)
def test_hostile_xml_is_named(root, tmp_path, text, message):
    (root / "Annotations/000007.xml").write_text(text)
    with pytest.raises(ValueError, match=rf"000007\.xml:? {message}"):
        convert(root, tmp_path / "out")
