"""PASCAL VOC's XML annotations -> COCO's layout, for `data=voc`:
`python -m roi_quantization.detection.data.voc VOCdevkit/VOC2007 data/voc2007`.

VOC counts pixels from 1 and a box ends with its last pixel inside; COCO's boxes are continuous: (xmin, ymin, xmax, ymax) becomes
`[xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]`. Objects marked `difficult`, which VOC's evaluation ignores, become crowd regions
(`iscrowd` 1, and `ignore` 1 for readers that know it): detections of them count neither for nor against, and training takes nothing inside
them for background. Source: the VOC devkit's documentation, "Annotation data" and "Detection task".
"""

import argparse
import json
import math
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from roi_quantization.detection.data.images import decode
from roi_quantization.detection.errors import InputError, MissingFileError
from roi_quantization.detection.files import atomic_write

SPLITS = ("train", "val", "trainval", "test")  # of ImageSets/Main; its other lists are of single classes


def convert(root: Path | str, out: Path | str, copy: bool = False) -> dict[str, int]:
    """Writes `out/annotations/instances_<split>.json` for each split of a VOC folder, and `out/images`, a link to (or copy of) its images.

    Splits are the lists train, val, trainval and test of `root/ImageSets/Main`; where there is none, `all` of `root/Annotations`. An image
    has the same id in all of them, and categories are all names of the folder in alphabetical order, numbered from 1.

    Returns the number of images of each split. Raises `FileNotFoundError` or `ValueError` that names the file, what was expected and found.
    """
    root, out = Path(root), Path(out)
    for folder in ("Annotations", "JPEGImages"):
        if not (root / folder).is_dir():
            raise MissingFileError(f"{root / folder} is not there: expected VOC's layout, JPEGImages/ and Annotations/, in {root}")
    files = {path.stem: path.name for path in (root / "JPEGImages").iterdir()}
    xmls = sorted((root / "Annotations").glob("*.xml"))
    if not xmls:
        raise MissingFileError(f"{root / 'Annotations'} has no .xml files")
    read = {xml.stem: read_xml(xml, root / "JPEGImages", files) for xml in tqdm(xmls, desc="reading", unit="image")}

    names = sorted({annotation["name"] for _, annotations in read.values() for annotation in annotations})
    category_ids = {name: number for number, name in enumerate(names, 1)}
    image_ids = {stem: number for number, stem in enumerate(read, 1)}
    place_images(root / "JPEGImages", out / "images", copy)
    sizes = {}
    for split, stems in splits(root, list(read)).items():
        annotations = []
        for stem in stems:
            for annotation in read[stem][1]:
                kept = {key: value for key, value in annotation.items() if key != "name"}
                ids = {"id": len(annotations) + 1, "image_id": image_ids[stem], "category_id": category_ids[annotation["name"]]}
                annotations.append(ids | kept)
        instances = {
            "images": [{"id": image_ids[stem], **read[stem][0]} for stem in stems],
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for name, number in category_ids.items()],
        }
        path = out / "annotations" / f"instances_{split}.json"
        atomic_write(path, json.dumps(instances).encode())
        sizes[split] = len(stems)
    return sizes


def splits(root: Path, everything: list[str]) -> dict[str, list[str]]:
    """Split -> names of its images without extension."""
    lists = {split: root / "ImageSets" / "Main" / f"{split}.txt" for split in SPLITS}
    found = {
        split: [line.split()[0] for line in path.read_text().splitlines() if line.split()]
        for split, path in lists.items()
        if path.is_file()
    }
    for split, stems in found.items():
        missing = sorted(set(stems) - set(everything))
        if missing:
            raise InputError(f"{lists[split]} names {len(missing)} images without annotations; expected Annotations/{missing[0]}.xml")
    return found or {"all": everything}


def read_xml(path: Path, folder: Path, files: dict[str, str]) -> tuple[dict, list[dict]]:
    """`file_name`, `width` and `height` of an image, and its objects as COCO has them, with a `name` for their category."""
    try:
        tree = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise InputError(f"{path} is no whole XML file: {error}") from error
    if path.stem not in files:
        raise MissingFileError(f"{path} is of an image that is not there: expected {folder / path.stem}.jpg")
    name = files[path.stem]
    try:
        width, height = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path}: expected width and height of the image in whole pixels: {error}") from error
    if not (width > 0 and height > 0):  # some tools leave it out
        try:
            height, width = decode(folder / name).shape[1:]
        except ValueError as error:
            raise InputError(f"{folder / name} does not decode: {error}") from error
    return {"file_name": name, "width": width, "height": height}, [read_object(path, entry) for entry in tree.iter("object")]


def read_object(path: Path, entry: ElementTree.Element) -> dict:
    name = (entry.findtext("name") or "").strip()
    try:  # some boxes of VOC 2011 and later have fractions
        x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax"))
    except (TypeError, ValueError):
        raise InputError(f"{path}: an object ({name or 'unnamed'}) has no bndbox with four numbers xmin, ymin, xmax, ymax") from None
    if not name or not (-math.inf < x1 <= x2 < math.inf and -math.inf < y1 <= y2 < math.inf):
        raise InputError(
            f"{path}: an object has name {name!r} and box {x1:g}, {y1:g}, {x2:g}, {y2:g}; expected a name, xmin <= xmax and ymin <= ymax"
        )
    difficult = int((entry.findtext("difficult") or "0").strip() == "1")
    width, height = x2 - x1 + 1, y2 - y1 + 1
    return {"name": name, "bbox": [x1 - 1, y1 - 1, width, height], "area": width * height, "iscrowd": difficult, "ignore": difficult}


def place_images(source: Path, target: Path, copy: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if copy:
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif not target.exists():
        target.symlink_to(source.resolve(), target_is_directory=True)
    elif target.resolve() != source.resolve():
        raise InputError(f"{target} is there already and is not {source}: write to another folder, or remove it")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m roi_quantization.detection.data.voc", description="Converts a folder of PASCAL VOC to COCO's layout."
    )
    parser.add_argument("root", help="the folder with JPEGImages/, Annotations/ and ImageSets/, such as VOCdevkit/VOC2007")
    parser.add_argument("out", help="the folder to write: images/ and annotations/instances_<split>.json")
    parser.add_argument("--copy", action="store_true", help="copy the images instead of linking to their folder")
    given = parser.parse_args(arguments)
    try:
        sizes = convert(given.root, given.out, given.copy)
    except (OSError, ValueError) as error:
        sys.exit(f"voc: {error}")
    told = ", ".join(f"{split} ({images} images)" for split, images in sizes.items())
    print(f"{given.out}: {told}. Train on it with data=voc data.root={given.out}")


if __name__ == "__main__":
    main()
