"""Operators by name. Detectors are built in test_train_and_eval."""

import shutil

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobRuntime

from roi_quantization.detection.configuration import CONFIGS
from roi_quantization.detection.model.build import read_operator
from roi_quantization.detection.runs.cross_evaluation import check_operators


def test_an_operator_that_is_not_there_lists_the_choices():
    assert read_operator("pool").reduce == "max"
    with pytest.raises(ValueError, match=r"cross: there is no operator polo. Choose from align.*pool"):
        check_operators(["pool", "polo"])


def test_an_operator_may_build_on_another_file(tmp_path, monkeypatch):
    """As Hydra composes it, also inside of a script that Hydra has started."""
    configs = shutil.copytree(CONFIGS, tmp_path / "configs")
    (configs / "roi" / "align_3.yaml").write_text("defaults: [align, _self_]\nsampling_ratio: 3\n")
    monkeypatch.setattr("roi_quantization.detection.model.build.CONFIGS", configs)
    assert dict(read_operator("align_3")) == dict(read_operator("align")) | {"sampling_ratio": 3}
    with initialize_config_dir(str(configs), version_base="1.3", job_name="train"):
        assert read_operator("align_3").sampling_ratio == 3
        assert JobRuntime.instance().get("name") == "train", "by which Hydra names the log of a run"
        assert compose("train", overrides=["roi=align_3"]).roi == read_operator("align_3"), "Hydra goes on as before"


def test_an_operator_that_cannot_be_made_is_found_before_training(tmp_path, monkeypatch):
    configs = shutil.copytree(CONFIGS, tmp_path / "configs")
    (configs / "roi" / "typo.yaml").write_text("_target_: roi_quantization.ops.latice_pool\n_partial_: true\n")
    monkeypatch.setattr("roi_quantization.detection.model.build.CONFIGS", configs)
    with pytest.raises(ImportError, match="latice_pool"):
        check_operators(["typo"])
