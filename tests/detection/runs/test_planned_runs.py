"""The runs that a sweep is going to make, before any is made: their folders, their arms, and what is there already."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.data.data_fingerprint import DataFingerprint
from roi_quantization.detection.model.build import instantiate
from roi_quantization.detection.report.origin import read_origin
from roi_quantization.detection.runs.planned_runs import check_arms, check_configuration, check_data, planned_runs, record_origin
from tests.configuration import ROOT, composed
from tests.trainings import TINY


def test_planning_a_sweep_leaves_what_hydra_knows_of_this_process(tmp_path):
    overrides = ["experiment=quantization_core", "roi=align,pool", "seed=5", f"data.root={tmp_path}"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = GlobalHydra.instance().config_loader().load_configuration("train", overrides, RunMode.MULTIRUN)
        before = HydraConfig.instance().cfg
        runs = planned_runs(config)
    assert HydraConfig.instance().cfg is before
    folder = Path("runs/quantization_embedded_stride16")
    assert {run_dir: (run["arm"], run["run_dir"]) for run_dir, run in runs.items()} == {
        folder / f"{arm}_seed5": (arm, str(folder / f"{arm}_seed5")) for arm in ("align", "pool")
    }


def test_an_interpolated_name_of_an_arm_has_the_value_of_each_run(tmp_path):
    overrides = ["experiment=quantization_core", "roi=align", "seed=5", "trainer.max_steps=10,20", "arm=steps${trainer.max_steps}"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        runs = planned_runs(GlobalHydra.instance().config_loader().load_configuration("train", overrides, RunMode.MULTIRUN))
    assert [(run_dir.name, run["trainer"]["max_steps"]) for run_dir, run in runs.items()] == [("steps10_seed5", 10), ("steps20_seed5", 20)]


def test_the_folder_of_a_backbone_of_ones_own_has_its_name(tmp_path):
    """Its configuration need not say the stride."""
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone/own.yaml").write_text("_target_: my.backbone\n")
    overrides = ["experiment=quantization_core", "roi=align", "seed=5", "backbone=own", f"hydra.searchpath=['file://{tmp_path}']"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        runs = planned_runs(GlobalHydra.instance().config_loader().load_configuration("train", overrides, RunMode.MULTIRUN))
    assert list(runs) == [Path("runs/quantization_embedded_stride_of_own/align_seed5")]
    for path in (ROOT / "configs/experiment").glob("*.yaml"):
        assert "${backbone.stride}" not in path.read_text(), f"{path.name} needs a backbone whose configuration has a stride"


def test_an_arm_is_a_part_of_the_name_of_a_folder():
    overrides = ["experiment=quantization_core", "roi=align", "seed=5", "arm=some/align"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"), pytest.raises(InputError, match=r"^arm=some/align is a part of"):
        planned_runs(GlobalHydra.instance().config_loader().load_configuration("train", overrides, RunMode.MULTIRUN))


def test_places_may_differ_settings_may_not(tmp_path):
    found = {"run_dir": "/elsewhere", "optimized_metric": "val/AP", "optim": {"lr": 0.1}, "data": {"root": "/there", "subset": None}}
    OmegaConf.save(OmegaConf.create(found), tmp_path / "config.yaml")
    check_configuration(tmp_path, found | {"run_dir": "here", "data": {"root": "/here", "subset": None}})
    with pytest.raises(ValueError, match=r"cross was not there and is \['pool'\]; data.subset was None and is 5\. Choose another folder"):
        check_configuration(tmp_path, {"optimized_metric": "val/AP", "optim": {"lr": 0.1}, "data": {"subset": 5}, "cross": ["pool"]})


def test_a_run_of_an_earlier_version_is_the_same_as_one_with_the_defaults_of_what_was_added(tmp_path):
    config = OmegaConf.to_container(composed("train", "run_dir=x", "data.root=x"), resolve=True)
    earlier = copy.deepcopy(config)
    for keys in (("init_from",), ("model",), ("data", "classes"), ("head", "box_predictor", "class_agnostic"), ("coco_eval",)):
        node = earlier
        for key in keys[:-1]:
            node = node[key]
        del node[keys[-1]]
    earlier["coco_eval"] = {"_target_": "roi_quantization.detection.evaluation.matching.SilentCOCOeval", "_partial_": True}
    OmegaConf.save(earlier, tmp_path / "config.yaml")
    check_configuration(tmp_path, config)
    config["coco_eval"]["iou_thresholds"], config["init_from"] = [0.3, 0.5], "best.ckpt"
    with pytest.raises(ValueError, match=r"init_from was not there and is best\.ckpt; coco_eval\.iou_thresholds was not there and is"):
        check_configuration(tmp_path, config)


def test_data_may_be_moved_and_not_be_others(tmp_path, caplog):
    def config(root):
        return OmegaConf.to_container(composed("train", *TINY, f"data.root={root}", f"run_dir={tmp_path / 'run'}"), resolve=True)

    here, there = tmp_path / "cats", tmp_path / "ships"
    data = instantiate(OmegaConf.create(config(here)["data"]))
    data.prepare_data()
    data.setup()
    shutil.copytree(here, there)
    OmegaConf.save(config(here), tmp_path / "config.yaml")
    caplog.clear()
    check_data({tmp_path: config(here)}, complete=False)
    assert caplog.text == "", "the same folder needs no record"
    check_data({tmp_path: config(there)}, complete=True)
    assert f"data.root={here}, and this sweep has data.root={there}. Whether these are the same data is not known" in caplog.text

    DataFingerprint(data).write(tmp_path)
    check_data({tmp_path: config(there)}, complete=True)
    check_data({tmp_path: config(here)}, complete=False)
    path = there / "annotations/instances_test.json"
    instances = json.loads(path.read_text())
    instances["annotations"][0]["bbox"][2] -= 1
    path.write_text(json.dumps(instances))
    with pytest.raises(
        InputError, match=rf"data\.root={here}, and this sweep has data\.root={there}, which has other .* \(test\)\. Choose"
    ):
        check_data({tmp_path: config(there)}, complete=True)
    shutil.copy(path, here / "annotations")
    check_data({tmp_path: config(here)}, complete=True)  # nothing is going to be trained on them
    with pytest.raises(InputError, match=rf"{here} has other .* \(test\) than when {tmp_path} was trained\. Choose"):
        check_data({tmp_path: config(here)}, complete=False)


def test_runs_of_an_arm_that_differ_in_more_than_their_seeds_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def plan(*overrides):
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            words = ["experiment=quantization_core", "roi=align", *overrides]
            return planned_runs(GlobalHydra.instance().config_loader().load_configuration("train", words, RunMode.MULTIRUN))

    ((run_dir, run),) = plan("seed=0").items()
    run_dir.mkdir(parents=True)
    OmegaConf.save(run, run_dir / "config.yaml")
    (run_dir / "metrics.json").touch()
    check_arms(plan("seed=0,1"))
    check_arms(plan("seed=1", "trainer.max_epochs=9", "arm=long"))
    with pytest.raises(InputError, match=r"align_seed0 and .*align_seed1 are runs of one arm.*: trainer\.max_epochs was 4 and is 9"):
        check_arms(plan("seed=1", "trainer.max_epochs=9"))


def test_the_origin_describes_the_data_of_each_run(tmp_path):
    runs = {}
    for images in (4, 5):
        run_dir = tmp_path / "sweep" / f"{images}_seed0"
        words = (f"data.root={tmp_path / 'data'}", f"run_dir={run_dir}", f"data.train_subset={images}", f"arm={images}")
        runs[run_dir] = OmegaConf.to_container(composed("train", *TINY, *words), resolve=True)
    record_origin(runs)
    (start,) = read_origin(tmp_path / "sweep")
    assert re.search(r"4 images.* or 5 images", start["data"]["train"]) and " or " not in start["data"]["test"]
    assert start["runs"] == [["4", 0], ["5", 0]]
