"""COCO's metrics as plain pycocotools has them, and as faster-coco-eval has them: on real annotations, and where much falls together."""

import contextlib
import copy
import io
import json
import math
import random
import sys

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pytest import approx

from roi_quantization.detection.data.annotations import as_coco, read_instances
from roi_quantization.detection.data.masks import encode
from roi_quantization.detection.evaluation.coco import evaluate
from roi_quantization.detection.evaluation.matching import SilentCOCOeval, faster_coco_eval, match
from tests.detection.evaluation.coco_sets import annotation, coco, result
from tests.trainings import run_train


def imagined_results(gt, seed=0):
    """Shifted and missed ground truth, some of it under another class, and boxes out of nowhere."""
    draw = random.Random(seed)
    results = []
    for a in gt.dataset["annotations"]:
        x, y, w, h = a["bbox"]
        for _ in range(draw.choice([0, 1, 1, 2])):
            shifted = [x + draw.gauss(0, 0.1) * w, y + draw.gauss(0, 0.1) * h, w * draw.uniform(0.8, 1.2), h * draw.uniform(0.8, 1.2)]
            category_id = a["category_id"] if draw.random() < 0.9 else draw.choice(list(gt.cats))
            results.append(result(a["image_id"], shifted, draw.random(), category_id))
    for _ in range(100):
        box = [draw.uniform(0, 300), draw.uniform(0, 200), draw.uniform(1, 200), draw.uniform(1, 200)]
        results.append(result(draw.choice(list(gt.imgs)), box, draw.random(), draw.choice(list(gt.cats))))
    return results


@pytest.mark.parametrize("part", [slice(None), slice(20)], ids=["all images", "twenty"])
def test_agrees_with_plain_pycocotools_on_coco(real_data, part):
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(real_data / "coco/annotations/instances_val2017.json"))
        image_ids = sorted(gt.imgs)[part]
        results = imagined_results(gt)
        plain = COCOeval(gt, gt.loadRes(copy.deepcopy(results)), "bbox")
        plain.params.imgIds = image_ids
        plain.evaluate()
        plain.accumulate()
        plain.summarize()
    assert any(a["iscrowd"] for i in image_ids for a in gt.imgToAnns[i])

    metrics = evaluate(gt, results, image_ids)
    assert list(metrics.stats.values()) == approx([100 * s if s > -1 else math.nan for s in plain.stats], nan_ok=True)
    assert 0 < metrics.stats["AP"] < 100
    for k, category in enumerate(gt.loadCats(sorted(gt.cats))):
        expected = plain.eval["precision"][0, :, k, 0, 2].mean()
        assert metrics.per_class[category["name"]]["AP50"] == approx(100 * expected if expected > -1 else math.nan, nan_ok=True)


def crowded_set(seed, images=8, classes=3):
    """Annotations, results and image ids; integer boxes on a coarse grid and few scores, so that IoUs, sizes and scores fall together.

    There are crowd regions, images and classes without objects, boxes of no size, sizes on the edge of their range (32^2), and more
    detections than 10 of one class in an image.
    """
    rng = np.random.default_rng(seed)

    def boxes(count):
        return np.concatenate([8 * rng.integers(0, 20, (count, 2)), 8 * rng.integers(0, 14, (count, 2))], axis=1).tolist()

    annotations, results = [], []
    for image_id in range(1, images + 1):
        found = boxes(0 if image_id == 3 else rng.integers(1, 7))
        for box in found:
            category_id = int(rng.integers(1, classes))  # the last has none
            crowd = int(rng.random() < 0.2)
            annotations.append(annotation(image_id, box, category_id, iscrowd=crowd))
        near = [[max(0, side) for side in (np.array(box) + rng.integers(-1, 2, 4) * 4).tolist()] for box in found * 4]
        for box in near + boxes(20):
            score = round(float(rng.random()), 1)
            results.append(result(image_id, box, score, int(rng.integers(1, classes + 1))))
    gt = coco(*annotations, images=range(1, images + 1))
    gt.dataset["categories"] = [{"id": i, "name": f"class {i}"} for i in range(1, classes + 1)]
    with contextlib.redirect_stdout(io.StringIO()):
        gt.createIndex()
    rng.shuffle(results)
    return gt, results, [*range(1, images)]  # the last image is left out


@pytest.fixture
def faster():
    pytest.importorskip("faster_coco_eval", reason='needs faster-coco-eval: pip install -e ".[faster-evaluation]"')
    return faster_coco_eval()


@pytest.mark.parametrize("max_detections", [100, 5])
@pytest.mark.parametrize("seed", range(20))
def test_faster_coco_eval_finds_the_same(faster, seed, max_detections):
    gt, results, image_ids = crowded_set(seed)
    expected, found = (match(gt, results, image_ids, max_detections, coco_eval=which) for which in (SilentCOCOeval, faster))
    for one in (expected, found):
        one.accumulate()
    assert np.array_equal(found.eval["recall"], expected.eval["recall"])
    assert np.array_equal(found.eval["scores"], expected.eval["scores"])
    apart = np.abs(found.eval["precision"] - expected.eval["precision"])
    assert apart.max() <= np.finfo(float).eps, "pycocotools adds 2e-16 to what it divides by"

    plain, fast = (evaluate(gt, results, image_ids, max_detections, which) for which in (SilentCOCOeval, faster))
    assert 0 < plain.stats["AP"] < 100
    assert fast.stats == approx(plain.stats, rel=1e-12, nan_ok=True)
    assert list(fast.per_class) == list(plain.per_class)
    for name, values in plain.per_class.items():
        assert fast.per_class[name] == approx(values, rel=1e-12, nan_ok=True), name


@pytest.mark.parametrize("results", [[], [result(1)], [result(3)]], ids=["none", "found", "on an empty image"])
@pytest.mark.parametrize("annotations", [[], [annotation(1)]], ids=["no objects", "one object"])
def test_faster_coco_eval_of_next_to_nothing(faster, capsys, annotations, results):
    plain, fast = (evaluate(coco(*annotations), results, [1, 2, 3], coco_eval=which) for which in (SilentCOCOeval, faster))
    assert fast.stats == approx(plain.stats, rel=1e-12, nan_ok=True)
    assert capsys.readouterr().out == ""


def test_faster_coco_eval_on_coco(faster, real_data):
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(real_data / "coco/annotations/instances_val2017.json"))
    plain, fast = (evaluate(gt, imagined_results(gt), list(gt.imgs)[:500], coco_eval=which) for which in (SilentCOCOeval, faster))
    assert fast.stats == approx(plain.stats, rel=1e-12, nan_ok=True)
    for name, values in plain.per_class.items():
        assert fast.per_class[name] == approx(values, rel=1e-12, nan_ok=True), name


def test_masks_on_coco(faster, real_data):
    """Polygons, and run lengths of crowds; detections are masks moved by a few pixels. As plain pycocotools has it."""
    gt = as_coco(read_instances(real_data / "coco/annotations/instances_val2017.json", masks=True))
    draw, results = random.Random(0), []
    for a in gt.dataset["annotations"]:
        moved = np.roll(gt.annToMask(a), draw.randint(-4, 4), axis=1)
        (segmentation,) = encode(torch.from_numpy(moved)[None])
        results.append(result(a["image_id"], a["bbox"], draw.random(), a["category_id"], segmentation=segmentation))
    image_ids = sorted(gt.imgs)
    metrics = evaluate(gt, results, image_ids, masks=True)
    with contextlib.redirect_stdout(io.StringIO()):
        plain = COCOeval(gt, gt.loadRes([{key: value for key, value in one.items() if key != "bbox"} for one in results]), "segm")
        plain.evaluate()
        plain.accumulate()
        plain.summarize()
    names = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"]
    assert {name: metrics.stats[f"segm_{name}"] for name in names} == approx(dict(zip(names, 100 * plain.stats, strict=True)))
    assert 0 < metrics.stats["segm_AP90"] < metrics.stats["segm_AP75"] < 100
    assert evaluate(gt, results, image_ids, coco_eval=faster, masks=True).stats == approx(metrics.stats, rel=1e-12)


def test_without_faster_coco_eval_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ImportError, match=r'coco_eval=faster needs .* pip install -e "\.\[faster-evaluation\]"'):
        faster_coco_eval()


def test_plain_pycocotools_recomputes_the_metrics_of_a_trained_detector(tmp_path):
    """From the files of a run alone: annotations and results.json. The detector has learned its four images by heart."""
    overfit = ["data.test={images: train, annotations: annotations/instances_train.json}", "data.val=null", "optimized_metric=test/AP"]
    overfit += ["data.source.train=4", "data.train_transform.flip=0", "backbone.width=0.125", "optim.groups.lr=5e-3"]
    run_train(tmp_path, *overfit, "trainer.max_epochs=60", "threads=1")
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(tmp_path / "data/annotations/instances_train.json"))
        plain = COCOeval(gt, gt.loadRes(str(tmp_path / "run" / "results.json")), "bbox")
        plain.evaluate()
        plain.accumulate()
        plain.summarize()
    stats = [math.nan if value is None else value for value in written["stats"].values()]
    assert stats == approx([100 * s if s > -1 else math.nan for s in plain.stats], nan_ok=True)
    assert written["stats"]["AP"] > 30, "a comparison of zeros shows nothing"
    assert (written["images"], written["of"], written["partial"]) == (4, 4, False)
