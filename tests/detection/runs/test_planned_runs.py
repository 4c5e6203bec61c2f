"""The runs that a sweep is going to make, their folders and their arms, before any is made."""

from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.runs.sweep import planned_runs
from tests.configuration import ROOT


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
