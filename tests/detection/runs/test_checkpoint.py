import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from roi_quantization.detection.common import config_sources
from roi_quantization.detection.common.config_sources import choices
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.renamed_targets import RENAMED
from roi_quantization.detection.runs.checkpoint import (
    PARTS,
    check_categories,
    checkpoint_paths,
    keep_eval_transform,
    load_checkpoint,
    load_weights,
    register_checkpoint,
    register_parts,
)
from roi_quantization.detection.runs.composition import compose
from tests.configuration import composed

CATEGORIES = [{"id": 3, "name": "disc"}, {"id": 5, "name": "star"}]


def checkpoint_of(detector):
    return {
        "state_dict": {f"detector.{key}": value for key, value in detector.state_dict().items()},
        "categories": CATEGORIES,
        "config": {},
    }


def test_what_is_saved_is_loaded(tmp_path):
    saved, fresh = nn.Linear(2, 3), nn.Linear(2, 3)
    torch.save(checkpoint_of(saved), tmp_path / "best.ckpt")
    load_weights(fresh, load_checkpoint(tmp_path / "best.ckpt"))
    assert torch.equal(fresh.weight, saved.weight)


@pytest.mark.parametrize(
    ("override", "paths"),
    [
        ("ckpt=runs/a/best.ckpt", ["runs/a/best.ckpt"]),
        ("++ckpt=a", ["a"]),
        ("ckpt='a=b, (c) é/best.ckpt'", ["a=b, (c) é/best.ckpt"]),
        (r"ckpt=a\=b\(1\).ckpt", ["a=b(1).ckpt"]),
        ("ckpt=2024", ["2024"]),
        ("ckpt=007", ["007"]),
        ("ckpt=a,b", ["a", "b"]),
        ("ckpt='a,1',b", ["a,1", "b"]),
        ("ckpt=${oc.env:FOLDER}/best.ckpt", ["here/best.ckpt"]),
        ("ckpt=null", []),
        ("roi=pool", []),
    ],
)
def test_the_command_line_is_parsed_as_hydra_parses_it(monkeypatch, override, paths):
    monkeypatch.setenv("FOLDER", "here")
    assert checkpoint_paths(["seed=1", override]) == paths


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ckpt=é.ckpt", r"""ckpt=é\.ckpt is not valid in Hydra's grammar .* Quote the path: 'ckpt="é\.ckpt"'"""),
        ("ckpt=a=b.ckpt", r"Quote the path"),
        ("ckpt=1e5", r"ckpt=100000\.0: expected a path\. Quote"),
        ("ckpt=true", r"ckpt=True: expected a path\. Quote"),
    ],
)
def test_a_path_that_hydra_reads_otherwise_is_refused(override, message):
    with pytest.raises(InputError, match=message):
        checkpoint_paths([override])


@pytest.fixture
def trained(tmp_path):
    """A checkpoint without weights."""
    torch.save(checkpoint_of(nn.Linear(1, 1)) | {"config": OmegaConf.to_container(composed("train"))}, tmp_path / "best.ckpt")
    return f"ckpt={tmp_path / 'best.ckpt'}"


@pytest.mark.parametrize(
    "overrides",
    [["roi=allign"], ["+proposals=grid_photo"], ["data=custom", "data=costum"], ["roi=pool,allign"], ["head='two fc'"], ["backbone=a/b"]],
)
def test_a_part_that_is_not_there_is_named_with_those_that_are(trained, overrides):
    """Hydra would leave it out, since the parts of eval.yaml and predict.yaml are optional."""
    group = overrides[0].lstrip("+").partition("=")[0]
    message = rf"{group}=.*: there is no such choice\. Choose from {choices(group)[0]}, .* \(configs/{group}\), or .* --config-dir <folder>"
    with pytest.raises(SystemExit, match=rf"eval\.py: {message}"):
        register_checkpoint([trained, *overrides], "eval.py")
    with pytest.raises(InputError, match=message):
        compose("predict", [trained, *overrides])


def test_a_part_that_is_not_there_is_named_without_a_checkpoint_too():
    with pytest.raises(
        InputError, match=r"detector=torchvison: there is no such choice\. Choose from fast_rcnn, faster_rcnn, torchvision "
    ):
        compose("eval", ["detector=torchvison", "detector.weights=COCO_V1", "roi=align"])
    with pytest.raises(SystemExit, match=r"roi=allign: there is no such choice"):
        register_checkpoint(["detector=torchvision", "roi=allign"], "eval.py", is_optional=True)


def test_parts_that_are_there_are_taken_as_hydra_takes_them(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(config_sources, "_named", [])
    (tmp_path / "own/roi/deeper").mkdir(parents=True)
    (tmp_path / "own/roi/deeper/mine.yaml").write_text("_target_: a.b\n")
    for choice in ("roi=checkpoint", "roi=align.yaml", "roi='pool'", "roi=glob(align*)", "roi=choice(pool,warp)", "~proposals", "roi.a=1"):
        register_checkpoint([trained, choice], "eval.py")
    register_checkpoint([trained, "roi=deeper/mine", f"hydra.searchpath=['file://{tmp_path / 'own'}']"], "eval.py")


def test_targets_from_before_the_move_are_renamed(tmp_path):
    old = {new: old for old, new in RENAMED.items()}

    def before(node):
        if isinstance(node, dict):
            return {key: old.get(value, value) if key == "_target_" else before(value) for key, value in node.items()}
        return node

    config = OmegaConf.to_container(composed("train"))
    torch.save(checkpoint_of(nn.Linear(1, 1)) | {"config": before(config)}, tmp_path / "old.ckpt")
    assert load_checkpoint(tmp_path / "old.ckpt")["config"]["roi"]["_target_"] == "ops.lattice_pool"
    register_checkpoint([f"ckpt={tmp_path / 'old.ckpt'}"], "eval.py")
    cfg = OmegaConf.to_container(composed("eval"))
    assert {part: cfg[part] for part in PARTS} == {part: config[part] for part in PARTS}


@pytest.mark.parametrize(
    ("overrides", "expected", "message"),
    [
        ([], (240, 400), None),
        (["data=custom"], (240, 400), "data.eval_transform.short_side=240 is the checkpoint's. The data configuration has 600"),
        (
            ["data=custom", "data.eval_transform.short_side=480"],
            (480, 400),
            "data.eval_transform.short_side=480 is not the checkpoint's, which is 240",
        ),
        (["data.eval_transform.max_side=800"], (240, 800), "data.eval_transform.max_side=800 is not the checkpoint's, which is 400"),
    ],
)
def test_the_transform_of_a_checkpoint_holds_unless_it_is_named(tmp_path, caplog, overrides, expected, message):
    sizes = ["data.eval_transform.short_side=240", "data.eval_transform.max_side=400"]
    register_parts(OmegaConf.to_container(composed("train", *sizes)), "best.ckpt")
    cfg = composed("eval", *overrides)
    keep_eval_transform(cfg, overrides)
    assert (cfg.data.eval_transform.short_side, cfg.data.eval_transform.max_side) == expected
    assert message in caplog.text if message else not caplog.text


def test_missing_truncated_and_foreign_files_are_told_apart(tmp_path):
    path = tmp_path / "best.ckpt"
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*best.ckpt"):
        load_checkpoint(path)
    torch.save(checkpoint_of(nn.Linear(50, 50)), path)
    content = path.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"best.ckpt is not an intact checkpoint"):
            load_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match=r"was not written by train\.py: it has no config, categories"):
        load_checkpoint(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"state_dict": nn.Linear(1, 1)}, tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match="not an intact checkpoint"):
        load_checkpoint(tmp_path / "best.ckpt")


def test_other_classes_are_named():
    checkpoint = checkpoint_of(nn.Linear(1, 1))
    check_categories(checkpoint, [{"id": 1, "name": "disc"}, {"id": 2, "name": "star"}])  # the ids may differ, the labels mean the same
    with pytest.raises(ValueError, match=r"trained on 2 classes \(disc, star\), the data has 3 \(cat, disc, star\)"):
        check_categories(checkpoint, [{"id": 1, "name": "cat"}, {"id": 2, "name": "disc"}, {"id": 3, "name": "star"}])
    with pytest.raises(ValueError, match="in the order"):
        check_categories(checkpoint, CATEGORIES[::-1])


@pytest.mark.parametrize(
    "detector, message",
    [
        (nn.Linear(2, 4), r"2 of its weights differ: bias has shape \[3\] in the checkpoint, \[4\] in the detector"),
        (nn.Linear(2, 3, bias=False), "bias of the checkpoint has no place in the detector"),
        (nn.Sequential(nn.Linear(2, 3)), "0.bias is not in the checkpoint"),
    ],
)
def test_weights_that_do_not_fit(detector, message):
    with pytest.raises(ValueError, match=message):
        load_weights(detector, checkpoint_of(nn.Linear(2, 3)))
