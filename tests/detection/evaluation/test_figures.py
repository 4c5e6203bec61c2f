"""Pictures are tested by what can be seen on them: which colours are there."""

import json

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import Image
from pytorch_lightning.loggers import CSVLogger

from roi_quantization.detection.data.coco import CocoDetection
from roi_quantization.detection.data.masks import encode
from roi_quantization.detection.data.proposals.grid import Grid
from roi_quantization.detection.evaluation.figures import COLOURS, plot_curves, plot_detection_sheet, plot_detections
from roi_quantization.detection.evaluation.fonts import plain_text

PAPER = [(200, 30, 30), (30, 130, 60), (40, 40, 190), (90, 90, 90), (150, 60, 170)]  # five images of one colour each; none is in COLOURS


def share(picture, colour):
    """How much of a PNG file has exactly this colour, 0 to 1."""
    if isinstance(colour, str):
        colour = tuple(bytes.fromhex(colour[1:]))
    return (np.asarray(Image.open(picture).convert("RGB")) == colour).all(axis=2).mean()


@pytest.fixture
def dataset(tmp_path):
    for i, colour in enumerate(PAPER, 1):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{i}.png")
    instances = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(1, 6)],
        "categories": [{"id": 5, "name": "disc"}, {"id": 9, "name": "star"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 9, "bbox": [8, 8, 40, 40], "area": 1600, "iscrowd": 0},
            {"id": 2, "image_id": 3, "category_id": 5, "bbox": [20, 8, 40, 40], "area": 1600, "iscrowd": 1},
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    return CocoDetection(tmp_path, tmp_path / "instances.json", Grid([0.5]))


def found(score, label=1, box=(10.0, 10.0, 50.0, 50.0)):
    return {"boxes": torch.tensor([box]), "scores": torch.tensor([score]), "labels": torch.tensor([label])}


def test_the_sheet_shows_every_image(dataset, tmp_path):
    plot_detection_sheet(dataset, {}, tmp_path / "sheet.png")
    assert all(share(tmp_path / "sheet.png", colour) > 0.03 for colour in PAPER)


def test_a_short_sheet_spreads_over_the_data_set(dataset, tmp_path):
    plot_detection_sheet(dataset, {}, tmp_path / "sheet.png", count=2)
    assert [share(tmp_path / "sheet.png", colour) > 0.1 for colour in PAPER] == [True, False, True, False, False]


def test_masks_are_drawn_in_the_colour_of_their_class(tmp_path):
    """On white, under the line of the box: the colour of label 1, mixed with white. The mask has a third of the picture."""
    mask = torch.zeros(1, 60, 60)
    mask[:, :20] = 1
    plain, masked = found(0.9), found(0.9) | {"masks": encode(mask)}
    for name, detections in (("plain", plain), ("masked", masked)):
        plot_detections(torch.full((3, 60, 60), 255, dtype=torch.uint8), detections, {1: "disc"}, tmp_path / f"{name}.png")
    colour = np.array([int(COLOURS[1][i : i + 2], 16) for i in (1, 3, 5)])
    mixed = tuple(int(value) for value in (0.45 * colour + 0.55 * 255).round())
    assert share(tmp_path / "masked.png", mixed) == pytest.approx(1 / 3, abs=0.04) and share(tmp_path / "plain.png", mixed) == 0


def test_detections_are_drawn_from_the_threshold_on(dataset, tmp_path):
    shares = []
    for score in (0.4, 0.6):
        plot_detection_sheet(dataset, {1: found(score), 2: found(score, label=2)}, tmp_path / "sheet.png", score_threshold=0.5)
        shares.append([share(tmp_path / "sheet.png", colour) for colour in COLOURS[:2]])  # a colour a class
    assert shares[0] == [0, 0]
    assert min(shares[1]) > 0.001


def test_more_classes_than_colours(dataset, tmp_path):
    dataset.categories = [{"id": i, "name": f"class {i}"} for i in range(1, 31)]
    detections = {1: {key: torch.cat([found(0.8, label)[key] for label in range(1, 31)]) for key in ("boxes", "scores", "labels")}}
    plot_detection_sheet(dataset, detections, tmp_path / "sheet.png")
    assert all(share(tmp_path / "sheet.png", colour) > 0.03 for colour in PAPER)


@pytest.mark.parametrize("name", ["$x_1$", "cash $", r"$\\frac{", "100 % _a_ ^b^ {c} \\d", "字", "قطة", "🐈", "", "two\nlines"])
def test_a_class_name_is_text_whatever_is_in_it(dataset, tmp_path, name, caplog):
    dataset.categories[0]["name"] = name
    plot_detection_sheet(dataset, {1: found(0.9)}, tmp_path / "sheet.png")
    plot_detections(torch.zeros(3, 40, 60, dtype=torch.uint8), found(0.9), {1: name}, tmp_path / "picture.png")
    assert share(tmp_path / "sheet.png", COLOURS[0]) > 0 and share(tmp_path / "picture.png", COLOURS[1]) > 0


def test_a_dollar_starts_no_mathematics(tmp_path):
    """As mathematics `$aaaaaaaa$` is drawn without its dollars: the coloured box behind the text is narrower."""
    shares = []
    for name in ("$aaaaaaaa$", "aaaaaaaa"):
        pixels = torch.zeros(3, 40, 60, dtype=torch.uint8)
        plot_detections(pixels, found(0.9, box=(5.0, 20.0, 6.0, 21.0)), {1: name}, tmp_path / "picture.png")
        shares.append(share(tmp_path / "picture.png", COLOURS[1]))
    assert shares[0] > 1.1 * shares[1]
    with plain_text([]):
        assert not Figure().text(0, 0, "$a$").get_parse_math()


def test_a_script_without_a_font_is_named(caplog):
    with plain_text(["cat", "\U0001f408\ufe0e \U000e0041\U0010fffd字"]):
        pass
    with plain_text(["Katze", "кот", "γάτα"]):
        pass
    fonts = {font.name for font in font_manager.fontManager.ttflist if not font.name.startswith("Last Resort")}
    if fonts <= {"DejaVu Sans", "DejaVu Sans Mono"}:
        assert "字" in caplog.text
    assert len(caplog.records) <= 1, "the default font has Cyrillic and Greek"


def test_a_character_is_drawn_with_a_font_that_has_it():
    """DejaVu Sans has no MATHEMATICAL SCRIPT CAPITAL A. STIX, which Matplotlib brings, has."""
    with plain_text(["\U0001d49c"]):
        families = matplotlib.rcParams["font.family"]
    assert len(families) == 2
    assert 0x1D49C in FT2Font(font_manager.findfont(families[1])).get_charmap()


@pytest.mark.parametrize(("width", "height"), [(3000, 2), (2, 3000)])
def test_a_very_narrow_image_is_drawn(tmp_path, width, height):
    box = (0.0, 0.0, float(width), float(height))
    plot_detections(torch.zeros(3, height, width, dtype=torch.uint8), found(0.9, box=box), {1: "wire"}, tmp_path / "picture.png")
    assert max(Image.open(tmp_path / "picture.png").size) == 1000
    assert min(Image.open(tmp_path / "picture.png").size) == 50
    assert share(tmp_path / "picture.png", COLOURS[1]) > 0.01


def test_a_very_narrow_image_does_not_break_the_sheet(dataset, tmp_path):
    Image.new("RGB", (3000, 2), PAPER[0]).save(tmp_path / "1.png")
    content = json.loads((tmp_path / "instances.json").read_text())
    content["images"][0] |= {"width": 3000, "height": 2}
    content["annotations"][0] |= {"bbox": [8, 0, 40, 2]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    narrow = CocoDetection(tmp_path, tmp_path / "instances.json", Grid([0.5]))
    plot_detection_sheet(narrow, {1: found(0.9, box=(8.0, 0.0, 48.0, 2.0)), 2: found(0.9, label=2)}, tmp_path / "sheet.png")
    assert all(share(tmp_path / "sheet.png", colour) > 0.03 for colour in PAPER[1:])


def test_a_sheet_of_no_images_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="count must be at least 1"):
        plot_detection_sheet(dataset, {}, tmp_path / "sheet.png", count=0)
    assert not (tmp_path / "sheet.png").exists()


def logged(folder, *rows):
    """metrics.csv as Lightning leaves it for rows of (step, values)."""
    logger = CSVLogger(folder, name="", version="")
    for step, values in rows:
        logger.log_metrics(values, step)
        logger.save()
    return folder / "metrics.csv"


def test_curves_of_what_lightning_logs(tmp_path):
    train = [(step, {"train/loss": 3 / (1 + step)}) for step in range(0, 40, 2)]
    val = [(step, {"val/loss": 2.0, "val/AP": 20.0 + step, "val/AP50": 40.0 + step, "val/AP75": 30.0 + step}) for step in (19, 39)]
    plot_curves(logged(tmp_path, *train, *val), tmp_path / "curves.png")
    drawn = {name: share(tmp_path / "curves.png", COLOURS[i]) for name, i in {"train": 6, "val": 5, "AP50": 2, "AP75": 0}.items()}
    assert min(drawn.values()) > 1e-4, drawn


def test_curves_without_validation_or_with_a_loss_that_ran_away(tmp_path):
    metrics = logged(tmp_path, (0, {"train/loss": 2.0}), (1, {"train/loss": 1.0}), (2, {"train/loss": float("nan")}))
    plot_curves(metrics, tmp_path / "curves.png")
    assert share(tmp_path / "curves.png", COLOURS[6]) > 1e-4
    assert share(tmp_path / "curves.png", COLOURS[5]) == 0


def test_curves_of_another_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.csv has no values of train/loss.*speed"):
        plot_curves(logged(tmp_path, (0, {"speed": 2.0})), tmp_path / "curves.png")
    with pytest.raises(FileNotFoundError, match=r"other\.csv"):
        plot_curves(tmp_path / "other.csv", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
