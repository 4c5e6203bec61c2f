"""Other detectors than the default in train.py, eval.py and predict.py."""

import csv
import json
import re
import sys

import pytest
import torch
from omegaconf import OmegaConf

import roi_quantization
from roi_quantization.detection.runs.checkpoint import forget_parts, load_checkpoint, register_parts
from roi_quantization.scripts import eval as eval_script
from roi_quantization.scripts.eval import evaluate
from roi_quantization.scripts.predict import predict
from roi_quantization.scripts.train import train
from tests.configuration import composed
from tests.detection.model.test_torchvision_detector import random_model
from tests.detection.model.tiny_rcnn import tiny  # noqa: F401 -- a fixture
from tests.trainings import TINY, run_eval

DATA = [text for text in TINY if not text.startswith(("backbone", "head"))]
SHAPES = {2: "disc", 3: "ring", 7: "square", 11: "triangle", 18: "star"}  # the embedded set's, whose ids have gaps as COCO's
NAMES = [SHAPES.get(label, f"none{label}") for label in range(19)]
TORCHVISION = ["detector=torchvision", "detector.builder=tiny_rcnn"]


@pytest.fixture
def weights(tmp_path):
    path, model = tmp_path / "tiny.pth", random_model(num_classes=len(NAMES))
    model.roi_heads.box_predictor.cls_score.bias.data[[label not in SHAPES for label in range(len(NAMES))]] = -1000.0  # it finds shapes
    torch.save(model.state_dict(), path)
    return [f"detector.weights={path}", f"detector.categories=[{','.join(NAMES)}]"]


def evaluate_without_checkpoint(folder, data, *overrides):
    forget_parts()
    words = ["trainer=cpu", "trainer.enable_progress_bar=false", "data=embedded", *(text for text in DATA if text.startswith("data."))]
    return evaluate(composed("eval", *words, f"data.root={data}", f"run_dir={folder}", *TORCHVISION, *overrides))


def test_what_an_operator_costs_a_detector_that_was_trained_elsewhere(tiny, weights, data, tmp_path, capsys):  # noqa: F811
    run = tmp_path / "run"
    metrics = evaluate_without_checkpoint(run, data, *weights, "roi=align_no_half_pixel", "cross=[align_no_half_pixel,pool]")
    assert set(metrics) >= {"test/AP", "test/AP75"}
    cross, differences = (json.loads((run / name).read_text()) for name in ("cross.json", "differences.json"))
    assert list(cross) == ["align_no_half_pixel", "pool"]
    assert cross["align_no_half_pixel"] == json.loads((run / "metrics.json").read_text())
    assert differences["minus"] == "align_no_half_pixel" and list(differences["differences"]) == ["pool"]
    change = cross["pool"]["stats"]["AP"] - cross["align_no_half_pixel"]["stats"]["AP"]
    assert differences["differences"]["pool"]["AP"]["value"] == pytest.approx(change)
    results = {name: json.loads((run / name).read_text()) for name in ("results.json", "results_pool.json")}
    assert results["results.json"] != results["results_pool.json"]
    assert {result["category_id"] for result in results["results.json"]} <= {2, 3, 7, 11, 18}
    printed = capsys.readouterr().out
    assert "Minus align_no_half_pixel, with 95 % intervals of a paired bootstrap over 4 images" in printed
    assert "tiny.pth on test: 4 images" in printed

    again = tmp_path / "pool"
    evaluate_without_checkpoint(again, data, *weights, "roi=pool")
    assert json.loads((again / "results.json").read_text()) == results["results_pool.json"]
    assert not (again / "differences.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["roi=pool"], r"no checkpoint is given\. Set ckpt=<run>/best.ckpt, or detector=torchvision and detector\.weights=COCO_V1"),
        (["detector.weights=COCO_V1"], r"roi: nothing is chosen"),
    ],
)
def test_what_is_missing_is_named(tiny, tmp_path, data, words, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        evaluate_without_checkpoint(tmp_path, data, *words)


def test_the_data_are_to_be_chosen(tiny, tmp_path):  # noqa: F811
    """The detector sets the transform of data, and does not choose any."""
    forget_parts()
    with pytest.raises(ValueError, match=r"data: nothing is chosen"):
        evaluate(composed("eval", f"run_dir={tmp_path}", *TORCHVISION, "roi=pool", "detector.weights=COCO_V1"))


def test_a_category_that_the_weights_do_not_have_is_an_error(tiny, weights, data, tmp_path):  # noqa: F811
    renamed = weights[1].replace("ring", "rings")
    with pytest.raises(ValueError, match=r"category 3 of the data is 'ring', and that of the detector's weights is 'rings'"):
        evaluate_without_checkpoint(tmp_path, data, weights[0], renamed, "roi=pool")
    evaluate_without_checkpoint(tmp_path, data, weights[0], renamed, "roi=pool", "data.classes=[disc,star]")


def test_python_needs_no_checkpoint(tiny):  # noqa: F811
    register_parts(OmegaConf.to_container(composed("train", "roi=prroi")), "another")
    cfg = roi_quantization.compose("eval", [*TORCHVISION, "detector.weights=COCO_V1", "data=embedded", "run_dir=unused"])
    assert cfg.ckpt is None and "roi" not in cfg and cfg.backbone is None, "nothing is left of another checkpoint"
    assert cfg.data.eval_transform.short_side is None
    for words in ([], ["ckpt=null"]):
        with pytest.raises(ValueError, match="predict needs one checkpoint, got 0"):
            roi_quantization.compose("predict", [*TORCHVISION, *words])


def test_the_command_line_needs_no_checkpoint(tiny, weights, data, tmp_path, monkeypatch, capsys):  # noqa: F811
    words = ["trainer=cpu", "trainer.enable_progress_bar=false", "data=embedded", *(text for text in DATA if text.startswith("data."))]
    words += [f"data.root={data}", f"hydra.run.dir={tmp_path}/run", *TORCHVISION, *weights, "roi=pool"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *words])
    register_parts(OmegaConf.to_container(composed("train", "roi=align")), "another")  # of this process, for other tests
    forget_parts()
    eval_script.main()
    assert json.loads((tmp_path / "run/metrics.json").read_text())["images"] == 4


def test_training_evaluating_and_predicting(tiny, data, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    words = [*DATA, *TORCHVISION, f"run_dir={run}", f"data.root={data}", "trainer.max_epochs=1", "cross=[pool]"]
    words += ["+detector.options.box_score_thresh=0.01"]
    metrics = train(composed("train", *words))
    assert metrics["test/AP"] >= 0 and json.loads((run / "cross.json").read_text())["pool"]
    again = run_eval(run / "best.ckpt", tmp_path / "eval")
    assert again["test/AP"] == metrics["test/AP"]
    assert json.loads((tmp_path / "eval/results.json").read_text()) == json.loads((run / "results.json").read_text())
    assert load_checkpoint(run / "best.ckpt")["config"]["proposals"] is None

    detector = roi_quantization.load(run / "best.ckpt")
    picture = next((data / "test").iterdir())
    assert set(detector(picture)) == {"boxes", "scores", "labels", "names"}
    with pytest.raises(ValueError, match="this detector finds its own, and would not use them"):
        detector(picture, proposals=torch.zeros(0, 4))
    with pytest.raises(ValueError, match="a TorchvisionDetector cannot be exported: it finds its own proposals"):
        detector.export_program()
    with pytest.raises(ValueError, match=r"optimized_metric=val/loss: this detector computes no losses in evaluation\. Set .*val/AP"):
        train(composed("train", *words, "optimized_metric=val/loss"))
    with pytest.raises(ValueError, match=r"features=cached: a TorchvisionDetector resizes images itself"):
        train(composed("train", *words, "features=cached", f"features.cache_dir={tmp_path}"))


def test_a_network_that_proposes(data, tmp_path, caplog):
    """Trained, evaluated and used on a picture; and how many objects its proposals cover is logged."""
    run = tmp_path / "run"
    words = ["detector=faster_rcnn", *TINY, f"run_dir={run}", f"data.root={data}", "trainer.max_epochs=1"]
    metrics = train(composed("train", *words))
    with open(run / "metrics.csv", newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row["val/loss"]]
    assert 0 <= float(row["val/R75"]) <= float(row["val/R50"]) <= 100
    parts = ("loss_classifier", "loss_box", "loss_objectness", "loss_rpn_box_reg")
    assert float(row["val/loss"]) == pytest.approx(sum(float(row[f"val/{part}"]) for part in parts), rel=1e-4)
    caplog.set_level("INFO")
    again = run_eval(run / "best.ckpt", tmp_path / "eval")
    assert re.search(r"test: proposals with recall [01]\.\d{3} at IoU 0\.5, [01]\.\d{3} at IoU 0\.75", caplog.text)
    assert again["test/AP"] == metrics["test/AP"]
    assert json.loads((tmp_path / "eval/results.json").read_text()) == json.loads((run / "results.json").read_text())
    assert all(len(result["proposal"]) == 4 for result in json.loads((run / "results.json").read_text()))

    detector = roi_quantization.load(run / "best.ckpt")
    assert set(detector(next((data / "test").iterdir()))) == {"boxes", "scores", "labels", "names", "proposals"}
    with pytest.raises(ValueError, match="a FasterRCNN cannot be exported: it finds its own proposals"):
        detector.export_program()


def test_masks(data, tmp_path, capsys):
    """Learnt, evaluated beside the boxes, with another operator too, and found in a picture."""
    run = tmp_path / "run"
    small = ["head.mask_head.layers=[8]", "head.mask_predictor.in_channels=8", "head.mask_predictor.dim_reduced=8"]
    words = ["detector=faster_rcnn", "mask_head=two_conv_small", *small, *TINY, f"data.root={data}", "trainer.max_epochs=1"]
    metrics = train(composed("train", *words, f"run_dir={run}", "optimized_metric=val/segm_AP"))
    assert {"test/segm_AP", "test/segm_AP75", "test/segm_AP90", "test/segm_AP_small", "val/segm_AP"} <= set(metrics)
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(any(row[name] for row in rows) for name in ("train/loss_mask", "val/loss_mask", "val/segm_AP90", "test/loss_mask"))
    results = json.loads((run / "results.json").read_text())
    assert results and all(result["segmentation"]["size"] == [96, 96] for result in results)

    again = run_eval(run / "best.ckpt", tmp_path / "eval", "cross=[pool]")
    assert again["test/segm_AP"] == metrics["test/segm_AP"]
    assert json.loads((tmp_path / "eval/results.json").read_text()) == results
    differences = json.loads((tmp_path / "eval/differences.json").read_text())["differences"]
    assert list(differences["pool"]) == ["AP", "AP50", "AP75", "segm_AP", "segm_AP50", "segm_AP75", "segm_AP90"]
    assert len(re.findall(r"^  pool +segm_AP .*segm_AP90", capsys.readouterr().out, re.MULTILINE)) == 2, "values, and differences"
    boxes = run_eval(run / "best.ckpt", tmp_path / "boxes", "detector.masks=false")
    assert not any("segm" in name for name in boxes) and boxes["test/AP"] == metrics["test/AP"]

    picture = next((data / "test").iterdir())
    found = roi_quantization.load(run / "best.ckpt")(picture)
    assert found["masks"].dtype == torch.bool and found["masks"].shape == (len(found["boxes"]), 96, 96)
    register_parts(load_checkpoint(run / "best.ckpt")["config"], run / "best.ckpt")
    words = ["trainer=cpu", "trainer.enable_progress_bar=false", f"ckpt={run / 'best.ckpt'}", f"run_dir={tmp_path / 'predict'}"]
    predicted = predict(composed("predict", *words, f"image={picture}"))
    assert predicted and all(result["segmentation"]["size"] == [96, 96] for result in predicted)
    assert (tmp_path / "predict/pictures").is_dir()


def test_masks_need_a_head_and_segmentations(data, tmp_path):
    words = [*TINY, f"run_dir={tmp_path / 'run'}", f"data.root={data}", "trainer.max_steps=1"]
    with pytest.raises(ValueError, match=r"detector\.masks=true: the head has no branch for masks\. Choose mask_head=two_conv_small"):
        train(composed("train", *words, "detector.masks=true"))
    with pytest.raises(ValueError, match=r"this head learns masks, .* Set detector\.masks=true"):
        train(composed("train", *words, "mask_head=two_conv_small", "detector.masks=false"))
    with pytest.raises(ValueError, match=r"optimized_metric=val/segm_AP: .* by one of val/AP, .*val/loss_box$"):
        train(composed("train", *words, "optimized_metric=val/segm_AP"))


@pytest.mark.parametrize("group", ["backbone", "head", "proposals"])
def test_a_part_that_the_default_detector_needs_is_missed(data, tmp_path, group):
    with pytest.raises(ValueError, match=rf"{group}: nothing is chosen\. Choose a file of configs/{group}"):
        train(composed("train", *(text for text in DATA), f"run_dir={tmp_path}", f"data.root={data}", f"~{group}"))


def test_a_run_of_before_there_were_detectors_is_a_fast_rcnn(data, tmp_path, caplog):
    """Its configuration has no `detector`."""
    run = tmp_path / "run"
    train(composed("train", *TINY, f"run_dir={run}", f"data.root={data}", "trainer.max_steps=1"))
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    del checkpoint["config"]["detector"]
    torch.save(checkpoint, run / "last.ckpt")
    run_eval(run / "last.ckpt", tmp_path / "eval")
    train(
        composed("train", *TINY, f"run_dir={tmp_path / 'more'}", f"data.root={data}", "trainer.max_steps=2", f"resume={run / 'last.ckpt'}")
    )
    assert torch.load(tmp_path / "more/last.ckpt", weights_only=True)["global_step"] == 2
    assert "has another configuration: trainer.max_steps was 1 and is 2. Of" in caplog.text, "and nothing else"
