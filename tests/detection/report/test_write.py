"""The report of a made-up sweep: what it says, that it needs nothing but itself, and what it does where runs are missing."""

import json
import re
from functools import partial
from html.parser import HTMLParser

import pytest
from omegaconf import OmegaConf

from roi_quantization import ops
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.report import write_report
from roi_quantization.detection.report.figures import make_figures
from roi_quantization.detection.report.findings import Findings
from roi_quantization.detection.report.style import LIGHT, arm_style, render
from roi_quantization.detection.report.sweep import Sweep, read_sweep
from tests.detection.report.fake_sweep import SCATTER, table, text, write_fake_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Nine arms, two seeds, on 30 images; one run failed, one was never begun."""
    folder = tmp_path_factory.mktemp("runs") / "made_up"
    write_fake_sweep(folder, seeds=(0, 1), images=30, failed=["pool_floor_seed1"], missing=["prroi_seed0"])
    write_report(folder)
    return folder


def test_an_operator_of_somebody_else_is_in_the_report(tmp_path, undrawn):
    """Where the operator samples is unknown, its scores are not."""
    folder = write_fake_sweep(tmp_path / "made_up", arms={"align": 3.0, "pool": 7.5, "warp": 6.0}, seeds=(0, 1), images=10)
    for run in folder.glob("warp_seed*"):
        config = OmegaConf.load(run / "config.yaml")
        config.roi = {"_target_": "torchvision.ops.roi_align", "_partial_": True}
        OmegaConf.save(config, run / "config.yaml")
    write_report(folder)
    main = table(folder, "main")
    assert main["warp"]["RoI"] == "torchvision.ops.roi_align" and float(main["warp"]["AP75"]) > 0
    assert list(table(folder, "misalignment")) == ["align", "pool"]


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_masks_have_a_table(tmp_path, undrawn, seeds):
    """Those of this sweep fill their boxes, so that their accuracy is the boxes' but for pixels."""
    folder = write_fake_sweep(tmp_path / "made_up", arms={"align": 3.0, "pool": 7.5}, seeds=seeds, images=10, masks=True)
    write_report(folder)
    masks, main = table(folder, "masks"), table(folder, "main")
    assert list(masks) == ["align", "pool"]
    assert float(masks["pool"]["segm_AP"]) == pytest.approx(float(main["pool"]["AP"]), abs=3)
    assert float(masks["pool"]["segm_AP - align"]) == pytest.approx(float(masks["pool"]["segm_AP"]) - float(masks["align"]["segm_AP"]))
    assert float(masks["pool"]["segm_AP90"]) < float(masks["pool"]["segm_AP75"])
    assert float(masks["pool"]["segm_AP75 - align low"]) < float(masks["pool"]["segm_AP75 - align"]), "an interval"
    assert "## Accuracy of the masks" in (folder / "report/report.md").read_text()


def test_results_without_masks_in_a_sweep_with_masks_are_named(tmp_path, undrawn):
    folder = write_fake_sweep(tmp_path / "made_up", arms={"align": 3.0, "pool": 7.5}, seeds=(0,), images=10, masks=True)
    path = folder / "pool_seed0" / "results.json"
    results = json.loads(path.read_text())
    del results[3]["segmentation"]
    path.write_text(json.dumps(results))
    with pytest.raises(InputError, match=r"pool_seed0/results\.json: a result of image \d+ has no segmentation, and masks are evaluated"):
        write_report(folder)


def test_numbers_of_fewer_seeds_say_so(tmp_path, undrawn):
    missing = ["warp_max_seed2", "pool_bins_seed2", "pool_exclusive_seed0"]
    arms = {"align": 3.0, "align_max": 3.2, "warp_max": 9.0, "pool_bins": 4.6, "pool_exclusive": 6.0}
    folder = write_fake_sweep(tmp_path / "made_up", arms=arms, missing=[*missing, "align_seed2"], images=10)
    write_report(folder)
    report = text(folder, "report.md")
    assert "of the one seed of 3 that all four operators have" in report
    assert "Of fewer seeds, those of both operators: align_max 2, pool_exclusive 1." in report
    assert "corrected for 4 comparisons" in report, "pool_exclusive has no p, and could have been the one that differs most"
    assert "the largest of 4 differences" in report and "with Holm's correction" in report


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_images_without_objects_have_a_report(tmp_path, seeds):
    folder = write_fake_sweep(tmp_path / "made_up", arms={"align": 3.0, "pool": 7.5}, seeds=seeds, images=3)
    path = tmp_path / "made_up_data" / "annotations" / "instances_test.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    for run in folder.glob("*_seed*"):
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["stats"] = dict.fromkeys(metrics["stats"])
        (run / "metrics.json").write_text(json.dumps(metrics))
    write_report(folder)
    assert table(folder, "main")["pool"]["AP"] == ""


def test_one_run_without_proposals_leaves_the_operator_out_of_the_localisation(tmp_path, undrawn):
    folder = write_fake_sweep(tmp_path / "made_up", arms={"align": 3.0, "pool": 7.5}, seeds=(0, 1), images=10)
    path = folder / "pool_seed1" / "results.json"
    path.write_text(json.dumps([{key: value for key, value in one.items() if key != "proposal"} for one in json.loads(path.read_text())]))
    write_report(folder)
    assert list(table(folder, "localisation")) == ["align"]


def test_one_image_and_one_seed_have_no_interval(tmp_path, undrawn):
    folder = write_fake_sweep(tmp_path / "made_up", arms={"align": 3.0, "pool": 20.0}, seeds=(0,), images=1)
    write_report(folder)
    assert "(one seed, one image)" in text(folder, "report.md") and "With one image there are no intervals" in text(folder, "report.md")


def test_a_bar_in_a_name_does_not_divide_a_cell(tmp_path, undrawn):
    folder = write_fake_sweep(tmp_path / "made_up", arms={"align": 3.0, "pool": 7.5}, seeds=(0,), images=10)
    config = OmegaConf.load(folder / "pool_seed0" / "config.yaml")
    config.arm = "a|b"
    OmegaConf.save(config, folder / "pool_seed0" / "config.yaml")
    (folder / "pool_seed0").rename(folder / "a|b_seed0")
    write_report(folder)
    assert re.search(r"^\| a\\\|b \|", (folder / "report/report.md").read_text(), re.M)


def test_a_run_from_elsewhere_calls_nothing(tmp_path, caplog, undrawn):
    """The operator of a run is a call written in a file. Only what configurations name is called."""
    folder, trace = write_fake_sweep(tmp_path / "made_up", arms={"align": 3.0, "warp": 6.0}, seeds=(0,), images=10), tmp_path / "trace"
    config = OmegaConf.load(folder / "warp_seed0" / "config.yaml")
    config.roi = {"_target_": "os.mkdir", "_args_": [str(trace)]}
    OmegaConf.save(config, folder / "warp_seed0" / "config.yaml")
    write_report(folder)
    assert not trace.exists()
    assert table(folder, "main")["warp"]["RoI"] == "os.mkdir"
    assert "its configuration would call os.mkdir (roi._target_)" in caplog.text


def test_runs_that_were_trained_otherwise_are_not_said_to_be_alike(tmp_path, undrawn):
    folder = write_fake_sweep(tmp_path / "made_up", arms={"align": 3.0, "pool": 7.5}, seeds=(0,), images=10)
    write_report(folder)
    alike = "within a seed all operators start from the same weights"
    assert "8 epochs of 4 images a step, rate 0.003, the same for all" in text(folder, "report.md") and alike in text(folder, "report.md")
    config = OmegaConf.load(folder / "pool_seed0" / "config.yaml")
    config.optim.groups.lr = 0.001
    OmegaConf.save(config, folder / "pool_seed0" / "config.yaml")
    write_report(folder)
    report = text(folder, "report.md")
    assert "rate 0.003 or 0.001" in report and "the same for all" not in report and alike not in report
    assert "The arms differ in more than the operator: optim.groups.lr (0.003 or 0.001). Differences between them are of all" in report


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(backbone={"_target_": "my_project.backbone.ResNet18"}), "backbone.stride is not set"),
        (lambda c: c.head.extractor.pop("output_size"), "head.extractor.output_size is not set"),
        (lambda c: c.data.update(eval_transform={"_target_": "my.resize", "size": 32}), "data.eval_transform is my.resize: to what size"),
    ],
)
def test_parts_of_ones_own_are_reported_without_what_depends_on_their_cells(tmp_path, undrawn, change, words):
    """Their configurations need not say the stride, nor the size of an image."""
    folder = write_fake_sweep(tmp_path / "own", arms={"align": 3.0, "pool": 7.5}, seeds=(0,), images=10)
    for path in folder.glob("*_seed0/config.yaml"):
        config = OmegaConf.load(path)
        change(config)
        config.optim.groups = {"_target_": "my.groups", "base_lr": 1e-3}
        OmegaConf.save(config, path)
    write_report(folder)
    report = text(folder, "report.md")
    assert f"sampled regions and predicted costs are left out, because the configurations do not say enough: {words}" in report
    assert "RoIPool in the place of RoIAlign costs" in report and "rate not known (optim.groups.lr is not set)" in report
    assert ("stride: not known" in report) == ("stride" in words) != ("stride: 16 pixels per cell" in report)
    tables = {path.stem for path in (folder / "report/tables").iterdir()}
    assert "cells" not in text(folder, "tables/sizes.csv") and {"misalignment", "predicted"}.isdisjoint(tables)


def test_the_length_and_the_images_of_a_step_are_those_that_were_trained(tmp_path, undrawn):
    folder = write_fake_sweep(tmp_path / "made_up", arms={"align": 3.0}, seeds=(0,), images=10)
    path = folder / "align_seed0" / "config.yaml"

    def training(**trainer):
        OmegaConf.save(OmegaConf.merge(OmegaConf.load(path), {"trainer": trainer}), path)
        write_report(folder)
        return next(line for line in text(folder, "report.md").splitlines() if line.startswith("- training: "))

    more = {"max_epochs": 4, "max_steps": 1000, "accumulate_grad_batches": 4, "devices": 2}
    assert "training: at most 4 epochs and 1000 steps of 32 images a step" in training(**more)
    assert "training: 00:12:00:00 (days, hours, minutes, seconds) of 32" in training(max_epochs=-1, max_steps=-1, max_time="00:12:00:00")
    assert "training: an unlimited number of steps of 32" in training(max_time=None)


def test_it_opens_with_the_result_in_numbers(sweep):
    """The sentence's numbers are those of the runs."""

    def mean(arm):
        values = [json.loads((sweep / f"{arm}_seed{seed}" / "metrics.json").read_text())["stats"]["AP"] for seed in (0, 1)]
        return sum(values) / 2

    lost = mean("align") - mean("pool")
    first = text(sweep, "report.md").split("\n\n")[1]
    assert first.startswith(f"**RoIPool in the place of RoIAlign costs {lost:.1f} points of AP at stride 16: ")
    assert f"{mean('pool'):.1f} against {mean('align'):.1f} (95 % interval" in first and "2 seeds, paired" in first
    assert "rounding the RoI alone costs" in first
    assert first[2:60] in text(sweep, "report.html"), "the page opens as the text does"


def test_tables_hold_the_numbers_with_all_digits(sweep):
    main = table(sweep, "main")
    assert list(main) == list(SCATTER)
    assert float(main["pool"]["AP - align"]) == pytest.approx(float(main["pool"]["AP"]) - float(main["align"]["AP"]))
    assert float(main["pool"]["AP - align low"]) < float(main["pool"]["AP - align"]) < float(main["pool"]["AP - align high"])
    assert main["prroi"]["runs"] == "1" and main["prroi"]["AP low"] == "", "one run has no interval"
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
        change = {end: float(images[arm][f"AP{end}"]) for end in ("", " low", " high")}
        assert change[""] == pytest.approx(float(main[arm]["AP - align"]))
        assert change[" low"] < change[""] < change[" high"], "also where one seed is shared"
    ends = float(images["pool"]["AP low"]), float(main["pool"]["AP - align low"])
    assert float(images["pool"]["AP, new seeds and images low"]) < min(ends)
    assert images["prroi"]["AP, new seeds and images low"] == "", "one seed is shared"
    assert images["pool"]["AP n"] == "30"
    fewer = "see the same images, proposals and sampled RoIs. Of fewer seeds, those of both operators: pool_floor 1, prroi 1. p is"
    assert fewer in text(sweep, "report.md")
    assert "Holm's p is corrected for 8 comparisons." in text(sweep, "report.md"), "prroi and pool_floor, of one seed each, count as well"
    assert "with intervals over images" in text(sweep, "report.md") and "with intervals over images" in text(sweep, "report.html")


def test_every_figure_is_there_as_png_and_svg(sweep):
    figures = sweep / "report" / "figures"
    names = {"differences", "two_by_two", "seeds", "thresholds", "localisation", "sizes", "misalignment", "predicted", "cross"}
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
    assert len(Sources.found) == 18 and all(source.startswith("data:image/svg+xml;base64,") for source in Sources.found)
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
        "- stride: 16 pixels per cell",
        "- evaluated on: test, 30 images,",
        "torch 2.",
        "- training: 8 epochs of 4 images",
    ):
        assert words in report


def test_a_failed_run_need_not_say_why(tmp_path, undrawn):
    folder = write_fake_sweep(tmp_path / "empty", arms={"align": 3.0, "pool": 7.5}, seeds=(0,), images=6, failed=["pool_seed0"])
    (folder / "pool_seed0" / "failed.txt").write_text("")
    write_report(folder)
    assert "pool, seed 0: failed. No reason was written." in text(folder, "report.md")


def test_one_seed_has_intervals_over_images_and_says_so(tmp_path, undrawn):
    folder = write_fake_sweep(tmp_path / "one", arms={"align": 3.0, "pool": 7.5}, seeds=(4,), images=20)
    write_report(folder)
    report = text(folder, "report.md")
    assert "one seed, 20 images resampled)" in report and "do not include the variation between trainings" in report
    assert float(table(folder, "main")["pool"]["AP - align high"]) < 0
    assert "What each quantization costs" not in report, "two arms are no 2 x 2"
    assert "p is two-sided" not in report and "Holm" not in report and "p, Holm" not in table(folder, "main")["pool"]
    assert "p of AP" not in table(folder, "differences")["pool"]
    assert "with intervals over images" not in report, "all intervals are over images"


def test_the_headline_is_of_ap_whatever_the_other_metrics_show(tmp_path, undrawn, monkeypatch):
    """AP was chosen beforehand. AP75's interval may hold 0 where AP's does not."""
    folder = write_fake_sweep(tmp_path / "other", arms={"align": 3.0, "pool": 7.5}, seeds=(0, 1, 2), images=20)
    given = {
        "AP": {"align": {0: 45.0, 1: 46.0, 2: 45.5}, "pool": {0: 40.0, 1: 41.0, 2: 40.5}},
        "AP75": {"align": dict.fromkeys(range(3), 35.0), "pool": {0: 20.0, 1: 45.0, 2: 30.0}},
    }
    measured = Sweep.values
    monkeypatch.setattr(Sweep, "values", lambda self, metric: given.get(metric) or measured(self, metric))
    write_report(folder)
    report = text(folder, "report.md")
    assert "costs 5.0 points of AP at stride 16: 40.5 against 45.5 (95 % interval 5.0 to 5.0, 3 seeds, paired" in report
    assert "costs 3.3 AP75 [-27.9, 34.6] (not shown)" in report and "no difference is shown" not in report
    assert report.count("(not shown)") == 1 and "interval of AP holds 0" not in report
    assert "p, Holm" in report


def test_the_headline_is_of_the_arm_that_differs_most_where_there_is_no_roipool_to_compare(tmp_path, undrawn):
    arms = {"pool": 9.0, "warp": 7.5, "align": 3.0}
    folder = write_fake_sweep(tmp_path / "other", arms=arms, seeds=(0, 1), images=20)
    write_report(folder, reference="pool")
    report = text(folder, "report.md")
    assert "RoIAlign in the place of RoIPool gains" in report, "warp gains less"
    p, corrected = (float(table(folder, "main")["align"][name]) for name in ("p", "p, Holm"))
    assert f"2 seeds, paired, the largest of 2 differences, p = {corrected:.3f} with Holm's correction)" in report and corrected > 1.5 * p


def test_the_headline_says_that_no_seed_is_common(tmp_path, undrawn):
    arms, missing = {"align": 3.0, "pool": 7.5}, ["align_seed1", "pool_seed0"]
    folder = write_fake_sweep(tmp_path / "apart", arms=arms, seeds=(0, 1), images=10, missing=missing)
    write_report(folder)
    report = text(folder, "report.md")
    assert (
        "RoIAlign reaches" in report and "No other operator has a seed in common with it." in report and "no other operator" not in report
    )


def test_the_headline_of_an_unfinished_sweep_is_of_the_seeds_that_both_arms_have(tmp_path, undrawn):
    folder = write_fake_sweep(tmp_path / "part", arms={"align": 3.0, "pool": 7.5}, seeds=(0, 1), images=20, missing=["pool_seed1"])
    write_report(folder)
    ap = {arm: json.loads((folder / f"{arm}_seed0" / "metrics.json").read_text())["stats"]["AP"] for arm in ("pool", "align")}
    report = text(folder, "report.md")
    assert f"costs {ap['align'] - ap['pool']:.1f} points of AP" in report
    assert f"{ap['pool']:.1f} against {ap['align']:.1f} (1 seed, paired)" in report


def test_an_operator_of_another_project_is_not_drawn_as_exact():
    theirs, exact, rounded = (arm_style(one, LIGHT) for one in (None, ops.prroi_pool, partial(ops.lattice_pool, quantize_roi="round")))
    assert (theirs.colour, exact.colour, rounded.colour) == (LIGHT.unknown, LIGHT.exact, LIGHT.rounded)
    assert theirs.marker not in (exact.marker, rounded.marker)


def test_predictions_stand_beside_what_was_measured(sweep):
    """From align's own detections: an exact operator is predicted to lose nothing, a rounded one more with each edge."""
    predicted = table(sweep, "predicted")
    assert list(predicted) == [arm for arm in SCATTER if arm != "align"]
    cost = {arm: float(row["predicted AP"]) for arm, row in predicted.items()}
    assert cost["align_max"] == cost["prroi"] == pytest.approx(0, abs=1e-6)
    assert cost["pool_floor"] < cost["warp"] < cost["pool_bins"] < -1
    assert float(predicted["warp"]["measured AP"]) == pytest.approx(float(table(sweep, "main")["warp"]["AP - align"]))
    assert float(predicted["warp"]["error"]) == pytest.approx(cost["warp"] - float(predicted["warp"]["measured AP"]))
    assert "## Predicted" in text(sweep, "report.md") and "Rank correlation: " in text(sweep, "report.md")


def test_a_reference_with_rounded_rois_predicts_nothing(tmp_path, undrawn):
    folder = write_fake_sweep(tmp_path / "other", arms={"warp": 5.0, "pool": 7.5}, seeds=(0,), images=10)
    write_report(folder, reference="warp")
    assert "## Predicted" not in text(folder, "report.md")


def test_without_the_reference_another_arm_takes_its_place(tmp_path, undrawn):
    folder = write_fake_sweep(tmp_path / "other", arms={"warp": 5.0, "pool": 7.5}, seeds=(0, 1), images=10)
    write_report(folder)
    assert "There is no finished run of align. The others are compared with warp." in text(folder, "report.md")
    write_report(folder, reference=None)
    assert "no finished run of align" not in text(folder, "report.md"), "the first arm was meant"
    assert "RoIPool in the place of RoIWarp costs" in text(folder, "report.md")


def test_a_sweep_without_a_finished_run_is_an_error_that_says_where_to_look(tmp_path):
    folder = write_fake_sweep(tmp_path / "none", arms={"align": 3.0}, seeds=(0,), images=5, failed=["align_seed0"])
    with pytest.raises(ValueError, match=r"no finished run to report on; 1 failed, see .*align_seed0/failed\.txt"):
        write_report(folder)


def test_the_same_sweep_gives_the_same_figures(sweep):
    (seeds,) = [figure for figure in make_figures(Findings(read_sweep(sweep))) if figure.name == "seeds"]
    assert render(seeds.draw, LIGHT, "svg") == (sweep / "report" / "figures" / "seeds.svg").read_bytes()


def test_a_detector_with_a_pyramid_has_no_stride_and_no_proposals_in_its_results(tmp_path):
    folder = write_fake_sweep(
        tmp_path / "pyramid", arms={"align": 3.0, "pool": 7.5}, seeds=(0,), images=10, overrides=["detector=torchvision"]
    )
    for path in folder.glob("*/results.json"):
        results = json.loads(path.read_text())
        path.write_text(json.dumps([{key: value for key, value in result.items() if key != "proposal"} for result in results]))
    text = write_report(folder).read_text()
    assert "RoIPool in the place of RoIAlign costs" in text and "at stride" not in text
    assert "that of each map of the detector&#39;s pyramid" in text
    assert "in cells" not in text and "None" not in text
    assert "and see the same images.</p>" in text, "its proposals are its own"
