"""`~` in a setting that is a path is the home folder."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from roi_quantization.detection.common import config_sources
from roi_quantization.detection.common.config_sources import config_folders, name_config_folder
from roi_quantization.detection.common.configuration import path_setting
from roi_quantization.detection.common.errors import InputError, MissingFileError
from roi_quantization.detection.data.annotations import choose_ids
from roi_quantization.detection.data.module import DetectionData
from roi_quantization.detection.data.proposals.file import ProposalFile
from roi_quantization.detection.data.proposals.selective_search import SelectiveSearch
from roi_quantization.detection.report.sweep import _annotations_path
from roi_quantization.detection.runs.command_line import number_picture
from roi_quantization.detection.runs.composition import compose
from roi_quantization.detection.runs.frozen_features import FrozenFeatures
from roi_quantization.detection.runs.resume import checkpoint_to_resume, run_folder
from roi_quantization.roi_heads.weights import load_vgg16
from roi_quantization.scripts.eval import evaluate
from roi_quantization.scripts.predict import predict
from roi_quantization.scripts.train import train


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    yield folder
    assert not (tmp_path / "~").exists()


def test_a_path_is_expanded(home):
    assert path_setting("~/a b", "key") == str(home / "a b") and path_setting("~", "key") == str(home)
    assert path_setting("a/~", "key") == "a/~" and path_setting(2024, "key") == "2024"


def test_paths_of_data_are_expanded(home):
    data = DetectionData("~/set", {"images": "~/pictures", "annotations": "a.json"}, None, None, None)
    assert data.root == home / "set"
    assert data._path("train", "images") == home / "pictures" and data._path("train", "annotations") == home / "set/a.json"
    (home / "ids.txt").write_text("2")
    assert choose_ids([1, 2], ids="~/ids.txt") == [2]
    assert ProposalFile("~/p.npz").path == str(home / "p.npz") and ProposalFile(None).path is None
    assert SelectiveSearch("~/cache").cache.folder == home / "cache"
    assert FrozenFeatures("~/cache").cache_dir == home / "cache"
    config = {"data": {"root": "~/set", "test": None, "val": {"annotations": "a.json"}}}
    assert _annotations_path(SimpleNamespace(config=OmegaConf.create(config))) == home / "set/a.json"


def test_weights_pictures_and_configurations_are_found(home, monkeypatch):
    torch.save({"features.0.weight": torch.ones(1)}, home / "weights.pth")
    assert load_vgg16("~/weights.pth").keys() == {"features.0.weight"}
    cfg = OmegaConf.create({"picture": "~/explain.png"})
    number_picture(cfg)
    assert cfg.picture == str(home / "explain.png")
    monkeypatch.setattr(config_sources, "_named", [])
    name_config_folder("~")
    assert home in config_folders()
    with pytest.raises(MissingFileError, match=f"there is no checkpoint {home}/best.ckpt"):
        compose("eval", ckpt="~/best.ckpt")


@pytest.mark.parametrize(
    ("run", "settings"),
    [
        (train, {"arm": None, "cross": ["polo"]}),
        (evaluate, {"split": "every"}),
        (predict, {"image": "~/nothing.png"}),
    ],
)
def test_a_run_folder_is_made_at_home(home, run, settings):
    cfg = OmegaConf.create({"run_dir": "~/run", "trainer": {"enable_progress_bar": False}, **settings})
    with pytest.raises((InputError, MissingFileError)):
        run(cfg)
    assert (home / "run").is_dir() and cfg.run_dir == str(home / "run")


def test_a_run_at_home_is_resumed(home):
    (home / "best.ckpt").touch()
    assert run_folder("new", _root_=OmegaConf.create({"resume": "~/best.ckpt"})) == "new"
    with pytest.raises(SystemExit, match=f"resume={home}/run: there is no such run folder"):
        run_folder("new", _root_=OmegaConf.create({"resume": "~/run"}))
    with pytest.raises(MissingFileError, match=f"resume={home}/run: there is no such run folder"):
        checkpoint_to_resume(OmegaConf.create({"resume": "~/run", "run_dir": "new"}))
