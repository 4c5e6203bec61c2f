"""The report of a made-up sweep: what it says, that it needs nothing but itself, and what it does where runs are missing."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from omegaconf import OmegaConf

from roi_quantization.detection.report import write_report
from tests.detection.report.fake_sweep import SCATTER, write_fake_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Nine arms, two seeds, on 30 images; one run failed, one was never begun."""
    folder = tmp_path_factory.mktemp("runs") / "made_up"
    write_fake_sweep(folder, seeds=(0, 1), images=30, failed=["pool_floor_seed1"], missing=["prroi_seed0"])
    write_report(folder)
    return folder


def test_an_operator_of_somebody_else_is_in_the_report(tmp_path):
    """Where it looks is not known; what it scores is."""
    folder = write_fake_sweep(tmp_path / "made_up", arms={"align": 3.0, "pool": 7.5, "warp": 6.0}, seeds=(0, 1), images=10)
    for run in folder.glob("warp_seed*"):
        config = OmegaConf.load(run / "config.yaml")
        config.roi = {"_target_": "torchvision.ops.roi_align", "_partial_": True}
        OmegaConf.save(config, run / "config.yaml")
    write_report(folder)
    main = table(folder, "main")
    assert main["warp"]["RoI"] == "torchvision.ops.roi_align" and float(main["warp"]["AP75"]) > 0
    assert list(table(folder, "misalignment")) == ["align", "pool"]


def test_runs_that_were_trained_otherwise_are_not_said_to_be_alike(tmp_path):
    folder = write_fake_sweep(tmp_path / "made_up", arms={"align": 3.0, "pool": 7.5}, seeds=(0,), images=10)
    write_report(folder)
    assert "8 epochs of 4 images a step, rate 0.003, the same for all" in text(folder, "report.md")
    config = OmegaConf.load(folder / "pool_seed0" / "config.yaml")
    config.optim.groups.lr = 0.001
    OmegaConf.save(config, folder / "pool_seed0" / "config.yaml")
    write_report(folder)
    assert "rate 0.003 or 0.001" in text(folder, "report.md") and "the same for all" not in text(folder, "report.md")


def text(folder, name):
    return (folder / "report" / name).read_text()


def table(folder, name):
    with open(folder / "report" / "tables" / f"{name}.csv", newline="") as file:
        return {next(iter(row.values())): row for row in csv.DictReader(file)}


def test_it_opens_with_the_result_in_numbers(sweep):
    """The sentence's numbers are those of the runs."""

    def mean(arm):
        values = [json.loads((sweep / f"{arm}_seed{seed}" / "metrics.json").read_text())["stats"]["AP75"] for seed in (0, 1)]
        return sum(values) / 2

    lost = mean("align") - mean("pool")
    first = text(sweep, "report.md").split("\n\n")[1]
    assert first.startswith(f"**RoIPool in the place of RoIAlign costs {lost:.1f} points of AP75 at stride 16: ")
    assert f"{mean('pool'):.1f} against {mean('align'):.1f} (95 % interval of the difference" in first and "2 seeds, paired" in first
    assert "rounding the RoI alone costs" in first
    assert first[2:60] in text(sweep, "report.html"), "the page opens as the text does"


def test_tables_hold_the_numbers_with_all_digits(sweep):
    main = table(sweep, "main")
    assert list(main) == list(SCATTER)
    assert float(main["pool"]["AP75 - align"]) == pytest.approx(float(main["pool"]["AP75"]) - float(main["align"]["AP75"]))
    assert float(main["pool"]["AP75 - align low"]) < float(main["pool"]["AP75 - align"]) < float(main["pool"]["AP75 - align high"])
    assert main["prroi"]["runs"] == "1" and main["prroi"]["AP75 low"] == "", "one run has no interval"
    costs = table(sweep, "costs")
    both = (
        costs["rounding the RoI alone"]["AP"],
        costs["quantizing its bins alone"]["AP"],
        costs["interaction: both - sum of the two"]["AP"],
    )
    assert float(costs["both together"]["AP"]) == pytest.approx(sum(map(float, both)))
    assert set(table(sweep, "cross")["align"]) == {"trained with", "tested: align", "tested: pool", "tested: warp"}
    misread = table(sweep, "misalignment")
    assert float(misread["align"]["IoU of RoI"]) == pytest.approx(1, abs=1e-4) and float(misread["pool"]["IoU of RoI"]) < 0.9


def test_differences_have_an_interval_over_images_as_well(sweep):
    """Of the same runs: the value is the same, the interval another."""
    main, images = table(sweep, "main"), table(sweep, "images")
    assert list(images) == [arm for arm in SCATTER if arm != "align"]
    for arm in ("pool", "prroi"):
        change = {end: float(images[arm][f"AP75{end}"]) for end in ("", " low", " high")}
        assert change[""] == pytest.approx(float(main[arm]["AP75 - align"]))
        assert change[" low"] < change[""] < change[" high"], "also where one seed is shared"
    assert images["pool"]["AP75 n"] == "30"
    assert "had other images been drawn" in text(sweep, "report.md") and "had other images been drawn" in text(sweep, "report.html")


def test_every_figure_is_there_as_png_and_svg(sweep):
    figures = sweep / "report" / "figures"
    names = {"differences", "two_by_two", "seeds", "thresholds", "localisation", "sizes", "misalignment", "cross"}
    assert {path.stem for path in figures.glob("*.png")} == {path.stem for path in figures.glob("*.svg")} == names
    for name in names:
        assert f"figures/{name}.png" in text(sweep, "report.md")


def test_the_page_needs_nothing_but_itself(sweep):
    """No script, no address to load from: every picture is in it, for light and for dark ground."""

    class Sources(HTMLParser):
        found: list = []  # noqa: RUF012

        def handle_starttag(self, tag, attributes):
            assert tag not in ("script", "link", "iframe")
            self.found += [value for key, value in attributes if key in ("src", "srcset", "href")]

    page = text(sweep, "report.html")
    Sources().feed(page)
    assert len(Sources.found) == 16 and all(source.startswith("data:image/svg+xml;base64,") for source in Sources.found)
    assert "url(" not in page and "@import" not in page
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page


def test_runs_that_are_not_there_are_named(sweep):
    for name in ("report.md", "report.html"):
        assert "pool_floor, seed 1: failed. RuntimeError: no memory left" in text(sweep, name)
        assert "prroi, seed 0: not finished." in text(sweep, name)


def test_it_says_what_it_was_made_from(sweep):
    report = text(sweep, "report.md")
    assert re.search(r"- commit: ([0-9a-f]{40}|not a git checkout)", report)
    for words in (
        "- seeds: 0, 1",
        "- stride: 16 pixels a cell",
        "- evaluated on: 30 images,",
        "torch 2.",
        "- training: 8 epochs of 4 images",
    ):
        assert words in report


def test_one_seed_has_intervals_over_images_and_says_so(tmp_path):
    folder = write_fake_sweep(tmp_path / "one", arms={"align": 3.0, "pool": 7.5}, seeds=(4,), images=20)
    write_report(folder)
    report = text(folder, "report.md")
    assert "one seed, 20 images resampled)" in report and "say nothing of how training varies" in report
    assert float(table(folder, "main")["pool"]["AP75 - align high"]) < 0
    assert "What each quantization costs" not in report, "two arms are no 2 x 2"
    assert "had other images been drawn" not in report, "all intervals are over images"


def test_without_the_reference_another_arm_takes_its_place(tmp_path):
    folder = write_fake_sweep(tmp_path / "other", arms={"warp": 5.0, "pool": 7.5}, seeds=(0, 1), images=10)
    write_report(folder)
    assert "There is no finished run of align: the others are held against warp." in text(folder, "report.md")
    assert "RoIPool in the place of RoIWarp costs" in text(folder, "report.md")


def test_a_sweep_without_a_finished_run_is_an_error_that_says_where_to_look(tmp_path):
    folder = write_fake_sweep(tmp_path / "none", arms={"align": 3.0}, seeds=(0,), images=5, failed=["align_seed0"])
    with pytest.raises(ValueError, match=r"no finished run to report on; 1 failed, see .*align_seed0/failed\.txt"):
        write_report(folder)


def test_the_same_sweep_gives_the_same_figures(sweep, tmp_path):
    before = (sweep / "report" / "figures" / "seeds.svg").read_bytes()
    copy = shutil.copytree(sweep, tmp_path / "made_up")
    write_report(copy)
    assert (copy / "report" / "figures" / "seeds.svg").read_bytes() == before
