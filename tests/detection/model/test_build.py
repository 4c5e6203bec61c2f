"""Operators by name. Detectors are built in test_train_and_eval."""

import shutil

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobRuntime
from omegaconf import open_dict

from roi_quantization.detection.common.configuration import CONFIGS
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.model.build import build_detector, read_operator
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
    with pytest.raises(ImportError, match="latice_pool"):
        check_operators(["typo"])


def test_a_wrong_setting_of_an_operator_is_an_input_error_before_training():
    cfg = composed("train", "roi=pool", "roi.quantize_bins=half", *SMALL)
    with pytest.raises(InputError, match="quantize_bins"):
        build_detector(cfg, num_classes=3)


def test_a_mistake_in_somebodys_own_operator_stays_as_it_is():
    cfg = composed("train", *SMALL)
    with open_dict(cfg):
        cfg.roi = {"_target_": "tests.detection.model.test_build.broken_operator"}
    with pytest.raises(ValueError, match="a mistake") as raised:
        build_detector(cfg, num_classes=3)
    assert not isinstance(raised.value, InputError)


def broken_operator():
    raise ValueError("a mistake")
