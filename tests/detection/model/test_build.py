"""Operators by name. Detectors are built in test_train_and_eval."""

import shutil

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobRuntime
from omegaconf import OmegaConf, open_dict

from roi_quantization.detection.common.configuration import CONFIGS
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.model.build import build_detector, instantiate, read_operator
from roi_quantization.detection.runs.cross_evaluation import check_operators
from tests.configuration import composed

SMALL = ["head.box_head.hidden=8", "backbone.width=0.0625"]


def test_an_operator_that_is_not_there_lists_the_choices():
    assert read_operator("pool").reduce == "max"
    with pytest.raises(ValueError, match=r"cross: there is no operator polo. Choose from align.*pool"):
        check_operators(["pool", "polo"])


def test_an_operator_may_build_on_another_file(tmp_path, monkeypatch):
    """As Hydra composes it, also inside of a script that Hydra has started."""
    configs = shutil.copytree(CONFIGS, tmp_path / "configs")
    (configs / "roi" / "align_3.yaml").write_text("defaults: [align, _self_]\nsampling_ratio: 3\n")
    monkeypatch.setattr("roi_quantization.detection.common.config_sources.CONFIGS", configs)
    assert dict(read_operator("align_3")) == dict(read_operator("align")) | {"sampling_ratio": 3}
    with initialize_config_dir(str(configs), version_base="1.3", job_name="train"):
        assert read_operator("align_3").sampling_ratio == 3
        assert JobRuntime.instance().get("name") == "train", "by which Hydra names the log of a run"
        assert compose("train", overrides=["roi=align_3"]).roi == read_operator("align_3"), "Hydra goes on as before"


def test_an_operator_that_cannot_be_made_is_found_before_training(tmp_path, monkeypatch):
    configs = shutil.copytree(CONFIGS, tmp_path / "configs")
    (configs / "roi" / "typo.yaml").write_text("_target_: roi_quantization.ops.latice_pool\n_partial_: true\n")
    monkeypatch.setattr("roi_quantization.detection.common.config_sources.CONFIGS", configs)
    with pytest.raises(InputError, match=r"cross: roi\._target_=roi_quantization\.ops\.latice_pool: .* Check the name"):
        check_operators(["typo"])


def test_a_wrong_setting_of_an_operator_is_an_input_error_before_training():
    cfg = composed("train", "roi=pool", "roi.quantize_bins=half", *SMALL)
    with pytest.raises(InputError, match="quantize_bins"):
        build_detector(cfg, num_classes=3)


@pytest.mark.parametrize(
    ("part", "override", "message"),
    [
        ("data", "+data.shuffle=false", r"^data\.shuffle: .*DetectionData has no such setting\. It has root, train, "),
        ("data", "+data.train_transform.side=3", r"^data\.train_transform\.side: .* It has short_side, max_side, flip$"),
        ("data", "+proposals.a=3", r"^proposals\.a: .*Grid has no such setting\. It has scales, aspect_ratios, step, most$"),
        ("data", "+data.train.sub=3", r"^data\.train\.sub: a split has no such setting\. It has images, annotations, part, "),
        ("data", "data.val=val", r"^data\.val=val: expected {images: <folder>, annotations: <json>}, or null"),
        ("data", "data.batch_size=0", r"^data\.batch_size=0: expected a whole number from 1 on"),
        ("data", "data.num_workers=-1", r"^data\.num_workers=-1: expected a whole number from 0 on"),
        ("data", "proposals.scales=3", r"^proposals\.scales=3: expected a list$"),
        ("data", "proposals.scales=[a]", r"^scales=\['a'\], .*: expected two lists and a number, all positive"),
        ("data", "proposals.most=a", r"^proposals\.most=a: expected a whole number$"),
        ("trainer", "+trainer.max_step=3", r"^trainer\.max_step: pytorch_lightning\.Trainer has no such setting\. It has .*max_steps"),
        ("optim", "+optim.groups.wd=3", r"^optim\.groups\.wd: .* It has lr, weight_decay, bias_lr_factor, "),
        ("head", "+head.rois=3", r"^head\.rois: .*FastRCNNHeads has no such setting\. It has .*rois_per_image"),
        ("head", "+head.extractor.scale=3", r"^head\.extractor\.scale: .* It has operator, output_size, spatial_scale$"),
        ("roi", "+roi.ratio=3", r"^roi\.ratio: .* It has (?!features).*sampling_ratio"),
        (
            "roi",
            "roi._target_=nowhere.align",
            r"^roi\._target_=nowhere\.align: No module named 'nowhere'\. Check the name, and that its module",
        ),
        ("roi", "roi._target_=torch.nn", r"^roi\._target_=torch\.nn is a module\. Expected a function or a class"),
        ("roi", "roi._target_=a..b", r"^roi\._target_=a\.\.b: .*invalid"),
    ],
)
def test_a_setting_that_is_not_there_is_named_with_those_that_are(part, override, message):
    cfg = composed("train", "run_dir=unused", override)
    with pytest.raises(InputError, match=message):
        instantiate(cfg[part])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backbone.width=a", r"^backbone\.width=a: expected a number$"),
        ("head.background_iou=0.5", r"^head\.background_iou=0\.5: expected a list$"),
        ("head.background_iou=[0.1,a]", "^head: one of its settings has the wrong type: .*str"),
        ("head.box_head.dropout=a", r"^head\.box_head\.dropout=a: expected a number$"),
        ("head.append_ground_truth=yes", r"^head\.append_ground_truth=yes: expected true or false$"),
    ],
)
def test_a_setting_of_the_wrong_type_is_an_input_error(override, message):
    with pytest.raises(InputError, match=message):
        build_detector(composed("train", *SMALL, override), num_classes=3)


def test_any_setting_goes_where_the_target_takes_any():
    node = OmegaConf.create(
        {"a": {"_target_": "builtins.dict", "b": 1}, "c": [{"_target_": "tests.detection.model.test_build.takes_any", "d": 2}]}
    )
    assert instantiate(node) == {"a": {"b": 1}, "c": [{"d": 2}]}
    node = OmegaConf.create({"_target_": "builtins.dict", "_recursive_": False, "b": {"_target_": "not.there"}})
    assert instantiate(node)["b"]["_target_"] == "not.there"


def test_a_module_that_fails_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "fails_at_import.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="ZeroDivisionError") as raised:
        instantiate(OmegaConf.create({"_target_": "fails_at_import.f"}))
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def takes_any(**settings):
    return settings


def test_a_mistake_in_somebodys_own_operator_stays_as_it_is():
    cfg = composed("train", *SMALL)
    with open_dict(cfg):
        cfg.roi = {"_target_": "tests.detection.model.test_build.broken_operator"}
    with pytest.raises(ValueError, match="a mistake") as raised:
        build_detector(cfg, num_classes=3)
    assert not isinstance(raised.value, InputError)


def broken_operator():
    raise ValueError("a mistake")
