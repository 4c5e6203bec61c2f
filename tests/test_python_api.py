"""The package from Python: a configuration is composed, trained and evaluated, and the detector is called on pictures."""

import json
import re

import numpy as np
import pytest
import torch
import torchvision
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from PIL import Image

import roi_quantization
from roi_quantization.detection.data.images import decode
from roi_quantization.detection.model.build import build_detector
from roi_quantization.detection.runs.detector import check_overrides
from tests.configuration import ROOT, composed
from tests.trainings import TINY


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short training, started from Python."""
    folder = tmp_path_factory.mktemp("trained")
    overrides = [*TINY, "trainer.max_epochs=4", "optim.groups.lr=5e-3", f"run_dir={folder / 'run'}", f"data.root={folder / 'data'}"]
    metrics = roi_quantization.train(roi_quantization.compose("train", overrides))
    assert {"val/AP", "test/AP75"} <= metrics.keys()
    return folder


@pytest.fixture(scope="module")
def detector(trained):
    return roi_quantization.load(trained / "run/best.ckpt", device="cpu")


@pytest.fixture(scope="module")
def paths(trained):
    return sorted((trained / "data/test").iterdir())


def assert_same(found, expected):
    assert found.keys() == expected.keys() and found["names"] == expected["names"]
    assert all(torch.equal(found[key], expected[key]) for key in expected if key != "names")


def test_it_finds_what_training_reported(trained, detector, paths):
    annotations = json.loads((trained / "data/annotations/instances_test.json").read_text())
    ids = {image["file_name"]: image["id"] for image in annotations["images"]}
    labels = {category["id"]: label for label, category in enumerate(detector.categories, 1)}
    reported = json.loads((trained / "run/results.json").read_text())
    assert len(reported) > 10
    for path, found in zip(paths, detector(paths), strict=True):
        of_image = [result for result in reported if result["image_id"] == ids[path.name]]
        expected = sorted((labels[r["category_id"]], *r["proposal"], r["score"]) for r in of_image)
        x1, y1, x2, y2 = found["proposals"].T
        mine = zip(found["labels"].tolist(), *(v.tolist() for v in (x1, y1, x2 - x1, y2 - y1, found["scores"])), strict=True)
        # apart in the last digits, since training evaluates several images at a time
        assert np.array(sorted(mine)) == pytest.approx(np.array(expected), abs=2e-3)
        assert found["names"] == [detector.names[label] for label in found["labels"].tolist()]
        assert (found["boxes"][:, 2:] <= 96).all() and found["boxes"].shape == (len(of_image), 4)


def test_every_form_of_a_picture_gives_the_same_detections(detector, paths):
    expected = detector(paths[0])
    assert len(expected["scores"]) > 0
    image = decode(paths[0])
    array = image.permute(1, 2, 0).numpy()
    for picture in (str(paths[0]), Image.open(paths[0]), array, array / 255, image, image / 255):
        assert_same(detector(picture), expected)
    for pictures in ([array, image], np.stack([array, array]), torch.stack([image, image])):
        found = detector(pictures)
        assert len(found) == 2
        assert all(one.keys() == expected.keys() for one in found)
        assert_same(found[0], expected)
    assert detector([]) == []


def test_boxes_are_in_pixels_of_the_picture_given(trained, paths):
    """The network sees 96 pixels; a picture of twice the size has boxes of twice the size."""
    detector = roi_quantization.load(
        trained / "run/best.ckpt", ["data.eval_transform.short_side=96", "head.score_threshold=0"], device="cpu"
    )
    large = np.kron(decode(paths[0]).permute(1, 2, 0).numpy(), np.ones((2, 2, 1), np.uint8))
    given = torch.tensor([[40.0, 40.0, 90.0, 90.0]])
    small, doubled = detector(paths[0], given), detector(large, 2 * given)
    assert torch.equal(doubled["proposals"], 2 * small["proposals"])
    ours, theirs = (found["boxes"][found["labels"].argsort()] for found in (doubled, small))
    torch.testing.assert_close(ours, 2 * theirs, atol=4.0, rtol=0)  # the resized image differs a little from the small one


def test_given_proposals_are_used(detector, paths):
    given = [[10.0, 10.0, 60.0, 60.0], [20.0, 30.0, 96.4, 90.0]]
    expected = torch.tensor([[10.0, 10.0, 60.0, 60.0], [20.0, 30.0, 96.0, 90.0]])
    for proposals in (given, np.array(given), torch.tensor(given)):
        found = detector(paths[0], proposals=proposals)
        assert len(found["scores"]) > 0
        assert all(any(torch.equal(used, one) for one in expected) for used in found["proposals"])
    first, none = detector(paths[:2], proposals=[given, np.zeros((0, 4))])
    assert_same(first, found)
    assert none["boxes"].shape == (0, 4) and none["names"] == []


@pytest.mark.parametrize(
    ("proposals", "message"),
    [
        ([10.0, 10.0, 60.0, 60.0], r"picture: the proposals have shape \(4,\), expected \[L, 4\]"),
        ([[10.0, 10.0, 10.0, 60.0]], r"proposal 0 is \[10\.0, 10\.0, 10\.0, 60\.0\], and the picture is 96 wide and 96 high"),
        ([[0, 0, 50, 50], [10, 10, 200, 60]], r"proposal 1 is \[10\.0, 10\.0, 200\.0, 60\.0\]"),
        ([[0, 0, float("nan"), 50]], "proposal 0 is"),
        ([[0.1, 0.1, 0.5, 0.5]], "no proposal is larger than a pixel. Expected coordinates in pixels"),
        ("all", "picture: the proposals are not numbers"),
    ],
)
def test_proposals_that_cannot_be_used_are_an_error(detector, paths, proposals, message):
    with pytest.raises(ValueError, match=message):
        detector(paths[0], proposals=proposals)


def test_several_pictures_want_proposals_each(detector, paths):
    with pytest.raises(ValueError, match="expected windows for each of 2 pictures, got 1"):
        detector(paths[:2], proposals=[[[0, 0, 10, 10]]])
    with pytest.raises(ValueError, match="picture 1: the proposals have shape"):
        detector(paths[:2], proposals=[np.array([[0, 0, 10, 10]]), np.zeros((1, 5))])
    with pytest.raises(ValueError, match="picture 1 has floating point values"):
        detector([paths[0], np.full((9, 9, 3), 200.0)])


def test_proposals_from_a_file_are_given_or_chosen_anew(trained, paths):
    path = trained / "some.npz"
    path.touch()
    detector = roi_quantization.load(trained / "run/best.ckpt", ["proposals=file", f"proposals.test.path={path}"], device="cpu")
    with pytest.raises(ValueError, match=r"it has no windows for these pictures.*detector\(pictures, proposals=\[\.\.\.\]\)"):
        detector(paths[0])
    assert len(detector(paths[0], proposals=[[10, 10, 60, 60]])["scores"]) > 0


def test_a_provider_that_reads_files_finds_pictures_from_memory(trained, paths, tmp_path):
    pytest.importorskip("cv2.ximgproc", reason="needs OpenCV's contrib modules")
    overrides = ["proposals=selective_search", f"proposals.cache_dir={tmp_path}", "proposals.num_workers=1"]
    detector = roi_quantization.load(trained / "run/best.ckpt", overrides, device="cpu")
    found = detector(decode(paths[0]))
    assert len(found["scores"]) > 0
    (cached,) = tmp_path.glob("*.npz")
    before = cached.stat().st_mtime_ns
    assert_same(detector(Image.open(paths[0])), found)
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")] == [before], "found again by its pixels"


def test_a_checkpoint_with_another_operator(trained, detector, paths):
    pool = roi_quantization.load(trained / "run/best.ckpt", ["roi=pool", "head.score_threshold=0.2"], device="cpu")
    assert pool.model.roi_heads.box_roi_pool.operator.keywords["quantize_roi"] == "round"
    assert (pool(paths[0])["scores"] > 0.2).all()
    with pytest.raises(ValueError, match=r"score_threshold=0\.999: load does not use score_threshold"):
        roi_quantization.load(trained / "run/best.ckpt", ["score_threshold=0.999"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("score_threshold=0.999", "score_threshold=0.999: load does not use score_threshold. Set head.score_threshold"),
        ("threads=3", "load does not use threads. Call torch.set_num_threads"),
        ("trainer=gpu", r"load does not use trainer. Give load\(..., device=...\)"),
        ("+trainer.precision=bf16-mixed", "load does not use trainer.precision. Give"),
        ("data=coco", "load does not use data. Of the data it uses the checkpoint's data.eval_transform"),
        ("data.root=x", "load does not use data.root"),
        ("ckpt=x", "load does not use ckpt. The checkpoint is the first argument"),
        ("+rate=0.5", "load does not use rate. It uses detector, roi, head, "),
        ("~trainer", "load does not use trainer"),
    ],
)
def test_an_override_that_would_do_nothing_is_refused(override, message):
    with pytest.raises(ValueError, match=message):
        check_overrides(composed("train"), ["roi=pool", override])


def test_overrides_that_are_used_are_taken():
    overrides = ["roi=pool", "~proposals", "head.score_threshold=${rate}", "+rate=0.5", "data.eval_transform.short_side=96", "seed=1"]
    check_overrides(composed("train", *overrides), [*overrides, "model.compile=true", "hydra.searchpath=[file:///a]"])


@pytest.mark.parametrize("inside", [False, True], ids=["on its own", "inside an application of Hydra"])
def test_compose_gives_the_configuration_of_the_command(trained, monkeypatch, tmp_path, inside):
    monkeypatch.chdir(tmp_path)
    before = OmegaConf.create({"hydra": {"runtime": {"config_sources": []}}}) if inside else None
    monkeypatch.setattr(HydraConfig.instance(), "cfg", before)
    cfg = roi_quantization.compose("train", ["roi=pool", "experiment=voc_animals_small", "backbone.weights=null", "data.root=x"])
    assert cfg.run_dir.startswith(str(tmp_path / "runs")) and cfg.run_dir.endswith("_voc_animals_pool")
    assert cfg.optim.groups.lr == 2e-4 and "hydra" not in cfg
    assert cfg.head.extractor.operator.quantize_roi == "round", "references to other settings stay"
    assert HydraConfig.instance().cfg is before and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="expected a list of them, such as"):
        roi_quantization.compose("train", "roi=pool")
    with pytest.raises(ValueError, match="expected a list of them, such as"):
        roi_quantization.load("run/best.ckpt", "roi=pool")

    with pytest.raises(ValueError, match="eval needs one checkpoint, got 0"):
        roi_quantization.compose("eval")
    with pytest.raises(ValueError, match="the configuration of train has no checkpoint"):
        roi_quantization.compose("train", ckpt="best.ckpt")


def test_evaluate_reproduces_what_train_reported(trained, tmp_path):
    folder = tmp_path / "a folder, with=signs"
    folder.mkdir()
    (folder / "best.ckpt").symlink_to(trained / "run/best.ckpt")
    overrides = ["trainer=cpu", "trainer.enable_progress_bar=false", f"run_dir={tmp_path / 'run'}"]
    metrics = roi_quantization.evaluate(roi_quantization.compose("eval", overrides, ckpt=folder / "best.ckpt"))
    assert metrics["test/AP"] == pytest.approx(json.loads((trained / "run/metrics.json").read_text())["stats"]["AP"])
    assert json.loads((tmp_path / "run/results.json").read_text()) == json.loads((trained / "run/results.json").read_text())


def test_a_checkpoint_is_trained_on_with_some_of_its_classes_and_a_compiled_backbone(trained, tmp_path, caplog):
    best = trained / "run/best.ckpt"
    chosen = ["data.classes=[star,disc]", "head.box_predictor.class_agnostic=false", "model.compile=aot_eager", "optim.groups.lr=1e-9"]
    chosen += ["optimized_metric=val/loss"]
    where = [f"run_dir={tmp_path / 'run'}", f"data.root={trained / 'data'}"]
    with caplog.at_level("INFO"):
        roi_quantization.train(roi_quantization.compose("train", [*TINY, *chosen, *where, f"init_from='{best}'", "trainer.max_steps=1"]))
    assert "rows of disc, star are kept, those of no class are new" in caplog.text
    before, after = (torch.load(path, weights_only=True)["state_dict"] for path in (best, tmp_path / "run/best.ckpt"))
    assert before.keys() == after.keys(), "a compiled backbone has the same weights"
    key = "detector.roi_heads.box_predictor.cls_score.weight"  # disc, ring, square, triangle, star
    torch.testing.assert_close(after[key], before[key][[0, 1, 5]])
    detector = roi_quantization.load(tmp_path / "run/best.ckpt", device="cpu")
    assert detector.names == {1: "disc", 2: "star"}

    overrides = ["trainer=cpu", "trainer.enable_progress_bar=false", f"run_dir={tmp_path / 'on_train'}", "split=train"]
    metrics = roi_quantization.evaluate(roi_quantization.compose("eval", overrides, ckpt=tmp_path / "run/best.ckpt"))
    assert "train/AP" in metrics
    evaluated = json.loads((tmp_path / "on_train/metrics.json").read_text())
    assert evaluated["images"] == 8 and evaluated["per_class"].keys() == {"disc", "star"}


@pytest.mark.parametrize(("override", "message"), [("model.compile=none", "model.compile=none: expected true, false or one of .*inductor")])
def test_a_backend_that_is_not_there_is_named(override, message):
    with pytest.raises(ValueError, match=message):
        build_detector(roi_quantization.compose("train", [*TINY, override, "run_dir=unused"]), num_classes=3)


def test_a_compiled_backbone_computes_the_same():
    plain, compiled = (
        build_detector(roi_quantization.compose("train", [*TINY, f"model.compile={backend}", "run_dir=unused"]), num_classes=3).eval()
        for backend in ("false", "aot_eager")
    )
    compiled.load_state_dict(plain.state_dict())
    images = torch.rand(1, 3, 64, 96)
    assert compiled.backbone._compiled_call_impl is not None and plain.backbone._compiled_call_impl is None
    torch.testing.assert_close(compiled.backbone(images), plain.backbone(images))


def test_the_blocks_of_the_document_run(trained, paths, detector):
    """Those that train or write are tested above, piece by piece."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python_api.md").read_text(), re.MULTILINE | re.DOTALL)
    first, given, nms = blocks[0], blocks[1], blocks[-1]
    names = {"image": paths[0], "torchvision": torchvision}
    exec(first.replace("runs/<run>/best.ckpt", str(trained / "run/best.ckpt")).replace("dog.jpg", str(paths[0])), names)
    assert_same(names["found"], detector(paths[0]))
    exec(given.replace("200]", "90]").replace("180", "80").replace("120", "90"), names)
    assert names["found"].keys() == detector(paths[0]).keys()
    names |= {"boxes": torch.rand(3, 2, 4).cumsum(2), "scores": torch.tensor([[0.9, 0.0], [0.0, 0.8], [0.01, 0.02]])}
    exec(nms, names)
    assert names["kept"].tolist() == [0, 1]


def test_a_configuration_of_another_program_is_named(tmp_path):
    cfg = roi_quantization.compose("train", [f"run_dir={tmp_path}"])
    with pytest.raises(
        ValueError, match=r"^this is a configuration of another program: it has no `split`\. Compose one with compose\('eval'"
    ):
        roi_quantization.evaluate(cfg)
    with open_dict(cfg):
        del cfg["optim"]
    with pytest.raises(ValueError, match=r"^this is a configuration of another program: it has no `optim`"):
        roi_quantization.train(cfg)
