"""predict_cost.py: its tables, and the message of each mistake."""

import json
import shutil

import pytest
from omegaconf import OmegaConf

from roi_quantization.detection.common.errors import InputError, MissingFileError
from roi_quantization.detection.data.annotations import as_coco, read_instances
from roi_quantization.detection.evaluation.coco import evaluate, write_metrics
from roi_quantization.detection.evaluation.protocol import Protocol
from roi_quantization.scripts import predict_cost as script
from roi_quantization.scripts.predict_cost import predict_cost
from tests import configuration

TINY = ["data.source.train=2", "data.source.val=2", "data.source.test=12", "data.source.image_size=192", "data.source.sides=[32,80]"]
TINY += ["proposals.step=0.2", "resamples=50", "operators=[pool,warp,prroi]"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data") / "embedded"


@pytest.fixture
def composed(tmp_path, data):
    def compose_with(*overrides):
        return configuration.composed("predict_cost", f"picture={tmp_path / 'cost.png'}", f"data.root={data}", *TINY, *overrides)

    return compose_with


def write_results(folder, data, **changes):
    """Detections near every object of the test split, from proposals a little farther away."""
    instances = json.loads((data / "annotations/instances_test.json").read_text())
    results = []
    for i, a in enumerate(instances["annotations"]):
        x, y, w, h = a["bbox"]
        found = {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": [x + i % 3, y, w, h - i % 2], "score": 0.9}
        results.append({**found, "proposal": [x - 5, y + 3, w + 6, h], **changes})
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_ceilings_by_stride(composed, tmp_path, capsys):
    cfg = composed("backbone.stride=[8,32]")
    ceilings, predictions = predict_cost(cfg)
    ap = {stride: {name: one.metrics()["AP"] for name, one in of.items()} for stride, of in ceilings.items()}
    assert list(ap) == [8, 32] and list(ap[8]) == ["align", "pool", "warp", "prroi"] and predictions == {}
    assert ap[32]["align"] == ap[32]["prroi"] > ap[8]["pool"] > ap[32]["pool"] > 0
    text = capsys.readouterr().out
    assert "Ceiling at stride 32" in text and "A stride of 16 would make it" in text and "is expected to cost" not in text
    assert "of it on objects smaller than" in text
    assert all(len(line) <= 100 for line in text.splitlines() if not line.startswith(("At stride", "Ceiling", "The picture")))
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_predictions_from_results(composed, tmp_path, data, capsys):
    predict_cost(composed())
    results = write_results(tmp_path / "run", data)
    _, predictions = predict_cost(composed(f"results={results}"))
    assert list(predictions) == [16]
    assert predictions[16]["pool"]["AP"].value < -5 and predictions[16]["pool"]["AP"].has_interval
    assert predictions[16]["prroi"]["AP"].value == pytest.approx(0)
    assert "At stride 16 RoIPool is expected to cost" in capsys.readouterr().out


def load(cfg):
    """Read and check the results, and predict nothing."""
    return script.load_results(cfg, [16], script.load_split(cfg))


@pytest.mark.parametrize("of", [12, 4])  # images of the run's split: it was stopped, or had data.subset=4
def test_only_the_images_of_a_partial_evaluation_count(composed, tmp_path, data, capsys, of):
    predict_cost(composed())
    run = write_results(tmp_path / "run", data)
    results = json.loads((run / "results.json").read_text())
    ids = sorted({one["image_id"] for one in results})[:4]
    (run / "results.json").write_text(json.dumps([one for one in results if one["image_id"] in ids]))
    stats = {"stats": {}, "per_class": {}, "images": 4, "of": of, "partial": of > 4, "image_ids": ids}
    (run / "metrics.json").write_text(json.dumps(stats))
    _, predictions = predict_cost(composed(f"results={run}"))
    assert predictions[16]["align"]["AP"].value > 60, "objects of other images are not missed"
    assert "4 of 12 images, a partial evaluation" in capsys.readouterr().out


def test_an_operator_of_ones_own_is_left_out(composed, monkeypatch, capsys):
    own = OmegaConf.create({"_target_": "torchvision.ops.roi_align", "_partial_": True})
    read = script.read_operator
    monkeypatch.setattr(script, "read_operator", lambda name: own if name == "mine" else read(name))
    ceilings, _ = predict_cost(composed("operators=[mine,warp]"))
    assert list(ceilings[16]) == ["align", "warp"]
    assert "mine is left out: where this operator samples is not known." in capsys.readouterr().out
    with pytest.raises(InputError, match="reference=mine: where this operator samples is not known"):
        predict_cost(composed("reference=mine"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backbone.stride=0", "backbone.stride=0: expected a whole number of pixels above 0"),
        ("backbone.stride=12.5", "backbone.stride=12.5: expected a whole number"),
        ("backbone.stride=[]", r"backbone.stride=\[\]: expected a whole number"),
        ("output_size=a", "output_size=a: expected a whole number from 1 on"),
        ("resamples=0", "resamples=0: expected a whole number from 2 on"),
        ("split=train", "split=train: expected test or val"),
        (
            "data.eval_transform._target_=torchvision.transforms.v2.Identity",
            "data.eval_transform is torchvision.transforms.v2.Identity: to",
        ),
        ("data.eval_transform.short_side=[96,128]", r"data.eval_transform.short_side=\[96, 128\] is drawn from"),
        ("operators=[rol]", "there is no operator rol"),
        ("ckpt=runs/a/best.ckpt", "Evaluate it with `python eval.py ckpt=runs/a/best.ckpt split=test hydra.run.dir=runs/evaluated`"),
    ],
)
def test_mistakes_are_named(composed, override, message):
    with pytest.raises(InputError, match=message):
        predict_cost(composed(override))


def test_results_that_do_not_belong_here_are_refused(composed, tmp_path, data):
    with pytest.raises(MissingFileError, match="results=nowhere: there is no such file"):
        predict_cost(composed("results=nowhere"))
    predict_cost(composed())
    with pytest.raises(InputError, match=r"results of 1 images that are not in split=test of this data set, the first is image 999"):
        predict_cost(composed(f"results={write_results(tmp_path / 'other', data, image_id=999)}"))
    run = write_results(tmp_path / "run", data)
    (run / "metrics.json").write_text(json.dumps({"stats": {}, "per_class": {}, "image_ids": [998]}))
    with pytest.raises(InputError, match=r"of 1 images that are not in split=test of this data set, the first is image 998"):
        predict_cost(composed(f"results={run}"))
    (run / "results.json").write_text("[]")
    with pytest.raises(InputError, match="holds no results"):
        predict_cost(composed(f"results={run}"))
    (run / "results.json").write_text('[{"image')
    with pytest.raises(InputError, match="is not a json file"):
        predict_cost(composed(f"results={run}"))
    run = write_results(tmp_path / "plain", data)
    without = [{key: value for key, value in one.items() if key != "proposal"} for one in json.loads((run / "results.json").read_text())]
    (run / "results.json").write_text(json.dumps(without))
    with pytest.raises(InputError, match="have no `proposal`"):
        predict_cost(composed(f"results={run}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backbone.stride=32", r"are of a run at stride 32. Set backbone.stride=32"),
        ("data.eval_transform.short_side=100", "are of a run with data.eval_transform.short_side=100, here it is None"),
        ("data.eval_transform._target_=my.resize", "of their run, data.eval_transform is my.resize: to what size"),
        ("detector=torchvision", "are of a detector without a backbone of one stride, as a pyramid"),
        ("head.extractor.output_size=14", "are of a run with 14 bins per side, here there are 7. Set output_size=14"),
        ("roi=pool", "are of a run with another operator than reference=align"),
    ],
)
def test_results_of_a_run_with_other_settings_are_refused(composed, tmp_path, data, override, message):
    script.load_split(composed())
    run = write_results(tmp_path / "run", data)
    OmegaConf.save(configuration.composed("train", f"run_dir={run}", f"data.root={data}", override), run / "config.yaml", resolve=True)
    with pytest.raises(InputError, match=message):
        load(composed(f"results={run}"))


@pytest.mark.parametrize("reference", ["pool", "warp", "pool_bins"])
def test_results_of_an_operator_that_rounds_are_refused(composed, reference):
    with pytest.raises(InputError, match=rf"reference={reference} with results=runs/a: this operator rounds .* such as reference=align"):
        predict_cost(composed(f"reference={reference}", "results=runs/a"))


def test_results_of_weights_that_another_operator_trained_are_refused(composed, tmp_path, data):
    script.load_split(composed())
    run = write_results(tmp_path / "evaluated", data)
    for folder, content in ((run, {"ckpt": str(tmp_path / "pool/best.ckpt")}), (tmp_path / "pool", {})):
        folder.mkdir(exist_ok=True)
        config = configuration.composed("train", f"run_dir={folder}", f"data.root={data}", "roi=align" if content else "roi=pool")
        OmegaConf.save(OmegaConf.merge(OmegaConf.to_container(config, resolve=True), content), folder / "config.yaml")
    with pytest.raises(InputError, match=r"are of weights that were trained in .*pool with another operator than reference=align"):
        load(composed(f"results={run}"))


def test_results_of_a_cross_evaluation_are_refused_by_their_name(composed, tmp_path, data):
    """The configuration beside them is that of the weights, so it names align."""
    script.load_split(composed())
    run = write_results(tmp_path / "run", data)
    OmegaConf.save(configuration.composed("train", f"run_dir={run}", f"data.root={data}"), run / "config.yaml", resolve=True)
    for name in ("pool", "align", "mine"):
        shutil.copy(run / "results.json", run / f"results_{name}.json")
    with pytest.raises(InputError, match=r"results_pool.json are of weights that were tested with pool, and not of reference=align"):
        load(composed(f"results={run}/results_pool.json"))
    for name in ("align", "mine"):  # no name of another operator
        assert load(composed(f"results={run}/results_{name}.json"))


def test_results_that_have_another_ap_on_this_split_are_refused(composed, tmp_path, data):
    """Where ids begin anew in each split they do not tell that results are of another."""
    script.load_split(composed())
    run, path = write_results(tmp_path / "run", data), data / "annotations/instances_test.json"
    results = json.loads((run / "results.json").read_text())
    truth = as_coco(read_instances(path))
    write_metrics(run / "metrics.json", evaluate(truth, results, sorted(truth.imgs)))
    assert load(composed(f"results={run}"))

    def other_root(name, change):
        root = shutil.copytree(data, tmp_path / name)
        content = json.loads(path.read_text())
        change(content)
        (root / "annotations/instances_test.json").write_text(json.dumps(content))
        return [f"data.root={root}", "~data.source"]

    def turn_objects(content):
        ids = [image["id"] for image in content["images"]]
        for annotation in content["annotations"]:
            annotation["image_id"] = ids[-1 - ids.index(annotation["image_id"])]

    def rename(content):
        for entry, key in [(one, "id") for one in content["categories"]] + [(one, "category_id") for one in content["annotations"]]:
            entry[key] += 20

    message = r"have AP [\d.]+ here, and [\d.]+ in metrics.json.* another split than test, of other data than data.root=.* data.classes"
    with pytest.raises(InputError, match=message):
        load(composed(f"results={run}", *other_root("turned", turn_objects)))
    with pytest.raises(InputError, match=r"results.json: result 0 .*another split than test"):
        load(composed(f"results={run}", *other_root("renamed", rename)))
    (run / "results.json").write_text(json.dumps(results[1:]))
    with pytest.raises(InputError, match=message):
        load(composed(f"results={run}"))


def test_the_prediction_is_of_the_thresholds_and_the_number_of_detections_of_the_run(composed, tmp_path, data, capsys):
    script.load_split(composed())
    run = write_results(tmp_path / "run", data)
    results = json.loads((run / "results.json").read_text())
    truth = as_coco(read_instances(data / "annotations/instances_test.json"))
    own = evaluate(truth, results, sorted(truth.imgs), 1, protocol=Protocol((0.3, 0.5), max_detections=1))
    write_metrics(run / "metrics.json", own)
    _, predictions = predict_cost(composed(f"results={run}"))
    assert predictions[16]["align"]["AP"].value == pytest.approx(own.stats["AP"])
    assert own.stats["AP"] != pytest.approx(evaluate(truth, results, sorted(truth.imgs)).stats["AP"])
    assert "Of the results: Up to 1 detections" in capsys.readouterr().out


@pytest.mark.parametrize("content", ['{"iteration": 19}\n{"iteration": 39}', "[]", '{"stats": {}}'])
def test_metrics_of_other_programs_say_nothing_of_the_results(composed, tmp_path, data, content):
    script.load_split(composed())
    run = write_results(tmp_path / "run", data)
    (run / "metrics.json").write_text(content)
    _, image_ids, _ = load(composed(f"results={run}"))
    assert len(image_ids) == 12


def test_a_set_without_objects_is_refused(composed, tmp_path, data):
    predict_cost(composed())
    root = shutil.copytree(data, tmp_path / "copy")
    path = root / "annotations/instances_test.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    with pytest.raises(InputError, match="no objects"):
        predict_cost(composed(f"data.root={root}", "~data.source"))
