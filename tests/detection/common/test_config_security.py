"""Checkpoints from a stranger: nothing in them is run."""

import copy
import os
import pickle

import pytest
import torch
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from roi_quantization.detection.common.config_security import allowed_targets, check_targets_allowed
from roi_quantization.detection.model.vgg16 import VGG16
from roi_quantization.detection.runs.checkpoint import PARTS, load_checkpoint, register_checkpoint
from roi_quantization.detection.runs.cross_evaluation import without_training
from roi_quantization.detection.runs.training_checkpoints import AtomicCheckpointIO
from tests.configuration import composed


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "load",
    [load_checkpoint, AtomicCheckpointIO().load_checkpoint, lambda path: VGG16(weights=path)],
    ids=["ckpt=, resume=", "Lightning", "backbone.weights="],
)
def test_a_pickle_inside_is_not_run(tmp_path, load, zipped):
    path, trace = tmp_path / "evil.ckpt", tmp_path / "trace"
    content = {"state_dict": {}, "config": {}, "categories": [], "features.0.weight": Runs(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises((ValueError, pickle.UnpicklingError), match=r"more than tensors|Weights only load failed"):
        load(path)
    assert not trace.exists()


@pytest.fixture(scope="module")
def config():
    """What train.py keeps in a checkpoint."""
    return OmegaConf.to_container(composed("train"))


def save(path, config, /, **more):
    torch.save({"state_dict": {}, "config": config, "categories": [{"id": 1, "name": "disc"}]} | more, path)
    return path


def test_a_checkpoint_of_this_project_is_trusted(config, tmp_path):
    register_checkpoint([f"ckpt={save(tmp_path / 'best.ckpt', config)}"], "eval.py")
    assert {f"roi_quantization.roi_heads.{name}" for name in ("RoIExtractor", "TwoFCHead")} < allowed_targets()


def changed(config, change):
    config = copy.deepcopy(config)
    change(config)
    return config


def call(path):
    return {"_target_": "os.system", "command": f"touch {path}"}


def nested(levels):
    inside = {}
    for _ in range(levels):
        inside = {"a": inside}
    return inside


def doubled():
    """Thirty lists, each with the one before it twice."""
    lists = []
    for _ in range(30):
        lists = [lists, lists]
    return lists


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.update(roi=call(t)), r"would call os\.system \(roi\._target_\)"),
        (lambda c, t: c["data"].update(source=call(t)), r"would call os\.system \(data\.source\._target_\)"),
        (lambda c, t: c["head"].update(_args_=[1, [call(t)]]), r"would call os\.system \(head\._args_\.1\.0\._target_\)"),
        (
            lambda c, t: c.update(roi=call(t) | {"_target_": "roi_quantization.detection.runs.lock.os.system"}),
            r"would call roi_quantization\.detection\.runs\.lock\.os\.system",
        ),
        (lambda c, t: c.update(roi=call(t) | {"_target_": "${roi.command}"}), r"would call \$\{roi\.command\}"),
        (lambda c, t: c.update(roi=call(t) | {"_target_": ["os.system"]}), "would call"),
        (lambda c, t: c.update(roi="${oc.create:{_target_:os.system}}"), "its configuration has no roi"),
        (lambda c, t: c["head"].update(extractor="${oc.create:{_target_:os.system}}"), r"head\.extractor=\$\{oc\.create"),
        (lambda c, t: c["head"].update(x="${oc.env:A,${oc.decode:'{_target_: os.system}'}}"), r"Allowed interpolations are"),
        (lambda c, t: c["roi"].update(defaults=[{"override /hydra/job_logging": "x"}]), r"its configuration contains roi\.defaults"),
        (lambda c, t: c["roi"].update(a=nested(100)), "nested deeper than 50"),
        (lambda c, t: c["roi"].update(a=doubled()), "has more than 10000 settings"),
        (lambda c, t: c["roi"].update(a=torch.zeros(1)), r"contains a Tensor \(roi\.a\)\. Expected plain values"),
        (lambda c, t: c.pop("head"), "its configuration has no head"),
    ],
)
def test_a_configuration_that_would_call_something_else_is_refused(config, tmp_path, change, message):
    trace = tmp_path / "trace"
    before = {part: ConfigStore.instance().repo.get(part) for part in PARTS}
    path = save(tmp_path / "evil.ckpt", changed(config, lambda c: change(c, trace)))
    with pytest.raises(SystemExit, match=rf"eval\.py: \S*evil\.ckpt.*{message}"):
        register_checkpoint([f"ckpt={path}"], "eval.py")
    assert not trace.exists()
    assert {part: ConfigStore.instance().repo.get(part) for part in PARTS} == before, "nothing of it is offered to Hydra"


def test_a_file_in_configs_is_how_a_target_is_trusted(config, tmp_path, monkeypatch):
    own = {"_target_": "my.package.operator"}
    with pytest.raises(ValueError, match=r"would call my\.package\.operator .*name it there yourself"):
        check_targets_allowed({"roi": own}, "best.ckpt")
    (tmp_path / "roi").mkdir()
    (tmp_path / "roi/mine.yaml").write_text(yaml.dump(own))
    monkeypatch.setattr("roi_quantization.detection.common.config_sources.CONFIGS", tmp_path)
    check_targets_allowed({"roi": own}, "best.ckpt")


@pytest.mark.parametrize(
    "text",
    [
        "_target_: 'my.package.part'",
        '_target_: "my.package.part"  # a comment',
        '"_target_": my.package.part',
        "_target_:\n  my.package.part",
        "roi: {_target_: my.package.part, _partial_: true}",
        "trainer:\n  callbacks:\n    - _target_: my.package.part",
        "a: !other.program [{_target_: my.package.part}]",
    ],
)
def test_every_way_to_write_a_target_in_yaml_names_it(tmp_path, monkeypatch, text):
    monkeypatch.setattr("roi_quantization.detection.common.config_sources.CONFIGS", tmp_path)
    (tmp_path / "own.yaml").write_text(f"{text}\n")
    assert allowed_targets() == {"my.package.part"}


def test_what_is_no_name_of_a_target_in_a_file_is_not_allowed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("roi_quantization.detection.common.config_sources.CONFIGS", tmp_path)
    (tmp_path / "own.yaml").write_text(
        "# _target_: a.b\nhelp: |\n  _target_: a.b\nroi: {_target_: '${roi.command}', a: [_target_]}\nx: {_target_: [a.b]}\n"
    )
    assert not caplog.text and allowed_targets() == frozenset()
    (tmp_path / "broken.yaml").write_text("a: [\n_target_: a.b\n")
    assert allowed_targets() == frozenset() and "broken.yaml is not YAML, and no _target_ in it is allowed: " in caplog.text


def test_a_cross_evaluation_of_a_run_does_not_call_what_only_trains(config):
    own = {"_target_": "my.package.part"}
    run = changed(config, lambda c: c.update(optim=own, average=own, logger={"mine": own}))
    run["trainer"] |= {"callbacks": [own], "logger": [own]}
    check_targets_allowed(without_training(run), "config.yaml")
    run["trainer"]["plugins"] = [own]
    with pytest.raises(ValueError, match=r"would call my\.package\.part \(trainer\.plugins\.0\._target_\)"):
        check_targets_allowed(without_training(run), "config.yaml")


@pytest.mark.parametrize(
    "more",
    [{"config": []}, {"categories": [{"id": 1}]}, {"categories": "disc"}, {"state_dict": {"a": 1}}, {"state_dict": torch.zeros(1)}],
)
def test_other_things_in_the_place_of_a_checkpoints_are_named(tmp_path, more):
    with pytest.raises(ValueError, match=rf"evil\.ckpt was not written by train\.py: its {next(iter(more))} has another type"):
        load_checkpoint(save(tmp_path / "evil.ckpt", {}, **more))
