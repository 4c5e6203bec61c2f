"""Configurations and code from outside this checkout, by every way that Hydra has to name a folder of them."""

import json
import os

import pytest
import torch

import roi_quantization
from roi_quantization.detection.common import config_sources
from roi_quantization.detection.common.config_sources import choices, config_folders, name_config_folder, name_folders_of_command
from roi_quantization.detection.model.build import read_operator
from tests import commands
from tests.configuration import ROOT
from tests.trainings import TINY

CODE = """
from roi_quantization import ops

calls = []

def operator(features, boxes, output_size, spatial_scale):
    calls.append(len(boxes))
    return ops.roi_align(features, boxes, output_size, spatial_scale, sampling_ratio=1, aligned=True)
"""
PLUGIN = """
from hydra.plugins.search_path_plugin import SearchPathPlugin

class Mine(SearchPathPlugin):
    def manipulate_search_path(self, search_path):
        search_path.append("mine", "pkg://outside_code.configs")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a module, and a folder of configurations with a comma and a space in its name."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "outside_operator.py").write_text(CODE)
    roi = folder / "my, configs" / "roi"
    roi.mkdir(parents=True)
    (roi / "mine.yaml").write_text("_target_: outside_operator.operator\n_partial_: true\n")
    (roi / "align_3.yaml").write_text("defaults: [align, _self_]\nsampling_ratio: 3\n")
    return folder


@pytest.fixture(scope="module")
def configs(project):
    return project / "my, configs"


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """No folder that a test names stays named."""
    monkeypatch.setattr(config_sources, "_named", [])


def run(folder, *command, path=None):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path or folder), str(ROOT)])}
    return commands.run(*command, cwd=folder, environment=environment)


def succeeded(ended):
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def trained(project, configs):
    """The run folder of a training with an operator from outside, which the cross evaluation uses too."""
    command = [*TINY, "trainer.max_epochs=1", "roi=mine", "cross=[mine,align_3]", "hydra.run.dir=run"]
    succeeded(run(project, str(ROOT / "train.py"), "--config-dir", str(configs), *command))
    return project / "run"


def quoted(path):
    return f"'file://{path}'"


def test_what_was_trained_is_evaluated_with_the_same_folder(trained, project, configs, tmp_path):
    assert list(json.loads((trained / "cross.json").read_text())) == ["mine", "align_3"]
    ckpt, quiet = f"ckpt={trained / 'best.ckpt'}", ["trainer=cpu", "trainer.enable_progress_bar=false"]
    evaluation = [str(ROOT / "eval.py"), ckpt, *quiet, f"data.root={project / 'data/embedded'}"]
    refused = run(tmp_path, *evaluation, path=project)
    assert refused.returncode == 1
    assert "would call outside_operator.operator (roi._target_)" in refused.stderr and "--config-dir <folder>" in refused.stderr
    succeeded(run(tmp_path, *evaluation, "hydra.run.dir=evaluated", "--config-dir", str(configs), path=project))
    assert json.loads((tmp_path / "evaluated/results.json").read_text()) == json.loads((trained / "results.json").read_text())

    prediction = [str(ROOT / "predict.py"), ckpt, *quiet, f"image={project / 'data/embedded/test'}", "hydra.run.dir=predicted"]
    succeeded(run(tmp_path, *prediction, f"hydra.searchpath=[{quoted(configs)}]", path=project))
    assert json.loads((tmp_path / "predicted/instances.json").read_text())["images"]


def test_the_same_from_python(trained, project, configs, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(project))
    ckpt = trained / "best.ckpt"
    with pytest.raises(ValueError, match=r"would call outside_operator\.operator .* in Python config_dir=<folder>"):
        roi_quantization.load(ckpt)
    detector = roi_quantization.load(ckpt, config_dir=configs, device="cpu")
    detector(torch.zeros(3, 96, 96))
    import outside_operator

    assert outside_operator.calls
    overrides = ["trainer=cpu", "trainer.enable_progress_bar=false", f"run_dir={tmp_path}", f"data.root={project / 'data/embedded'}"]
    metrics = roi_quantization.evaluate(roi_quantization.compose("eval", overrides, ckpt=ckpt, config_dir=configs))
    assert metrics["test/AP"] == pytest.approx(json.loads((trained / "metrics.json").read_text())["stats"]["AP"])


def test_explain_takes_an_operator_of_a_package(project, configs, tmp_path):
    """The package names its configurations by a plugin, and nothing is said on the command line."""
    package = tmp_path / "outside_code"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "configs").symlink_to(configs)
    (tmp_path / "hydra_plugins" / "mine").mkdir(parents=True)
    (tmp_path / "hydra_plugins" / "mine" / "__init__.py").write_text(PLUGIN)
    assert "\nalign_3: " in succeeded(run(tmp_path, str(ROOT / "explain.py"), "operators=[pool,align_3]"))
    ended = run(tmp_path, str(ROOT / "explain.py"), "operators=[mine]", path=f"{project}{os.pathsep}{tmp_path}")
    assert ended.returncode == 1 and "where mine samples is not known" in ended.stderr


@pytest.mark.slow
def test_a_sweep_and_its_cross_evaluation(project, configs):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs hydra-joblib-launcher")
    command = ["-m", *TINY, "experiment=quantization_core", "roi=align,mine", "seed=0", "cross=[mine]", "trainer.max_epochs=1"]
    succeeded(run(project, str(ROOT / "train.py"), "--config-dir", str(configs), *command))
    sweep = project / "runs/quantization_embedded_stride16"
    module = [*["-m", "roi_quantization.detection.runs.cross_evaluation"], str(sweep)]
    assert run(project, *module).returncode == 1
    succeeded(run(project, *module, "--config-dir", str(configs)))
    for arm in ("align", "mine"):
        assert json.loads((sweep / f"{arm}_seed0/cross.json").read_text()).keys() == {"align", "mine"}


def test_folders_are_named_by_options_and_overrides(configs, tmp_path):
    ours = config_folders()
    name_folders_of_command([f"--config-dir={configs}", "roi=pool", f"hydra.searchpath=[{quoted(tmp_path)}]"])
    assert config_folders() == [*ours, configs, tmp_path]
    assert {"pool", "mine", "align_3"} <= set(choices("roi"))
    assert read_operator("align_3").sampling_ratio == 3
    cfg = roi_quantization.compose("train", ["roi=align_3"])
    assert cfg.roi.sampling_ratio == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: name_config_folder("nowhere"), FileNotFoundError, "there is no folder of configurations nowhere. It holds files"),
        (lambda: name_folders_of_command(["hydra.searchpath=[file:///a"]), ValueError, "is not valid in Hydra's grammar"),
        (lambda: read_operator("mine"), ValueError, r"there is no operator mine. Choose from .* or name your folder with --config-dir"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
