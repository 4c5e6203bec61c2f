"""What is computed of a sweep's runs, and which runs are not put together."""

import json
import shutil

import pytest
from omegaconf import OmegaConf

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.report import write_report
from roi_quantization.detection.report.figures import plot_factorial
from roi_quantization.detection.report.findings import Findings
from roi_quantization.detection.report.prose import cost_breakdown
from roi_quantization.detection.report.sweep import read_sweep
from roi_quantization.detection.report.tables import costs_table, main_table, predicted_table
from tests.detection.report.fake_sweep import text, write_fake_sweep


def test_annotations_that_changed_since_the_runs_are_refused(tmp_path):
    """metrics.json would have the old ones, and all that is computed from the detections the new ones."""
    folder = write_fake_sweep(tmp_path / "changed", arms={"align": 3.0}, seeds=(0,), images=10)
    path = tmp_path / "changed_data/annotations/instances_test.json"
    instances = json.loads(path.read_text())
    instances["annotations"][0]["bbox"][0] += 30
    path.write_text(json.dumps(instances))
    with pytest.raises(
        InputError, match=r"align_seed0: AP50 was [\d.]+ in metrics\.json, and results\.json has [\d.]+ with the annotations"
    ):
        Findings(read_sweep(folder))


@pytest.mark.parametrize(
    ("change", "words"), [({"category_id": 99}, "result 0 has category_id 99"), ({"proposal": None}, "1 of .* results have no proposal")]
)
def test_results_that_do_not_fit_are_named(tmp_path, change, words):
    folder = write_fake_sweep(tmp_path / "damaged", arms={"align": 3.0}, seeds=(0,), images=6)
    path = folder / "align_seed0" / "results.json"
    first, *others = json.loads(path.read_text())
    path.write_text(json.dumps([{key: value for key, value in (first | change).items() if value is not None}, *others]))
    with pytest.raises(InputError, match=rf"align_seed0/results\.json: {words}"):
        Findings(read_sweep(folder))


def test_classes_that_were_not_chosen_are_no_missed_objects(tmp_path):
    folder = write_fake_sweep(tmp_path / "chosen", arms={"align": 3.0, "pool": 7.5}, seeds=(0,), images=20)
    path = tmp_path / "chosen_data/annotations/instances_test.json"
    instances = json.loads(path.read_text())
    other = [one | {"id": one["id"] + 1000, "category_id": 9} for one in instances["annotations"]]
    instances["categories"].append({"id": 9, "name": "other"})
    path.write_text(json.dumps(instances | {"annotations": instances["annotations"] + other}))
    for run in folder.glob("*_seed0"):
        config = OmegaConf.load(run / "config.yaml")
        config.data.classes = ["disc", "ring", "square"]
        OmegaConf.save(config, run / "config.yaml")
    findings = Findings(read_sweep(folder))
    for run in findings.sweep.finished:
        assert findings.means["AP"][run.arm].value == pytest.approx(run.metrics.stats["AP"])


def test_costs_are_all_else_equal_only_where_it_is(tmp_path):
    arms = {"align_max": 3.0, "warp_max": 6.0, "pool_bins": 4.0, "pool_exclusive": 7.0}
    folder = write_fake_sweep(tmp_path / "costs", arms=arms, seeds=(0, 1), images=6)
    findings = Findings(read_sweep(folder), "align_max")
    assert findings.is_controlled and cost_breakdown(findings).startswith("With all else equal, rounding the RoI alone costs ")
    assert costs_table(findings).title == "What each quantization costs, all else equal"
    both = {seed: findings.values["AP"]["align_max"][seed] - findings.values["AP"]["pool_exclusive"][seed] for seed in (0, 1)}
    assert findings.costs["AP"]["both"].value == pytest.approx(sum(both.values()) / 2)
    shutil.move(folder / "warp_max_seed1", tmp_path)
    findings = Findings(read_sweep(folder), "align_max")
    costs, means = findings.costs["AP"], findings.means_of_costs["AP"]
    assert means["align_max"].value - means["pool_exclusive"].value == pytest.approx(both[0]), "the figure and the table agree"
    for words in (costs_table(findings).note, plot_factorial(findings).caption, cost_breakdown(findings)):
        assert ", of the one seed of 2 that all four operators have." in words
    assert {cost.n for cost in costs.values()} == {1} and costs["both"].value == pytest.approx(both[0]), "of the seeds that all four have"
    assert costs["both"].value == pytest.approx(sum(costs[name].value for name in ("projection", "bins", "interaction")))
    shutil.move(tmp_path / "warp_max_seed1", folder)
    for seed in (0, 1):
        path = folder / f"align_max_seed{seed}" / "config.yaml"
        config = OmegaConf.load(path)
        config.optim.groups.lr = 0.1
        OmegaConf.save(config, path)
    findings = Findings(read_sweep(folder), "align_max")
    assert not findings.is_controlled and cost_breakdown(findings).startswith("Rounding the RoI alone costs ")
    assert costs_table(findings).title == "What each quantization costs"
    assert "the runs differ in more than the operator" in main_table(findings).note


@pytest.mark.filterwarnings("error")
def test_a_reference_with_more_seeds_says_that_a_difference_is_of_fewer(tmp_path):
    arms = {"align": 3.0, "warp": 7.0, "pool": 9.0}
    findings = Findings(read_sweep(write_fake_sweep(tmp_path / "made_up", arms=arms, missing=["warp_seed2"], images=10)))
    means, warp = findings.means["AP"], findings.differences["AP"]["warp"]
    assert warp.value != pytest.approx(means["warp"].value - means["align"].value), "of two seeds and of three"
    assert "Of fewer seeds, those of both operators: warp 2." in main_table(findings).note


def test_data_that_changed_from_one_run_to_another_are_told(tmp_path, undrawn):
    folder = write_fake_sweep(tmp_path / "sweep", arms={"align": 3.0, "pool": 9.0}, seeds=(0, 1), images=6)
    runs = sorted(folder.glob("*_seed*"))
    for run in runs:
        (run / "data.json").write_text(json.dumps({"train": "a", "test": "b"}))
    assert Findings(read_sweep(folder)).is_controlled
    (runs[-1] / "data.json").write_text(json.dumps({"train": "c", "test": "b"}))
    assert read_sweep(folder).changed_data == ["train"] and not Findings(read_sweep(folder)).is_controlled
    write_report(folder)
    assert "Images, annotations or proposals (train) changed from one run to another." in text(folder, "report.md")
    config = OmegaConf.load(runs[-1] / "config.yaml")
    config.data.train.subset = 5
    OmegaConf.save(config, runs[-1] / "config.yaml")
    assert read_sweep(folder).changed_data == [], "other settings of the data are told by themselves"


def test_a_prediction_is_of_the_seeds_that_were_measured(tmp_path):
    arms = {"align": 3.0, "pool": 9.0, "warp": 7.0}
    folder = write_fake_sweep(tmp_path / "sweep", arms=arms, missing=["pool_seed1"], seeds=(0, 1), images=12)
    predicted = Findings(read_sweep(folder)).predicted
    shutil.rmtree(folder / "align_seed1")
    shutil.rmtree(folder / "warp_seed1")
    of_seed_0 = Findings(read_sweep(folder)).predicted
    assert predicted["pool"] == pytest.approx(of_seed_0["pool"]) and predicted["warp"] != pytest.approx(of_seed_0["warp"])


def test_equal_predictions_have_no_rank(tmp_path):
    arms = {"align": 3.0, "align_max": 3.2, "prroi": 3.4, "align_adaptive": 3.6}
    findings = Findings(read_sweep(write_fake_sweep(tmp_path / "equal", arms=arms, seeds=(0,), images=6)))
    note = predicted_table(findings).note
    assert "Mean absolute error in AP" in note and "Rank correlation" not in note


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("backbone.stride", 32, "backbone.stride (16 or 32)"),
        ("data.eval_transform.short_side", 512, "data.eval_transform.short_side (None or 512)"),
        ("head.extractor.output_size", 14, "head.extractor.output_size (7 or 14)"),
    ],
)
def test_of_runs_with_other_cells_only_what_does_not_depend_on_them_is_reported(tmp_path, monkeypatch, key, value, words):
    monkeypatch.setattr("roi_quantization.detection.report.write.render", lambda *_, **__: b"<svg/>")
    folder = write_fake_sweep(tmp_path / "mixed", arms={"align": 3.0, "pool": 7.5}, seeds=(0,), images=10)
    assert Findings(read_sweep(folder)).predicted["pool"]["AP"] < 0, "what is left out below"
    config = OmegaConf.load(folder / "pool_seed0" / "config.yaml")
    OmegaConf.update(config, key, value)
    OmegaConf.save(config, folder / "pool_seed0" / "config.yaml")
    findings = Findings(read_sweep(folder))
    assert findings.misalignment == findings.predicted == {}
    assert findings.stride == (None if value == 32 else 16) and bool(findings.by_cells["pool"]) == (value != 32)
    write_report(folder)
    report = (folder / "report" / "report.md").read_text()
    assert f"The runs differ in {words}, so that differences are not those of the operators alone" in report
    assert ("at stride" in report) == (value != 32) and ("stride: 16 pixels per cell or 32 pixels per cell" in report) == (value == 32)
