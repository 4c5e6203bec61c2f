"""train.py and eval.py from end to end, on a handful of small images."""

import csv
import json
import runpy
import shutil
import sys

import pytest
import torch
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from PIL import Image

from roi_quantization.detection.runs.checkpoint import load_checkpoint, register_checkpoint, register_parts
from roi_quantization.scripts.predict import predict
from tests import commands
from tests.configuration import ROOT, composed
from tests.trainings import TINY, run_eval, run_train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of one short training, and what `train` returned."""
    folder = tmp_path_factory.mktemp("trained")
    metrics = run_train(folder, "trainer.max_epochs=6", "optim.groups.lr=5e-3", "cross=[align,pool]")
    return folder, metrics


def test_the_run_folder_describes_the_run(trained):
    folder, metrics = trained
    run = folder / "run"
    cfg = OmegaConf.load(run / "config.yaml")
    assert cfg.data.root == str(folder / "data") and cfg.head.extractor.operator == cfg.roi, "resolved"

    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 12, "8 images in batches of 4, 6 epochs"
    assert sum(losses[-4:]) < sum(losses[:4]), "the loss falls"
    assert (
        [row["step"] for row in rows if row["val/AP"]]
        == [row["step"] for row in rows if row["val/loss"]]
        == ["1", "3", "5", "7", "9", "11"]
    )
    assert all(0 <= float(row["train/waiting"]) <= 1 for row in rows if row["train/loss"])
    best = max(float(row["val/AP"]) for row in rows if row["val/AP"])
    assert metrics["val/AP"] == pytest.approx(best, rel=1e-5), "what main returns is the best checkpoint's"

    results = json.loads((run / "results.json").read_text())
    test_ids = {image["id"] for image in json.loads((folder / "data/annotations/instances_test.json").read_text())["images"]}
    assert results and {result["image_id"] for result in results} <= test_ids, "the numbers reported are those of test"
    assert all(len(result["proposal"]) == 4 for result in results), "each with the RoI it was regressed from"
    written = json.loads((run / "metrics.json").read_text())
    assert written["stats"]["AP"] == pytest.approx(metrics["test/AP"])
    assert len(written["per_class"]) == 5 and all(set(values) == {"AP", "AP50", "AP75"} for values in written["per_class"].values())
    assert list(json.loads((run / "data.json").read_text())) == ["train", "val", "test"], "what the data were"
    for picture in ("curves.png", "detections.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_holds_categories_and_configuration_and_no_code(trained):
    folder, _ = trained
    for name in ("best.ckpt", "last.ckpt"):
        checkpoint = torch.load(folder / "run" / name, weights_only=True)
        assert checkpoint["config"]["backbone"]["width"] == 0.0625
        assert len(checkpoint["categories"]) == 5


def test_eval_reproduces_what_train_reported(trained, tmp_path):
    folder, metrics = trained
    again = run_eval(folder / "run" / "best.ckpt", tmp_path)
    assert again["test/AP"] == metrics["test/AP"]
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads((folder / "run" / "results.json").read_text())


def test_eval_with_another_operator_finds_something_else(trained, tmp_path):
    folder, _ = trained
    run_eval(folder / "run" / "best.ckpt", tmp_path, "roi=pool")
    assert (tmp_path / "results.json").read_text() != (folder / "run" / "results.json").read_text()
    assert OmegaConf.load(tmp_path / "config.yaml").head.extractor.operator.quantize_roi == "round"


def test_cross_evaluation_is_what_eval_says_of_the_other_operator(trained, tmp_path):
    folder, _ = trained
    cross = json.loads((folder / "run" / "cross.json").read_text())
    assert list(cross) == ["align", "pool"]
    assert cross["align"] == json.loads((folder / "run" / "metrics.json").read_text())
    run_eval(folder / "run" / "best.ckpt", tmp_path, "roi=pool")
    assert cross["pool"] == json.loads((tmp_path / "metrics.json").read_text()) != cross["align"]


def test_eval_on_another_split_and_a_subset(trained, tmp_path):
    folder, _ = trained
    metrics = run_eval(folder / "run" / "best.ckpt", tmp_path, "split=val", "data.subset=1", "head.score_threshold=0")
    assert set(metrics) >= {"val/AP", "val/AP50", "val/AP75"}
    assert len({result["image_id"] for result in json.loads((tmp_path / "results.json").read_text())}) == 1


def test_a_partial_evaluation_says_so_wherever_its_figures_go(trained, tmp_path, capsys):
    folder, _ = trained
    run_eval(folder / "run" / "best.ckpt", tmp_path, "data.eval_batch_size=1", "+trainer.limit_test_batches=1")
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert (written["images"], written["of"], written["partial"]) == (1, 4, True)
    assert "best.ckpt on test: 1 of 4 images, a partial evaluation" in capsys.readouterr().out


def test_other_iou_thresholds_and_sizes_are_named_wherever_their_figures_go(trained, tmp_path, capsys):
    folder, metrics = trained
    knobs = ["coco_eval.iou_thresholds=[0.1,0.3]", "coco_eval.areas=[[tiny,0,40],[other,40,null]]"]
    found = run_eval(folder / "run" / "best.ckpt", tmp_path, *knobs)
    assert "test/AP" not in found and found["test/AP_iou0.1_0.3"] > metrics["test/AP"] and found["test/AP50"] == metrics["test/AP50"]
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["iou_thresholds"] == [0.1, 0.3] and written["stats"]["AP"] == pytest.approx(found["test/AP_iou0.1_0.3"])
    assert "AP and AR are means over IoU 0.1, 0.3, where COCO has" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"coco_eval\.iou_thresholds=\[3, 1\]: expected ascending"):
        run_eval(folder / "run" / "best.ckpt", tmp_path, "coco_eval.iou_thresholds=[3,1]")


def test_an_evaluation_of_nothing_is_refused_before_training(trained, tmp_path):
    folder, _ = trained
    (tmp_path / "data").symlink_to(folder / "data")
    for overrides, message in [
        (["+trainer.limit_test_batches=0"], r"trainer\.limit_test_batches=0: nothing would be evaluated"),
        (["data.test=null", "+trainer.limit_val_batches=0"], r"trainer\.limit_val_batches=0: nothing would be evaluated"),
        (["data.val=null", "data.test=null"], "the data have no val and no test split"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_train(tmp_path, *overrides)
    assert not list((tmp_path / "run").glob("*.ckpt")) and not (tmp_path / "run" / "metrics.json").exists()
    with pytest.raises(ValueError, match="limit_test_batches=0: nothing would be evaluated"):
        run_eval(folder / "run" / "best.ckpt", tmp_path / "eval", "+trainer.limit_test_batches=0")


def test_a_split_that_is_not_there_names_the_other(trained, tmp_path):
    folder, _ = trained
    with pytest.raises(ValueError, match=r"split=test: this data set has no such split\. Set split=val"):
        run_eval(folder / "run" / "best.ckpt", tmp_path, "data.test=null", "split=test")
    metrics = run_eval(folder / "run" / "best.ckpt", tmp_path, "data.test=null")
    assert "val/AP" in metrics and OmegaConf.load(tmp_path / "config.yaml").split == "val", "as train.py reports"


def test_a_folder_may_have_the_name_of_a_number(trained, tmp_path, monkeypatch):
    folder, _ = trained
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2012").symlink_to(folder / "data")
    (tmp_path / "2024").mkdir()
    shutil.copy(next((folder / "data/test").iterdir()), "2024/one.png")
    shutil.copy(folder / "run" / "best.ckpt", "7")
    metrics = run_eval("7", tmp_path / "eval", "data.root=2012")
    assert metrics == run_eval(folder / "run" / "best.ckpt", tmp_path / "again")
    run_predict("7", tmp_path / "predict", "2024")
    assert len(json.loads((tmp_path / "predict/instances.json").read_text())["images"]) == 1


@pytest.mark.slow  # test_a_sweep_goes_on_after_a_run_that_fails is of trainings
def test_a_sweep_over_checkpoints_evaluates_those_that_can_be_and_ends_with_an_error(trained, tmp_path):
    """By names that have to be quoted, and with one that does not exist."""
    folder, _ = trained
    (tmp_path / "a=b, (c) é.ckpt").symlink_to(folder / "run" / "best.ckpt")
    (tmp_path / "last.ckpt").symlink_to(folder / "run" / "last.ckpt")
    command = [ROOT / "eval.py", "-m", "ckpt='a=b, (c) é.ckpt',gone.ckpt,last.ckpt", "hydra.sweep.dir=sweep"]
    ended = commands.run(*command, "trainer=cpu", cwd=tmp_path)
    assert ended.returncode == 1, ended.stderr
    assert "eval.py: there is no checkpoint gone.ckpt" in ended.stdout and "1 run failed. sweep/1_" in ended.stderr
    assert "MissingFileError" in next(tmp_path.glob("sweep/1_*/failed.txt")).read_text()
    first, third = (next(tmp_path.glob(f"sweep/{job}_*/results.json")).read_text() for job in (0, 2))
    assert first == (folder / "run" / "results.json").read_text() != third


def test_an_evaluation_that_cannot_begin_leaves_the_one_before_and_another_replaces_all_of_it(trained, tmp_path):
    folder, _ = trained
    run_eval(folder / "run" / "best.ckpt", tmp_path / "eval", "cross=[align,pool]")
    before = {path.name: path.read_bytes() for path in (tmp_path / "eval").iterdir()}
    assert {"config.yaml", "results_pool.json", "cross.json", "differences.json"} <= set(before)
    with pytest.raises(ValueError, match="does not fit the detector"):
        run_eval(folder / "run" / "best.ckpt", tmp_path / "eval", "head.extractor.output_size=5")
    assert {path.name: path.read_bytes() for path in (tmp_path / "eval").iterdir()} == before
    run_eval(folder / "run" / "best.ckpt", tmp_path / "eval", "roi=pool")
    after = {path.name for path in (tmp_path / "eval").iterdir()}
    assert set(before) - after == {"results_pool.json", "cross.json", "differences.json"}
    assert OmegaConf.load(tmp_path / "eval/config.yaml").roi.quantize_roi == "round"


def test_eval_names_classes_that_differ(trained, tmp_path):
    folder, _ = trained
    instances = json.loads((folder / "data/annotations/instances_test.json").read_text())
    instances["categories"].append({"id": 1000, "name": "hexagon"})
    (tmp_path / "more.json").write_text(json.dumps(instances))
    with pytest.raises(ValueError, match=r"trained on 5 classes \(.*\), the data has 6 \(.*hexagon\)"):
        run_eval(folder / "run" / "best.ckpt", tmp_path, f"data.test.annotations={tmp_path / 'more.json'}")


def test_eval_names_shapes_that_differ(trained, tmp_path):
    folder, _ = trained
    with pytest.raises(ValueError, match=r"does not fit the detector.*Was backbone, head.extractor.output_size"):
        run_eval(folder / "run" / "best.ckpt", tmp_path, "head.extractor.output_size=5")


def run_predict(ckpt, folder, image, *overrides):
    register_parts(load_checkpoint(ckpt)["config"], ckpt)
    overrides = ["trainer=cpu", "trainer.enable_progress_bar=false", f"ckpt={ckpt}", f"run_dir={folder}", f"image={image}", *overrides]
    return predict(composed("predict", *overrides))


def test_predict_finds_in_pictures_what_eval_finds_in_the_data(trained, tmp_path):
    folder, _ = trained
    results = run_predict(folder / "run" / "best.ckpt", tmp_path, folder / "data/test")
    assert results == json.loads((tmp_path / "results.json").read_text())
    instances = json.loads((tmp_path / "instances.json").read_text())
    test = json.loads((folder / "data/annotations/instances_test.json").read_text())
    id_of = {image["file_name"]: image["id"] for image in test["images"]}
    ours = {image["id"]: id_of[image["file_name"]] for image in instances["images"]}
    assert instances["categories"] == sorted(test["categories"], key=lambda category: category["id"])
    of_eval = json.loads((folder / "run" / "results.json").read_text())
    # apart in the last digit, since evaluation takes several images at a time
    found = {(ours[r["image_id"]], r["category_id"], *r["proposal"]): [r["score"], *r["bbox"]] for r in results}
    expected = {(r["image_id"], r["category_id"], *r["proposal"]): [r["score"], *r["bbox"]] for r in of_eval}
    assert len(results) == len(of_eval)
    assert found == {key: pytest.approx(values, abs=2e-3) for key, values in expected.items()}
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == sorted(f"{name}.png" for name in id_of)


def test_another_prediction_replaces_all_of_the_one_before(trained, tmp_path):
    folder, _ = trained
    first, second = sorted((folder / "data/test").iterdir())[:2]
    for picture in (first, second):
        run_predict(folder / "run/best.ckpt", tmp_path, picture)
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == [f"{second.name}.png"]
    with pytest.raises(ValueError, match=r"image=.* contains .*/pictures, where this run draws"):
        run_predict(folder / "run/best.ckpt", tmp_path, tmp_path / "pictures")


def test_predict_reads_any_picture_and_names_those_it_cannot(trained, tmp_path, capsys):
    folder, _ = trained
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    picture = Image.open(next((folder / "data/test").iterdir()))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture.resize((80, 60)).save(photos / "lying.jpg", exif=exif)
    picture.convert("CMYK").save(photos / "sub/cmyk.jpg")
    content = (photos / "lying.jpg").read_bytes()
    (photos / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (photos / "notes.txt").write_text("no picture")
    run_predict(folder / "run" / "best.ckpt", tmp_path / "out", photos, "head.score_threshold=0", "score_threshold=0")
    sizes = {i["file_name"]: (i["width"], i["height"]) for i in json.loads((tmp_path / "out/instances.json").read_text())["images"]}
    assert sizes == {"lying.jpg": (60, 80), "sub/cmyk.jpg": (96, 96)}
    drawn = Image.open(tmp_path / "out/pictures/lying.jpg.png")
    assert drawn.size == (750, 1000), "upright"
    text = capsys.readouterr().out
    assert "2 of 3 pictures" in text and "could not be read" in text and "truncated.jpg: image file is truncated" in text


@pytest.mark.parametrize(
    ("image", "overrides", "message"),
    [
        ("null", [], "Set image="),
        ("nowhere", [], "image=nowhere: there is no such picture or folder"),
        (".", [], r"image=\.: there are no pictures in this folder"),
        ("broken.png", [], r"image=broken.png: none of 1 pictures can be read; broken.png: cannot identify"),
        ("whole.png", ["score_threshold=50"], r"score_threshold=50: expected a number from 0 to 1"),
        ("whole.png", ["trainer.devices=2", "+trainer.strategy=ddp"], r"runs in one process, and trainer asks for 2. Set trainer=default"),
        ("whole.png", ["proposals=file", "proposals.test.path=some.npz"], "it has no windows for these pictures"),
    ],
)
def test_predict_names_mistakes(trained, tmp_path, monkeypatch, image, overrides, message):
    folder, _ = trained
    monkeypatch.chdir(tmp_path)
    if image != ".":
        (tmp_path / "broken.png").write_bytes(b"no picture")
        Image.new("RGB", (96, 96)).save("whole.png")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_predict(folder / "run" / "best.ckpt", tmp_path / "out", image, *overrides)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], r"no checkpoint is given\. Set ckpt="),
        (["ckpt=missing.ckpt"], r"there is no checkpoint missing\.ckpt"),
        (["ckpt=half.ckpt"], r"half\.ckpt is not an intact checkpoint"),
    ],
)
def test_eval_without_a_checkpoint_says_so(trained, tmp_path, monkeypatch, arguments, message):
    folder, _ = trained
    content = (folder / "run" / "best.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(content[: len(content) // 2])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        register_checkpoint(arguments, "eval.py")


def weights_of(folder):
    return torch.load(folder / "run" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_epochs")
    run_train(folder, "optim=sgd", "trainer.max_epochs=2")
    return weights_of(folder)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(two_epochs, tmp_path):
    """Order, flips and RoI sampling are functions of (seed, epoch), not of what was drawn before: one epoch and one more are two."""
    first, second = tmp_path / "first", tmp_path / "second"
    run_train(first, "optim=sgd", "trainer.max_epochs=1")
    run_train(second, "optim=sgd", "trainer.max_epochs=2", f"resume={first / 'run' / 'last.ckpt'}")
    resumed = weights_of(second)
    assert all(torch.equal(resumed[key], value) for key, value in two_epochs.items())


@pytest.mark.parametrize(
    ("metric", "column", "knobs"),
    [
        ("val/loss", "val/loss", []),
        ("val/AP", "val/AP", []),
        ("val/AP", "val/AP_iou0.1_0.3", ["coco_eval.iou_thresholds=[0.1,0.3]", "cross=[pool]"]),
    ],
)
def test_the_best_checkpoint_has_the_most_ap_or_the_least_loss(tmp_path, metric, column, knobs, capsys):
    overrides = ["trainer.max_epochs=3", f"optimized_metric={metric}", "optim.groups.lr=2e-2", "head.box_head.dropout=0.5"]
    returned = run_train(tmp_path, *overrides, *knobs)
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        validations = [row for row in csv.DictReader(file) if row["val/loss"]]
    assert len(validations) == 3
    best = {"val/loss": min, "val/AP": max}[metric](
        validations, key=lambda row: float(row[column])
    )  # the first of equals, as in ModelCheckpoint
    assert returned[metric] == pytest.approx(float(best[column]), rel=1e-5)
    if knobs:
        assert "  pool                AP_iou0.1_0.3 " in capsys.readouterr().out
        assert json.loads((tmp_path / "run/cross.json").read_text())["pool"]["iou_thresholds"] == [0.1, 0.3]
    assert torch.load(tmp_path / "run" / "best.ckpt", weights_only=True)["global_step"] == int(best["step"]) + 1


def test_the_best_of_another_run_is_not_the_best_of_the_one_that_begins_there(trained, tmp_path, caplog):
    """It goes on from a training that is over, so that there is nothing to validate."""
    folder, _ = trained
    (tmp_path / "data").symlink_to(folder / "data")
    run_train(tmp_path, "trainer.max_epochs=6", "optim.groups.lr=5e-3", f"resume={folder / 'run' / 'last.ckpt'}")
    assert "Training was complete at step 12: nothing was trained. Set a larger trainer.max_epochs" in caplog.text
    assert "first validation" not in caplog.text
    best, last = (torch.load(tmp_path / "run" / name, weights_only=True)["state_dict"] for name in ("best.ckpt", "last.ckpt"))
    assert all(torch.equal(best[key], value) for key, value in last.items())


def test_another_seed_is_another_run(two_epochs, tmp_path):
    run_train(tmp_path, "optim=sgd", "trainer.max_epochs=1", "seed=1")
    key = "detector.backbone.features.0.weight"
    assert not torch.equal(weights_of(tmp_path)[key], two_epochs[key])


def test_without_a_validation_set_the_last_weights_are_the_result(trained, tmp_path, caplog):
    folder, _ = trained
    (tmp_path / "data").symlink_to(folder / "data")
    metrics = run_train(tmp_path, "trainer.max_steps=1", "data.val=null", "optimized_metric=test/AP")
    assert metrics["test/AP"] >= 0 and "validation" not in caplog.text
    best, last = (torch.load(tmp_path / "run" / name, weights_only=True)["state_dict"] for name in ("best.ckpt", "last.ckpt"))
    assert all(torch.equal(best[key], value) for key, value in last.items())


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_run_that_fails(tmp_path):
    command = [ROOT / "train.py", "-m", "optim.groups.lr=1e30,1e-3", "hydra.sweep.dir=sweep", *TINY]
    ended = commands.run(*command, "trainer.max_epochs=2", "logger=null", cwd=tmp_path)
    assert ended.returncode == 1, ended.stderr
    assert "train.py: the loss is " in ended.stdout and "1 run failed" in ended.stderr and "Traceback" not in ended.stdout
    (failed,) = tmp_path.glob("sweep/0_*/train.log")
    assert "Traceback" in failed.read_text() and "NonFiniteLossError" in failed.with_name("failed.txt").read_text()
    (second,) = tmp_path.glob("sweep/1_*/metrics.json")
    assert not second.with_name("curves.png").exists() and "No curves.png: there is no metrics.csv" in ended.stdout


def test_an_unknown_operator_lists_the_choices():
    with pytest.raises(MissingConfigException, match=r"(?s)Could not find 'roi/polo'.*align.*pool"):
        composed("train", "roi=polo")


@pytest.mark.parametrize("script", ["train.py", "eval.py", "predict.py"])
def test_help_lists_the_choices(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("roi: ", "align", "pool", "data: ", "Examples"))
    assert not list(tmp_path.iterdir())
