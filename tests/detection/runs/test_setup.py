"""Settings are checked before anything is written."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.runs.setup import check_added_keys, set_up_run
from tests.configuration import ROOT, composed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=null"], r"seed=None: expected an integer from 0 to 4294967295"),
        (["seed=-1"], r"seed=-1: expected an integer"),
        (["seed=4294967296"], r"seed=4294967296: expected an integer"),
        (["seed=1.5"], r"seed=1\.5: expected an integer"),
        (["seed=true"], r"seed=True: expected an integer"),
        (["data.seed=-1"], r"data\.seed=-1: expected an integer"),
        (["data.subset_seed=null"], r"data\.subset_seed=None: expected an integer"),
        (["data.source.seed=some"], r"data\.source\.seed=some: expected an integer"),
        (["threads=x"], r"threads=x: expected a whole number from 1 on"),
        (["threads=0"], r"threads=0: expected a whole number from 1 on"),
        (["trainer.max_steps=a"], r"trainer\.max_steps=a: expected a whole number"),
        (["coco_eval.areas=3"], r"coco_eval\.areas=3: expected a list"),
        (["head.nms_threshold=a"], r"head\.nms_threshold=a: expected a number"),
        (["+head.rois=3"], r"head\.rois: .* has no such setting"),
        (["~data"], r"data: nothing is chosen\. Choose a file of configs/data with data=<name>"),
        (["~optim"], r"optim: nothing is chosen"),
        (["~coco_eval"], r"coco_eval: nothing is chosen"),
    ],
)
def test_a_setting_that_nothing_can_run_with_is_named(tmp_path, overrides, message):
    cfg = composed("train", "trainer=cpu", f"run_dir={tmp_path / 'run'}", *overrides)
    with pytest.raises(InputError, match=message):
        set_up_run(cfg, groups=("optim", "coco_eval"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("overrides", [["~average"], ["~logger"], ["seed=4294967295"]])
def test_what_can_be_left_out_is_left_out(tmp_path, overrides, threads_as_before):
    run_dir = set_up_run(composed("train", "trainer=cpu", f"run_dir={tmp_path / 'run'}", *overrides), groups=("optim", "coco_eval"))
    assert run_dir == tmp_path / "run" and not list(run_dir.iterdir()), "config.yaml comes once nothing is missing to begin"


@pytest.mark.parametrize("override", ["+max_epochs=4", "++max_epochs=4", "+foo.bar=1", "+checkpoint.every=5"])
def test_a_key_that_nothing_reads_is_refused(override):
    with pytest.raises(InputError, match=r"nothing reads .* --help"):
        check_added_keys(composed("train", override), [override], "train")


@pytest.mark.parametrize("overrides", [["+trainer.max_time=1"], ["+rate=1e-3", "optim.groups.lr=${rate}"], ["average=ema"], ["seed=1"]])
def test_a_key_that_something_reads_is_added(overrides):
    check_added_keys(composed("train", *overrides), overrides, "train")


def test_another_working_folder_is_refused(tmp_path, monkeypatch):
    """Relative paths, such as that of a checkpoint, would mean other files there."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=["hydra.job.chdir=true", f"run_dir={tmp_path / 'run'}"], return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    HydraConfig.instance().set_config(cfg)
    with pytest.raises(InputError, match=r"hydra\.job\.chdir=true: paths are relative to the folder of the command"):
        set_up_run(composed("train", "trainer=cpu", f"run_dir={tmp_path / 'run'}"))
