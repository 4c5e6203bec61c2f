"""explain.py: the numbers in its text, the picture, and what it says of a mistake."""

import runpy

import numpy as np
import pytest
from PIL import Image

from roi_quantization.detection.alignment.bin_figure import TAP
from roi_quantization.detection.alignment.explanation_figure import GAINED, LOST
from roi_quantization.scripts.explain import explain, explain_data, load_operators
from tests import configuration
from tests.configuration import ROOT


@pytest.fixture
def composed(tmp_path):
    def compose_with(*overrides):
        return configuration.composed("explain", f"picture={tmp_path / 'explain.png'}", *overrides)

    return compose_with


def share(picture, colour):
    """How much of a PNG file has exactly this colour, 0 to 1."""
    return (np.asarray(Image.open(picture).convert("RGB")) == tuple(bytes.fromhex(colour[1:]))).all(axis=2).mean()


def steps_of(text: str) -> dict[str, list[str]]:
    """Operator -> its lines, from the output."""
    paragraphs = [paragraph.splitlines() for paragraph in text.split("\n\n")]
    return {lines[0].split(":")[0]: [line.strip() for line in lines[1:]] for lines in paragraphs if lines[0][:1].islower()}


def test_the_worked_box_in_text(composed, capsys):
    """Box x=296, y=192, w=200, h=145 at 1/32: x 9.25, y 6, w 6.25, h 4.53, 28.32 cells."""
    explain(composed())
    text = capsys.readouterr().out
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "the map has 16 x 16 cells, and the box is 6.25 x 4.53 cells" in text
    steps = steps_of(text)
    assert list(steps) == ["pool", "pool_floor", "pool_bins", "warp", "align", "prroi"]

    floor = steps["pool_floor"]
    assert floor[0] == "RoI      x 9.00 to 15.00, y 6.00 to 10.00: 6.00 x 4.00 = 24.00 cells"
    assert floor[1] == "lost 5.32 cells (18.8%), gained 1.00 (3.5%); IoU with the box 0.784", "the first quantization alone"
    assert floor[2].endswith("columns 9-10, 11-12, 13-14") and floor[3] == "rows 6, 7, 8"
    assert floor[5].startswith("lost 11.07 cells (39.1%), gained 0.75 (2.6%); IoU with the box 0.593"), "both"

    pool = steps["pool"]
    assert pool[0] == "RoI      x 9.00 to 17.00, y 6.00 to 12.00: 8.00 x 6.00 = 48.00 cells", "round, + 1"
    assert pool[4] == "region   x 9.00 to 16.00, y 6.00 to 12.00: 7.00 x 6.00 = 42.00 cells", "the map ends with column 15"
    assert pool[5].startswith("lost 0.00 cells (0.0%), gained 13.68 (48.3%); IoU with the box 0.674")
    # 9.25 and 15.5 round alike for 8 px to the right and not one to the left; 6 and 10.53 for 16 px down and 1 px up
    assert pool[6:] == ["centre 4.0 px right, 23.5 px down", "dead zone moves within 8 px in x, 17 px in y"]

    # the RoI is rounded, its bins are not: samples at 1/4 and 3/4 of bins of 7/3 cells from 9
    warp = steps["warp"]
    assert warp[0] == "RoI      x 9.00 to 16.00, y 6.00 to 11.00: 7.00 x 5.00 = 35.00 cells"
    assert warp[3] == "samples  x 9.58 10.75 | 11.92 13.08 | 14.25 15.42"

    align = steps["align"]
    assert align[3:5] == ["samples  x 9.77 10.81 | 11.85 12.90 | 13.94 14.98", "y 6.38 7.13 | 7.89 8.64 | 9.40 10.15"]
    assert align[6:] == [
        "lost 0.00 cells (0.0%), gained 0.00 (0.0%); IoU with the box 1.000; bin by bin 1.000",
        "centre in place",
        "dead zone no move",
    ]

    assert steps["prroi"][-2] == "centre 16.0 px right, 16.0 px down", "half a cell, as released"
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.count(".") >= 6 and line[0].islower()}
    assert rows["pool_floor"] == ["0.593", "0.223", "11.07", "0.75", "-12.0", "-24.5", "32", "x", "32"]


def test_the_bins_of_665_pixels(composed, capsys):
    explain(composed("box=[0,0,665,665]", "image_size=[800,800]", "output_size=7", "operators=[pool_floor,align]"))
    steps = steps_of(capsys.readouterr().out)
    assert "x 0.00 to 20.00" in steps["pool_floor"][0]
    assert steps["pool_floor"][2].startswith("bins     7 x 7 of 2.86 x 2.86, in whole cells: columns 0-1, 2-3")
    assert "14.00 x 14.00" in steps["pool_floor"][4] and "lost 235.86 cells (54.6%)" in steps["pool_floor"][5]
    assert steps["align"][2] == "bins     7 x 7 of 2.97 x 2.97"
    assert steps["align"][3] == "samples  x 0.74 2.23 | ... | 18.55 20.04", "at 1/4 and 3/4 of a bin; of many bins the first and the last"


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    """As a user types it, in some folder; nothing is left behind but the picture."""
    monkeypatch.chdir(tmp_path)
    typed = ["explain.py", "box=[296,192,496,337]", "image_size=[512,512]", "stride=32", "output_size=3"]
    monkeypatch.setattr("sys.argv", [*typed, "operators=[pool,warp]"])
    runpy.run_path(str(ROOT / "explain.py"), run_name="__main__")
    assert "The picture: runs/explain.png" in capsys.readouterr().out
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["explain.png"]
    monkeypatch.setattr("sys.argv", [*typed, "operators=[pool,wrap]"])
    with pytest.raises(SystemExit, match=r"^explain.py: operators=\['pool', 'wrap'\]: there is no operator wrap. Choose from align, "):
        runpy.run_path(str(ROOT / "explain.py"), run_name="__main__")


def test_each_job_of_a_sweep_draws_its_own_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["explain.py", "-m", "stride=16,32", "operators=[pool]", "hydra.sweep.dir=sweep"])
    runpy.run_path(str(ROOT / "explain.py"), run_name="__main__")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["explain_0.png", "explain_1.png"]


def test_one_bin_from_near(composed, capsys):
    cfg = composed("bin=[0,0]", "operators=[align,pool,prroi]")
    explain(cfg)
    lines = capsys.readouterr().out.splitlines()
    # 9.77 lies between the centres 9.5 and 10.5, and 6.38 between 5.5 and 6.5: weights .73 .27 and .12 .88
    assert "  the sample at (9.77, 6.38) is 0.09 (9, 5) + 0.03 (10, 5) + 0.64 (9, 6) + 0.24 (10, 6)" in lines
    assert sum(line.startswith("  the sample at") and line.endswith("is 1.00 (9, 7)") for line in lines) == 1, "a whole cell of pool"
    assert not any(line.startswith("prroi") for line in lines), "an integral has no samples"
    assert share(cfg.picture, TAP) > 0, "the cells that the first sample mixes are marked"


@pytest.mark.parametrize(("operator", "lost", "gained"), [("align", False, False), ("pool", False, True), ("pool_floor", True, True)])
def test_the_picture_shows_what_is_lost_and_gained(composed, operator, lost, gained):
    """The legend, too, has only what there is."""
    cfg = composed(f"operators=[{operator}]")
    explain(cfg)
    assert (share(cfg.picture, LOST["facecolor"]) > 0) == lost
    assert (share(cfg.picture, GAINED["facecolor"]) > 0) == gained


def test_an_image_brings_its_size_and_its_features(composed, tmp_path, capsys):
    Image.new("RGB", (100, 70), "red").save(tmp_path / "red.png")
    cfg = composed(f"image={tmp_path / 'red.png'}", "box=[10,10,90,60]", "stride=16", "operators=[align]")
    explain(cfg)
    text = capsys.readouterr().out
    assert "an image 100 wide and 70 high" in text and "the map has 7 x 5 cells" in text, "padded to multiples of 16"
    assert "random weights" in text
    assert share(cfg.picture, "#ff0000") > 0.02, "the image itself is on the picture"
    with pytest.raises(ValueError, match=r"\[10, 10, 101, 60\] reaches out of the image, which is 100 wide and 70 high"):
        explain(composed(f"image={tmp_path / 'red.png'}", "box=[10,10,101,60]"))


def test_trained_weights(composed, real_weights, tmp_path, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    explain(composed(f"image={tmp_path / 'red.png'}", "box=[0,0,64,64]", f"weights={real_weights / 'vgg16_features.pth'}"))
    assert "random weights" not in capsys.readouterr().out


def test_all_proposals_of_a_data_set(composed, tmp_path, capsys):
    sizes = ["data.source.train=1", "data.source.val=1", "data.source.test=3", "data.source.image_size=96", "data.source.sides=[24,48]"]
    rows = explain_data(
        composed("data=embedded", f"data.root={tmp_path / 'data'}", "proposals.scales=[0.5]", "operators=[pool,align]", *sizes)
    )
    assert {(row["operator"], row["stride"], row["size"]) for row in rows} == {
        (operator, stride, size) for operator in ("pool", "align") for stride in (16, 32) for size in ("all", "medium")
    }
    windows = {row["boxes"] for row in rows}
    assert len(windows) == 1 and windows.pop() % 3 == 0, "the same windows in each of three images"
    assert all(row["iou"] > 0.9999 for row in rows if row["operator"] == "align")
    assert "of the proposals of 3 images (test)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("box=[400,100,500,600]", r"box=\[400, 100, 500, 600\] reaches out of the image, which is 512 wide and 512 high"),
        ("box=[-1,0,50,60]", r"reaches out of the image"),
        ("box=[50,10,20,60]", r"box=\[50, 10, 20, 60\]: expected \[x1,y1,x2,y2\] with x1 < x2 and y1 < y2"),
        ("box=[50,10,50,60]", r"with x1 < x2"),
        ("box=[50,10,60]", r"expected \[x1,y1,x2,y2\], two corners"),
        ("stride=0", r"stride=0: expected a whole number above 0"),
        ("output_size=0", r"output_size=0: expected a whole number above 0"),
        ("bin=[0,3]", r"bin=\[0, 3\]: expected \[row,column\], each from 0 to 2"),
        ("bin=0", r"bin=0: expected \[row,column\], each from 0 to 2"),
        ("operators=[]", "name at least one of configs/roi, such as "),
        ("operators=rol", r"operators=\['rol'\]: there is no operator rol. Choose from align, "),
    ],
)
def test_mistakes_are_named(composed, override, message):
    with pytest.raises(ValueError, match=message):
        explain(composed(override))


def test_an_image_that_is_not_there_or_no_image(composed, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image=nowhere.png: no such file"):
        explain(composed("image=nowhere.png"))
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match=r"text.png does not decode"):
        explain(composed(f"image={tmp_path / 'text.png'}"))


@pytest.mark.slow
def test_every_shipped_operator_can_be_explained(composed, capsys):
    names = sorted(path.stem for path in (ROOT / "configs" / "roi").glob("*.yaml"))
    assert list(load_operators(names)) == names
    explain(composed(f"operators=[{','.join(names)}]"))
    assert list(steps_of(capsys.readouterr().out)) == names
