"""Convert PASCAL VOC's XML annotations to COCO's layout, for `data=voc`.

python -m roi_quantization.detection.data.voc VOCdevkit/VOC2007 data/voc2007

VOC counts pixels from 1, and xmax and ymax are the last pixel inside a box. COCO's boxes are continuous: (xmin, ymin, xmax, ymax) becomes
`[xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]`. Other tools write the same XML with other conventions, see `CONVENTIONS`.
Objects marked `difficult`, which VOC's evaluation ignores, become crowd regions (`iscrowd` 1, and `ignore` 1): detections of them count
neither as correct nor as wrong, and training does not use them as background. Source: the VOC devkit's documentation, "Annotation data"
and "Detection task".
"""

import argparse
import codecs
import json
import logging
import math
import re
import shlex
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from roi_quantization.detection.common.errors import InputError, MissingFileError
from roi_quantization.detection.common.files import atomic_write
from roi_quantization.detection.data.images import FORMATS, decode

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "trainval", "test", "default")  # lists in ImageSets/Main that are splits; CVAT writes the last

# convention -> what is subtracted from xmin and ymin, and added to xmax and ymax afterwards, to get continuous coordinates
CONVENTIONS = {"voc": (1, 0), "zero-based": (0, 1), "edges": (0, 0)}


def convert(root: Path | str, out: Path | str, copy: bool = False, convention: str | None = None) -> dict[str, int]:
    """Write `out/annotations/instances_<split>.json` for each split of a VOC folder, and `out/images`, a link to its images.

    Splits are the lists train, val, trainval, test and default of `root/ImageSets/Main`; without lists, `all` of `root/Annotations`. An
    image has the same id in all of them. Categories are all names of the folder in alphabetical order, numbered from 1.

    Args:
        root: folder with JPEGImages/, Annotations/ and ImageSets/.
        out: folder to write.
        copy: copy the images instead of linking to their folder.
        convention: "voc" (from 1, last pixel inside), "zero-based" (from 0, last pixel inside) or "edges" (continuous). None means "voc",
            and refuses coordinates below 1, which VOC does not have.

    Returns:
        The number of images of each split.

    Raises:
        MissingFileError: a folder or an image is missing.
        InputError: an annotation or a list is wrong; the message names the file.
    """
    root, out = Path(root), Path(out)
    for folder in ("Annotations", "JPEGImages"):
        if not (root / folder).is_dir():
            raise MissingFileError(f"{root / folder} is not there: expected VOC's layout, JPEGImages/ and Annotations/, in {root}")
    pictures = find_pictures(root / "JPEGImages")
    xmls = sorted((root / "Annotations").glob("*.xml"))
    if not xmls:
        raise MissingFileError(f"{root / 'Annotations'} has no .xml files")
    read = {xml.stem: read_xml(xml, root / "JPEGImages", pictures) for xml in tqdm(xmls, desc="reading", unit="image")}
    if not any(objects for _, objects in read.values()):
        raise InputError(f"{root / 'Annotations'}: none of {len(xmls)} files has an <object>; the first is {xmls[0].name}")
    instances = {xml.stem: to_coco(xml, *read[xml.stem], convention) for xml in xmls}

    names = sorted({annotation["name"] for annotations in instances.values() for annotation in annotations})
    category_ids = {name: number for number, name in enumerate(names, 1)}
    image_ids = {stem: number for number, stem in enumerate(read, 1)}
    place_images(root / "JPEGImages", out / "images", copy)
    sizes = {}
    for split, stems in read_splits(root, list(read)).items():
        annotations = []
        for stem in stems:
            for annotation in instances[stem]:
                kept = {key: value for key, value in annotation.items() if key != "name"}
                ids = {"id": len(annotations) + 1, "image_id": image_ids[stem], "category_id": category_ids[annotation["name"]]}
                annotations.append(ids | kept)
        content = {
            "images": [{"id": image_ids[stem], **read[stem][0]} for stem in stems],
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for name, number in category_ids.items()],
        }
        atomic_write(out / "annotations" / f"instances_{split}.json", json.dumps(content).encode())
        sizes[split] = len(stems)
    return sizes


def find_pictures(folder: Path) -> dict[str, list[str]]:
    """Return the files of a folder that are pictures by their ending: name without extension -> names."""
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
    pictures: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in endings:
            pictures.setdefault(path.stem, []).append(path.name)
    return pictures


def read_splits(root: Path, stems: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of the images of each split, without extension.

    A line is a name, which may have spaces, or a name and VOC's 1, 0 or -1. A name that comes twice is taken once, which is logged.
    """
    known, splits = set(stems), {}
    for split in SPLITS:
        path = root / "ImageSets" / "Main" / f"{split}.txt"
        if not path.is_file():
            continue
        try:
            lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from error
        names = [line if line in known else re.sub(r"\s+(-1|0|1)$", "", line) for line in lines]
        missing = sorted(set(names) - known)
        if missing:
            raise InputError(f"{path} names {len(missing)} images without annotations; expected Annotations/{missing[0]}.xml")
        splits[split] = list(dict.fromkeys(names))
        if len(splits[split]) < len(names):
            twice = next(name for number, name in enumerate(names) if name in names[:number])
            log.warning("%s names %d images more than once; the first is %s.", path, len(names) - len(splits[split]), twice)
    return splits or {"all": list(stems)}


def read_xml(path: Path, folder: Path, pictures: Mapping[str, Sequence[str]]) -> tuple[dict, list[ElementTree.Element]]:
    """Return `file_name`, `width` and `height` of an image, and the elements of its objects."""
    tree = _parse(path)
    if tree.tag != "annotation":
        raise InputError(f"{path} has the root <{tree.tag}>; expected VOC's <annotation>")
    name = _picture_of(path, tree, folder, pictures)
    try:
        width, height = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path}: expected width and height of the image in whole pixels: {error}") from error
    if not (width > 0 and height > 0):  # some tools leave it out
        try:
            height, width = decode(folder / name).shape[1:]
        except ValueError as error:
            raise InputError(f"{folder / name} does not decode: {error}") from error
    return {"file_name": name, "width": width, "height": height}, list(tree.iter("object"))


def _parse(path: Path) -> ElementTree.Element:
    """Parse an XML file of any encoding that Python knows, and remove its namespaces."""
    content = path.read_bytes()
    try:
        try:
            tree = ElementTree.fromstring(content)
        except (ValueError, LookupError):  # the parser knows UTF-8, UTF-16 and encodings of one byte
            declared = re.match(rb"""\s*<\?xml[^>]*encoding=["']([\w.-]+)["'][^>]*\?>""", content)
            if declared is None:
                raise
            codecs.lookup(encoding := declared[1].decode())
            tree = ElementTree.fromstring(content[declared.end() :].decode(encoding))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"{path} is no complete XML file: {error}") from error
    for element in tree.iter():
        element.tag = element.tag.rpartition("}")[2]
    return tree


def _picture_of(path: Path, tree: ElementTree.Element, folder: Path, pictures: Mapping[str, Sequence[str]]) -> str:
    """Return the picture with the name of the XML file; of several the one that <filename> names."""
    found = pictures.get(path.stem, ())
    if len(found) == 1:
        return found[0]
    named = (tree.findtext("filename") or "").strip()
    if not found:
        raise MissingFileError(f"{path} is of an image that is not there: expected {folder / path.stem}.jpg")
    if named not in found:
        raise InputError(f"{path} may be of {' or '.join(found)}, and its <filename> {named!r} is none of them: remove one from {folder}")
    return named


def to_coco(path: Path, image: Mapping, objects: Sequence[ElementTree.Element], convention: str | None) -> list[dict]:
    """Return the objects of an image as COCO has them, with a `name` for their category."""
    low, high = CONVENTIONS[convention or "voc"]
    annotations = []
    for entry in objects:
        name, (x1, y1, x2, y2), is_difficult = _read_object(path, entry)
        if convention is None and min(x1, y1) < 1:
            raise InputError(
                f"{path}: an object ({name}) has box {x1:g}, {y1:g}, {x2:g}, {y2:g}, and VOC counts pixels from 1. Give the convention of "
                "the set: --convention=edges (xmax is the right edge), --convention=zero-based (xmax is the last pixel inside), or "
                "--convention=voc to cut such boxes to the image"
            )
        x1, y1, x2, y2 = max(x1 - low, 0), max(y1 - low, 0), x2 + high, y2 + high
        annotations.append(
            {"name": name, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            | {"iscrowd": int(is_difficult), "ignore": int(is_difficult)}
        )
    return annotations


def _read_object(path: Path, entry: ElementTree.Element) -> tuple[str, tuple[float, ...], bool]:
    """Return the name of an object, xmin, ymin, xmax and ymax, and whether it is difficult."""
    name = (entry.findtext("name") or "").strip()
    try:  # some boxes of VOC 2011 and later have fractions
        x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax"))
    except (TypeError, ValueError):
        raise InputError(f"{path}: an object ({name or 'unnamed'}) has no bndbox with four numbers xmin, ymin, xmax, ymax") from None
    if not name or not (-math.inf < x1 <= x2 < math.inf and -math.inf < y1 <= y2 < math.inf):
        raise InputError(
            f"{path}: an object has name {name!r} and box {x1:g}, {y1:g}, {x2:g}, {y2:g}; expected a name, xmin <= xmax and ymin <= ymax"
        )
    difficult = (entry.findtext("difficult") or "0").strip().lower()
    if difficult not in ("0", "1", "false", "true"):
        raise InputError(f"{path}: an object ({name}) has difficult {difficult!r}; expected 0 or 1")
    return name, (x1, y1, x2, y2), difficult in ("1", "true")


def place_images(source: Path, target: Path, copy: bool) -> None:
    """Link or copy the folder of images."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if copy:
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif not target.exists():
        target.symlink_to(source.resolve(), target_is_directory=True)
    elif target.resolve() != source.resolve():
        raise InputError(f"{target} exists and is not {source}: write to another folder, or remove it")


def training_overrides(root: Path | str, splits: Sequence[str]) -> list[str]:
    """Return the command-line overrides that train on a converted set: its own splits, else parts of the images that it trains on."""
    overrides = ["data=voc", f"data.root={root}"]
    train = next(split for split in ("train", "trainval", "default", "all", *splits) if split in splits)
    val = next((split for split in ("val", "test") if split in splits and split != train), None)
    test = "test" if "test" in splits and train != "test" else val
    chosen = {"train": train, "val": val or train, "test": test or train}
    defaults = {"train": "train", "val": "val", "test": "val"}
    for split, name in chosen.items():
        if name != defaults[split]:
            overrides.append(f"data.{split}.annotations=annotations/instances_{name}.json")
    if val is None:
        overrides += ["data.train.part=[0,0.8]", "data.val.part=[0.8,1]", "data.test.part=[0.8,1]"]
    return overrides


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(format="voc: %(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m roi_quantization.detection.data.voc", description="Converts a folder of PASCAL VOC to COCO's layout."
    )
    parser.add_argument("root", help="the folder with JPEGImages/, Annotations/ and ImageSets/, such as VOCdevkit/VOC2007")
    parser.add_argument("out", help="the folder to write: images/ and annotations/instances_<split>.json")
    parser.add_argument("--copy", action="store_true", help="copy the images instead of linking to their folder")
    parser.add_argument(
        "--convention",
        choices=CONVENTIONS,
        help="coordinates of the boxes: voc (from 1, last pixel inside; the default), zero-based (from 0, last pixel inside) or edges "
        "(continuous)",
    )
    given = parser.parse_args(arguments)
    try:
        sizes = convert(given.root, given.out, given.copy, given.convention)
    except (OSError, ValueError) as error:
        sys.exit(f"voc: {error}")
    written = ", ".join(f"{split} ({images} images)" for split, images in sizes.items())
    if given.convention is None:
        print("The boxes were read as VOC's: pixels count from 1, and xmax and ymax are inside. Tools that do not do so need --convention.")
    print(f"{given.out}: {written}. Train on it with\n  python train.py {shlex.join(training_overrides(given.out, list(sizes)))}")


if __name__ == "__main__":
    main()
