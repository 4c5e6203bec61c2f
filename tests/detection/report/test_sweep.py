"""A sweep's folder as a killed, failed or renamed run leaves it."""

import json
import shutil

import pytest
from omegaconf import OmegaConf

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.data.coco import CocoDetection
from roi_quantization.detection.data.proposals.grid import Grid
from roi_quantization.detection.evaluation.coco import evaluate, write_metrics, write_results
from roi_quantization.detection.evaluation.sizes import RESIZE
from roi_quantization.detection.report.sweep import read_sweep
from tests.detection.evaluation.coco_sets import annotation, coco, result


@pytest.fixture
def sweep(tmp_path):
    """Two arms, seeds 0 and 1: pool_seed1 failed, and Hydra's plan has a third arm that was never begun."""
    gt = coco(annotation(1, id=1), annotation(2, id=2), images=(1, 2, 3))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.json").write_text(json.dumps(gt.dataset))
    folder = tmp_path / "sweep"
    found = {"align_seed0": [1, 2], "align_seed1": [1, 2], "pool_seed0": [1], "pool_seed1": None}
    for name, ids in found.items():
        arm, seed = name.split("_seed")
        make_run(folder / name, tmp_path / "data", arm, int(seed))
        if ids is None:
            (folder / name / "failed.txt").write_text("Traceback ...\nMemoryError: too large\n")
            continue
        results = [result(i, proposal=[0, 0, 90, 90]) for i in ids]
        write_results(folder / name / "results.json", results)
        write_metrics(folder / name / "metrics.json", evaluate(gt, results, [1, 2, 3]))
    (folder / "multirun.yaml").write_text(
        "hydra: {sweeper: {params: {roi: 'align,pool,warp', seed: '0,1,2'}}, overrides: {task: ['experiment=q', 'seed=range(0,2)']}}"
    )
    (folder / ".submitit").mkdir()  # not a run
    return folder


def make_run(folder, root, arm, seed, **data):
    folder.mkdir(parents=True)
    data = {
        "root": str(root), "val": None, "test": {"images": "test", "annotations": "test.json"},
        "subset": None, "ids": None, "subset_seed": 0, 
        "eval_transform": {"_target_": RESIZE, "short_side": None, "max_side": None},
    } | data  # fmt: skip
    OmegaConf.save({"arm": arm, "seed": seed, "backbone": {"stride": 16}, "data": data, "trainer": {}}, folder / "config.yaml")


def names(runs):
    return [run.folder.name for run in runs]


def test_finished_failed_and_missing(sweep):
    read = read_sweep(sweep)
    assert names(read.finished) == ["align_seed0", "align_seed1", "pool_seed0"]
    assert names(read.failed) == ["pool_seed1"]
    assert "MemoryError" in read.failed[0].error
    assert read.missing == (("warp", 0), ("warp", 1))
    assert (read.arms, read.seeds) == (("align", "pool", "warp"), (0, 1))  # seeds: the command line goes before the experiment


def test_values_are_what_statistics_take(sweep):
    share = 100 * 51 / 101  # one of two objects: 51 of the 101 recall levels
    assert read_sweep(sweep).values("AP75") == {"align": {0: pytest.approx(100), 1: pytest.approx(100)}, "pool": {0: pytest.approx(share)}}
    with pytest.raises(InputError, match=r"metrics\.json has no mAP, only AP, "):
        read_sweep(sweep).values("mAP")


def test_a_run_that_was_killed_is_missing(sweep):
    (sweep / "align_seed1" / "metrics.json").unlink()
    assert read_sweep(sweep).missing == (("align", 1), ("warp", 0), ("warp", 1))


def test_a_run_that_failed_and_was_run_again_is_finished(sweep):
    (sweep / "align_seed0" / "failed.txt").write_text("of the first attempt")
    read = read_sweep(sweep)
    assert "align_seed0" in names(read.finished)
    assert names(read.failed) == ["pool_seed1"]


def test_without_a_plan_the_folders_are_the_plan(sweep):
    (sweep / "multirun.yaml").unlink()
    read = read_sweep(sweep)
    assert (read.arms, read.seeds, read.missing) == (("align", "pool"), (0, 1), ())
    planned = read_sweep(sweep, planned=[("pool", 0), ("pool", 2), ("align", 0), ("10", 5)])
    assert planned.arms == ("pool", "align", "10") and planned.seeds == (0, 2, 5, 1)
    assert planned.missing == (("pool", 2), ("10", 5)), "not each arm with each seed"


def test_a_number_is_the_name_of_an_arm(sweep):
    (sweep / "align_seed0").rename(sweep / "10_seed0")
    path = sweep / "10_seed0" / "config.yaml"
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(path), {"arm": 10}), path)
    assert read_sweep(sweep).run("10", 0).stride == 16
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(path), {"arm": 11}), path)
    with pytest.raises(ValueError, match="has arm=11, but the folder says 10"):
        _ = read_sweep(sweep).run("10", 0).stride


def test_seeds_of_an_arm_that_were_trained_otherwise_are_named(sweep):
    assert read_sweep(sweep).differing_seeds == {}
    path = sweep / "align_seed1" / "config.yaml"
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(path), {"trainer": {"max_epochs": 8}}), path)
    assert read_sweep(sweep).differing_seeds == {"align": "trainer.max_epochs was not there and is 8 (seed 0 and seed 1)"}


@pytest.mark.parametrize("newer", [["align_seed0", "align_seed1"], ["align_seed0"], ["pool_seed0"]])
def test_runs_of_two_versions_differ_in_no_setting_that_was_added(sweep, newer):
    """Arms and seeds come in their own order, whichever is of the newer version."""
    for name in newer:
        path = sweep / name / "config.yaml"
        OmegaConf.save(OmegaConf.merge(OmegaConf.load(path), {"init_from": None, "data": {"classes": None}}), path)
    assert read_sweep(sweep).differing_settings == read_sweep(sweep).differing_seeds == {}
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(path), {"init_from": "best.ckpt"}), path)
    assert read_sweep(sweep).differing_settings or read_sweep(sweep).differing_seeds, "another value is a difference"


def test_a_run_knows_its_stride_results_and_other_operators(sweep):
    run = read_sweep(sweep).run("pool", 0)
    assert run.stride == 16
    assert run.results()[0]["proposal"] == [0, 0, 90, 90]
    assert run.cross() == {}
    metrics = json.loads((run.folder / "metrics.json").read_text())
    (run.folder / "cross.json").write_text(json.dumps({"align": metrics}))
    assert run.cross()["align"].stats["AP"] == run.metrics.stats["AP"]
    with pytest.raises(KeyError, match="no run pool_seed9"):
        read_sweep(sweep).run("pool", 9)


FINISHED = ("align_seed0", "align_seed1", "pool_seed0")


def change_config(sweep, *names, **data):
    for name in names:
        config = OmegaConf.merge(OmegaConf.load(sweep / name / "config.yaml"), {"data": data})
        OmegaConf.save(config, sweep / name / "config.yaml")


def change_metrics(sweep, *names, **values):
    for name in names:
        path = sweep / name / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_annotations_are_of_the_evaluated_images(sweep):
    """Those in metrics.json, though the configuration would choose others today."""
    change_config(sweep, *FINISHED, ids=[2])
    assert sorted(read_sweep(sweep).annotations.imgs) == [1, 2, 3]
    change_metrics(sweep, *FINISHED, image_ids=[1, 3])
    assert sorted(read_sweep(sweep).annotations.imgs) == [1, 3]
    change_metrics(sweep, "pool_seed0", image_ids=[1, 2])
    with pytest.raises(
        ValueError, match=r"images \(align_seed0: 2 of 3 .*, image 3 among them; pool_seed0: 2 of 3 .*, image 2 among them\)"
    ):
        _ = read_sweep(sweep).annotations
    change_metrics(sweep, *FINISHED, image_ids=[1, 7])
    with pytest.raises(ValueError, match=r"test\.json lacks 1 of the 2 images .* the first is image 7\. Restore"):
        _ = read_sweep(sweep).annotations


def test_where_a_run_of_an_earlier_version_names_no_images_its_configuration_does(sweep):
    change_metrics(sweep, *FINISHED, image_ids=None)
    change_config(sweep, *FINISHED, ids=[1, 3])
    assert sorted(read_sweep(sweep).annotations.imgs) == [1, 3]
    change_config(sweep, "pool_seed0", ids=[1])
    with pytest.raises(ValueError, match="evaluated on different images"):
        _ = read_sweep(sweep).annotations


def test_annotations_are_of_the_chosen_classes(sweep, tmp_path):
    path = tmp_path / "data" / "test.json"
    instances = json.loads(path.read_text())
    chosen, other = instances["categories"][0], {"id": 77, "name": "other"}
    added = instances["annotations"][0] | {"id": 9, "category_id": 77}
    path.write_text(json.dumps(instances | {"categories": [chosen, other], "annotations": [*instances["annotations"], added]}))
    change_config(sweep, *FINISHED, classes=[chosen["name"]])
    annotations = read_sweep(sweep).annotations
    assert list(annotations.cats) == [chosen["id"]] and sorted(annotations.anns) == [1, 2]
    change_config(sweep, "pool_seed0", classes=["other"])
    with pytest.raises(ValueError, match=r"different classes \(align_seed0: .*; pool_seed0: \['other'\]\)"):
        _ = read_sweep(sweep).annotations


def test_data_may_be_moved_during_a_sweep_and_not_be_others(sweep, tmp_path):
    other = shutil.copytree(tmp_path / "data", tmp_path / "moved")
    change_config(sweep, "pool_seed0", root=str(other))
    assert sorted(read_sweep(sweep).annotations.imgs) == [1, 2, 3]
    instances = json.loads((other / "test.json").read_text())
    instances["annotations"].pop()
    (other / "test.json").write_text(json.dumps(instances))
    with pytest.raises(ValueError, match=r"different annotations \(align_seed0: .*/data/test\.json; pool_seed0: .*/moved/test\.json\)"):
        _ = read_sweep(sweep).annotations
    shutil.rmtree(tmp_path / "data")
    assert len(read_sweep(sweep).annotations.anns) == 1, "Findings compares the metrics"


def test_annotations_are_of_the_part_that_was_held_out(sweep, tmp_path):
    part = [0.0, 0.67]
    change_metrics(sweep, *FINISHED, image_ids=None)
    for name in ("align_seed0", "align_seed1", "pool_seed0"):
        config = OmegaConf.load(sweep / name / "config.yaml")
        config.data.test.part = part
        OmegaConf.save(config, sweep / name / "config.yaml")
    (tmp_path / "data/test").mkdir()
    for image in range(1, 4):
        (tmp_path / f"data/test/{image}.jpg").touch()
    evaluated = CocoDetection(tmp_path / "data/test", tmp_path / "data/test.json", Grid([0.5]), part=part)
    assert sorted(read_sweep(sweep).annotations.imgs) == evaluated.image_ids
    assert len(evaluated.image_ids) == 2


def test_data_without_a_test_split_was_evaluated_on_val(sweep):
    for name in ("align_seed0", "align_seed1", "pool_seed0"):
        config = OmegaConf.load(sweep / name / "config.yaml")
        config.data.val, config.data.test = config.data.test, None
        OmegaConf.save(config, sweep / name / "config.yaml")
    assert sorted(read_sweep(sweep).annotations.imgs) == [1, 2, 3]


def test_scales_of_resized_images(sweep):
    change_config(sweep, "align_seed0", eval_transform={"short_side": 960})  # of images of 640 x 480
    read = read_sweep(sweep)
    assert read.scales(read.run("align", 0)) == {1: 2.0, 2: 2.0, 3: 2.0}
    assert read.scales(read.run("pool", 0)) is None
    assert read.differing_geometry == {"data.eval_transform.short_side": ["960", "None"]}


# --- errors name the file


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_sweep(tmp_path / "nowhere")


def test_an_empty_sweep_can_be_read(tmp_path):
    read = read_sweep(tmp_path)
    assert (read.runs, read.missing, read.values("AP")) == ((), (), {})
    with pytest.raises(ValueError, match="no finished run"):
        _ = read.annotations


@pytest.mark.parametrize(
    "content",
    [
        '{"stats": {"AP": 1',
        "[]",
        '{"stats": {}}',
        '{"stats": {"AP": 1, "AP50": 1}, "per_class": {}}',
        '{"stats": {"AP": "high"}, "per_class": {}}',
    ],
)
def test_broken_metrics(sweep, content):
    (sweep / "pool_seed0" / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r"pool_seed0/metrics\.json"):
        read_sweep(sweep)


@pytest.mark.parametrize("content", ["", "arm: pool\nseed: 0\ndata: {root", "arm: pool\nseed: 0\ndata: {root: x}\n", "- 1", "\0"])
def test_broken_configurations(sweep, content):
    (sweep / "pool_seed0" / "config.yaml").write_text(content)
    with pytest.raises(InputError, match=r"pool_seed0/config\.yaml"):
        _ = read_sweep(sweep).run("pool", 0).config
    (sweep / "multirun.yaml").write_text("hydra: {sweeper")
    with pytest.raises(InputError, match=r"multirun\.yaml is not a YAML file, or was truncated"):
        read_sweep(sweep)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (5, "result 1 is a int"),
        (result(2, score="0.9"), "result 1 has score '0.9'; expected a number"),
        (result(2, proposal=[0, 0, 9]), r"result 1 has proposal \[0, 0, 9\]; expected four numbers"),
    ],
)
def test_broken_results(sweep, broken, words):
    path = sweep / "pool_seed0" / "results.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), broken]))
    with pytest.raises(InputError, match=rf"pool_seed0/results\.json: {words}"):
        read_sweep(sweep).run("pool", 0).results()


def test_a_run_that_was_renamed(sweep):
    (sweep / "pool_seed0").rename(sweep / "warp_seed0")
    with pytest.raises(ValueError, match=r"warp_seed0/config\.yaml has arm=pool, but the folder says warp"):
        _ = read_sweep(sweep).run("warp", 0).stride


def test_a_run_that_was_never_named_may_be_put_into_a_sweep(sweep):
    config = OmegaConf.load(sweep / "pool_seed0" / "config.yaml")
    OmegaConf.save({**config, "arm": None}, sweep / "pool_seed0" / "config.yaml")
    assert read_sweep(sweep).run("pool", 0).stride == 16


def test_files_that_a_finished_run_should_have(sweep):
    run = read_sweep(sweep).run("pool", 0)
    (run.folder / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"pool_seed0/results\.json"):
        run.results()
    (run.folder / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"pool_seed0/config\.yaml"):
        _ = run.stride
