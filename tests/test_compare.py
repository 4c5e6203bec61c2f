"""compare.py from end to end, on sets small enough to compute by hand."""

import json
import re

import pytest
from pytest import approx

from roi_quantization.detection.evaluation.coco import Metrics, write_metrics
from roi_quantization.detection.evaluation.error_types import ERROR_TYPES, ErrorSplit
from roi_quantization.detection.evaluation.matching import SilentCOCOeval
from roi_quantization.detection.evaluation.statistics import Estimate
from roi_quantization.scripts import compare
from tests.detection.evaluation.coco_sets import DOG, annotation, coco, result

IMAGES = range(1, 5)
evaluate = SilentCOCOeval.evaluate
HALF = 100 * 51 / 101  # AP of half the objects found at precision 1


@pytest.fixture
def truth(tmp_path):
    """Four images with a cat each."""
    return write(tmp_path / "instances.json", coco(*(annotation(i) for i in IMAGES), images=IMAGES).dataset)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def two_detectors(folder):
    """`align` finds the four cats; `pool` finds two and takes a third for a dog."""
    align = [result(i) for i in IMAGES]
    pool = [result(1), result(2), result(3, category_id=DOG)]
    return write(folder / "align/results.json", align), write(folder / "pool/results.json", pool)


def run(*arguments):
    compare.main([f"{argument}" for argument in arguments])


def message(*arguments):
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    return str(exit.value)


def test_the_tables(truth, tmp_path, capsys):
    run("--annotations", truth, *two_detectors(tmp_path), "--resamples", 200)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 images, 4 objects, 2 classes; at most 100 detections per image and class."
    assert "95 % intervals of a BCa bootstrap over images, 200 resamples" in lines[1]
    cells = [line.split() for line in lines]
    assert ["align", "4", "4", "100.0", "100.0", "100.0"] in cells  # nothing varies, so there is no interval
    assert next(row for row in cells if row[:3] == ["pool", "3", "3"])[3] == "50.5"
    assert next(row for row in cells if row[:2] == ["minus", "align"])[2:] == ["AP", "AP50", "AP75"]
    assert [row for row in cells if row and row[0] == "pool"][1][1] == "-49.5"
    assert [row for row in cells if row and row[0] == "pool"][2:] == [
        ["pool", "1", "0", "0", "0", "0", "1"],
        ["pool", "24.8", "0.0", "0.0", "0.0", "0.0", "15.8"],  # 76 of 101 recall levels, or 67, in the place of 51
    ]


def test_the_numbers_as_json(truth, tmp_path):
    run("--annotations", truth, *two_detectors(tmp_path), "--json", tmp_path / "all.json", "--confidence", 0.9, "--resamples", 200)
    content = json.loads((tmp_path / "all.json").read_text())
    assert (content["images"], content["confidence"], content["resamples"]) == (4, 0.9, 200)
    align, pool = content["results"]
    assert align["ap"]["AP"] == {"value": approx(100), "low": None, "high": None, "standard_error": 0}
    assert align["minus_first"] is None
    assert (pool["name"], pool["detections"], pool["path"]) == ("pool", 3, str(tmp_path / "pool/results.json"))
    difference = pool["minus_first"]["AP75"]
    assert difference["value"] == approx(HALF - 100)
    assert difference["low"] < difference["value"] < difference["high"]
    assert pool["errors"]["counts"] == dict.fromkeys(ERROR_TYPES, 0) | {"classification": 1, "missed": 1}


def test_each_file_is_matched_once(truth, tmp_path, monkeypatch):
    matched = []
    monkeypatch.setattr(SilentCOCOeval, "evaluate", lambda self: (matched.append(self), evaluate(self)))
    run("--annotations", truth, *two_detectors(tmp_path), "--resamples", 20)
    assert len(matched) == 2


def test_the_limit_of_detections(truth, tmp_path):
    """Of two detections of each image the one with the higher score is wrong."""
    results = [one for i in IMAGES for one in (result(i, score=0.5), result(i, [300, 300, 50, 50]))]
    path = write(tmp_path / "results.json", results)
    for limit, expected in ((1, 0), (2, 50)):
        _, (compared,) = compare.compare(truth, [path], max_detections=limit, resamples=20)
        assert compared.ap["AP"].value == approx(expected)


def test_results_of_few_of_the_images_are_reported(truth, tmp_path, capsys):
    path = write(tmp_path / "results.json", [result(1)])
    run("--annotations", truth, path, "--resamples", 20)
    assert f"{path} has detections in 1 of 4 images" in capsys.readouterr().out


def metrics(image_ids):
    return {"stats": {}, "per_class": {}, "image_ids": image_ids}


def test_only_images_that_all_detectors_were_run_on_are_evaluated(truth, tmp_path, capsys):
    """`pool` finds all cats of the three images that it was run on, and is no worse than `align`."""
    align = write(tmp_path / "align/results.json", [result(i) for i in IMAGES])
    pool = write(tmp_path / "pool/results.json", [result(i) for i in (1, 2, 3)])
    write(tmp_path / "pool/metrics.json", metrics([1, 2, 3]))
    run("--annotations", truth, align, pool, "--resamples", 200, "--json", tmp_path / "all.json")
    text = capsys.readouterr().out
    assert text.startswith("3 images, 3 objects, 2 classes")
    assert f"{pool} is of 3 of 4 images, as metrics.json beside it says.\nEvaluated are the 3 images and 2 classes that all" in text
    assert f"{align} is of" not in text
    content = json.loads((tmp_path / "all.json").read_text())
    assert content["images"] == 3
    assert [(one["detections"], one["images"], one["ap"]["AP"]["value"], one["run_on"]) for one in content["results"]] == [
        (3, 3, approx(100), None),
        (3, 3, approx(100), "3 of 4 images"),
    ]
    assert content["results"][1]["minus_first"]["AP"]["value"] == approx(0)


def test_results_of_another_split_with_the_same_ids_are_warned_of(truth, tmp_path, caplog):
    align = write(tmp_path / "align/results.json", [result(i) for i in IMAGES])
    evaluated = {"per_class": {"cat": {}, "dog": {}}, "image_ids": list(IMAGES)}
    for ap, warned in ((100.0, False), (41.0, True)):
        write(tmp_path / "align/metrics.json", {**evaluated, "stats": {"AP": ap}})
        run("--annotations", truth, align, "--resamples", 20)
        said = f"{align} has AP 100.0 by these annotations, and 41.0 by metrics.json beside it. Is it of another split"
        assert (said in caplog.text) == warned


def test_pictures_that_predict_numbered_otherwise_are_refused(truth, tmp_path):
    found = write(tmp_path / "found/results.json", [result(i) for i in IMAGES])
    images = [{"id": i, "file_name": f"val/{i}.jpg"} for i in IMAGES]
    write(tmp_path / "found/instances.json", {"images": images})
    run("--annotations", truth, found, "--resamples", 20)
    images[2]["file_name"] = "val/2b.jpg"
    write(tmp_path / "found/instances.json", {"images": images})
    expected = f"{found}: image 3 is 2b.jpg by instances.json beside it, and 3.jpg by the annotations. predict.py numbers pictures"
    assert expected in message("--annotations", truth, found)


def test_images_by_metrics_that_do_not_fit_are_refused(truth, tmp_path):
    align, pool = two_detectors(tmp_path)
    write(tmp_path / "pool/metrics.json", metrics([1, 2]))
    assert message("--annotations", truth, align, pool).startswith(
        f"compare.py: {pool}: there are detections of image 3, which metrics.json beside it does not have."
    )
    write(tmp_path / "pool/metrics.json", metrics([1, 2, 3]))
    write(tmp_path / "align/metrics.json", metrics([3, 4, 9]))
    said = message("--annotations", truth, align, pool)
    assert f"{truth} and the results have too few images in common: 1 by metrics.json" in said
    assert f"({align}: 2 of 4 images, {pool}: 3 of 4 images)" in said


def test_only_classes_that_all_detectors_were_run_on_are_evaluated(tmp_path, capsys):
    """`dog` had data.classes=[dog] and found every dog, as `both` did: the cats, which it did not look for, are none that it missed."""
    objects = [one for i in IMAGES for one in (annotation(i), annotation(i, [300, 300, 50, 50], DOG))]
    truth = write(tmp_path / "instances.json", coco(*objects, images=IMAGES).dataset)
    dogs = [result(i, [300, 300, 50, 50], category_id=DOG) for i in IMAGES]
    both = write(tmp_path / "both/results.json", [*dogs, result(1, [400, 0, 9, 9])])
    dog = write(tmp_path / "dog/results.json", dogs)
    write(tmp_path / "dog/metrics.json", metrics(None) | {"per_class": {"dog": {"AP": 100.0}}})
    write(tmp_path / "both/metrics.json", metrics(None) | {"per_class": {"cat": {}, "dog": {}}})
    run("--annotations", truth, both, dog, "--resamples", 200, "--json", tmp_path / "all.json")
    text = capsys.readouterr().out
    assert text.startswith("4 images, 4 objects, 1 classes")
    assert f"{dog} is of 1 of 2 classes, as metrics.json beside it says.\nEvaluated are the 4 images and 1 classes that" in text
    content = json.loads((tmp_path / "all.json").read_text())["results"]
    assert [(one["ap"]["AP"]["value"], one["detections"], one["run_on"]) for one in content] == [
        (approx(100), 4, None),
        (approx(100), 4, "1 of 2 classes"),
    ]
    assert content[1]["minus_first"]["AP"]["value"] == approx(0) and content[0]["errors"]["counts"] == dict.fromkeys(ERROR_TYPES, 0)


def test_classes_by_metrics_that_do_not_fit_are_refused(truth, tmp_path):
    align, pool = two_detectors(tmp_path)
    write(tmp_path / "align/metrics.json", metrics(None) | {"per_class": {"cat": {}}})
    write(tmp_path / "pool/metrics.json", metrics(None) | {"per_class": {"dog": {}}})
    said = message("--annotations", truth, align, pool)
    assert f"{truth} and the results have no class in common by metrics.json" in said and f"{align}: 1 of 2 classes, {pool}: 1 of" in said
    (tmp_path / "align/metrics.json").unlink()
    said = message("--annotations", truth, align, pool)
    assert said.startswith(f"compare.py: {pool}: there are detections of class cat, which metrics.json beside it does not have.")


@pytest.mark.parametrize("kept", [2, 20])
def test_metrics_that_are_cut_off_are_refused(truth, tmp_path, kept):
    """Their list of images would be ignored."""
    align, pool = two_detectors(tmp_path)
    path = tmp_path / "pool/metrics.json"
    write_metrics(path, Metrics({"AP": 50.0}, {"cat": {"AP": 50.0}}, (1, 2, 3), 4))
    path.write_text("\n".join(path.read_text().splitlines()[:kept])[:-1])
    assert f"{path} is cut off or damaged: " in message("--annotations", truth, align, pool)


@pytest.mark.parametrize("content", ['{"iteration": 19}\n{"iteration": 39}', "[]", '{"stats": {}}'])
def test_metrics_of_other_programs_say_nothing_of_the_images(truth, tmp_path, capsys, content):
    align, pool = two_detectors(tmp_path)
    (tmp_path / "pool/metrics.json").write_text(content)
    run("--annotations", truth, align, pool, "--resamples", 20)
    assert capsys.readouterr().out.startswith("4 images, 4 objects")


def test_an_empty_list_of_results_has_ap_0(truth, tmp_path):
    _, (compared,) = compare.compare(truth, [write(tmp_path / "results.json", [])], resamples=20)
    assert compared.ap["AP"].value == 0
    assert compared.errors.counts["missed"] == 4


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/align_seed0/results.json", "runs/a/pool_seed0/results.json"], ["align_seed0", "pool_seed0"]),
        (["a/1/results.json", "b/1/results.json"], ["a/1", "b/1"]),
        (["runs/a/results.json", "runs/a/b/results.json"], ["a", "a/b"]),
        (["runs/faster.json", "runs/mask.json"], ["faster", "mask"]),
        (["a/boxes.json", "b/boxes.json"], ["a/boxes", "b/boxes"]),
        (["runs/align/results.json"], ["align"]),
        (["2026-11-25_embedded_align/results.json", "pool/results.json"], ["…1-25_embedded_align", "pool"]),
    ],
)
def test_names_are_what_tells_the_paths_apart(truth, tmp_path, paths, names):
    paths = [write(tmp_path / path, []) for path in paths]
    _, compared = compare.compare(truth, paths, resamples=2)
    assert [one.name for one in compared] == names


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"images": [], "annotations": []}, "holds a dict with images, annotations; COCO's results are a list of detections"),
        ([result(1), 3], "result 1 is a int"),
        ([result(1), {"image_id": 1, "category_id": 3, "score": 1}], "result 1 has no bbox"),
        ([result("1")], "result 0 has image_id '1'; expected an integer"),
        ([result(1, [0, 0, 1])], "result 0 has bbox [0, 0, 1]; expected four numbers"),
        ([result(1, score="high")], "result 0 has score 'high'; expected a number"),
        ([result(1, score=float("nan"))], "result 0 (image 1)"),
        ([result(1), result(9)], "result 1 has image_id 9, which the annotations do not have. Are these results of another data set?"),
        ([result(1, category_id=5)], "result 0 has category_id 5"),
    ],
)
def test_a_wrong_file_of_results_is_named_with_the_entry(truth, tmp_path, content, expected):
    good, wrong = write(tmp_path / "good.json", []), write(tmp_path / "wrong.json", content)
    said = message("--annotations", truth, good, wrong)
    assert said.startswith(f"compare.py: {wrong}") and expected in said


def boxes_in_images():
    """A box in each of 24 images of 640 x 480, as many at the right and lower border as elsewhere."""
    return {i: [25 * (i % 13) + (200 if i % 2 else 0), 10 * i, 100 + i, 80 + 5 * i] for i in range(1, 25)}


FORMS = {
    "xyxy": (lambda x, y, w, h: [x, y, x + w, y + h], r"They are more plausible as \[x1, y1, x2, y2\] \(100% fit\)"),
    "normalised": (lambda x, y, w, h: [x / 640, y / 480, w / 640, h / 480], "all 24 boxes are below a pixel; .* They are normalised"),
    "another size": (lambda x, y, w, h: [3 * x, 3 * y, 3 * w, 3 * h], "of 24 boxes .*reach more than a pixel out of their image"),
    "percentages": (lambda x, y, w, h: [x / 6.4, y / 4.8, w / 6.4, h / 4.8], "no box ends beyond .* percentages"),
}


@pytest.mark.parametrize("form", FORMS)
def test_results_in_other_coordinates_are_warned_of(tmp_path, caplog, form):
    boxes = boxes_in_images()
    truth = write(tmp_path / "instances.json", coco(*(annotation(i, box) for i, box in boxes.items()), images=boxes).dataset)
    good = write(tmp_path / "good.json", [result(i, box) for i, box in boxes.items()])
    convert, expected = FORMS[form]
    wrong = write(tmp_path / "wrong.json", [result(i, convert(*box)) for i, box in boxes.items()])
    _, (sound, spoiled) = compare.compare(truth, [good, wrong], resamples=2)
    assert sound.ap["AP"].value == approx(100) and spoiled.ap["AP"].value < 10
    (warning,) = caplog.messages
    assert warning.startswith(f"{wrong}: ") and re.search(expected, warning) and "result " in warning


def test_some_boxes_outside_their_image_are_usual(tmp_path, caplog):
    boxes = boxes_in_images()
    truth = write(tmp_path / "instances.json", coco(*(annotation(i, box) for i, box in boxes.items()), images=boxes).dataset)
    few = {1: [600, 400, 90, 90], 2: [-30, 5, 200, 200], 3: [5, 5, 0.5, 0.5], 4: [7, 7, 0, 0]}
    compare.compare(truth, [write(tmp_path / "results.json", [result(i, box) for i, box in (boxes | few).items()])], resamples=2)
    assert caplog.messages == []


@pytest.mark.parametrize("form", ["xyxy", "normalised"])
def test_annotations_in_other_coordinates_are_refused(tmp_path, form):
    boxes = boxes_in_images()
    convert, expected = FORMS[form]
    wrong = [annotation(i, convert(*box)) for i, box in boxes.items()]
    truth = write(tmp_path / "instances.json", coco(*wrong, images=boxes).dataset)
    said = message("--annotations", truth, write(tmp_path / "results.json", [result(i, box) for i, box in boxes.items()]))
    assert said.startswith(f"compare.py: {truth}: ") and re.search(expected, said)


def test_files_that_cannot_be_read(truth, tmp_path):
    truncated = tmp_path / "truncated.json"
    truncated.write_text('[{"image_id": 1,')
    assert f"{truncated} is not a json file, or is truncated" in message("--annotations", truth, truncated)
    assert f"{tmp_path / 'none.json'} is not there" in message("--annotations", truth, tmp_path / "none.json")
    assert f"{tmp_path / 'none.json'} is not there" in message("--annotations", tmp_path / "none.json", truth)


def test_annotations_without_images(tmp_path):
    empty = write(tmp_path / "instances.json", coco(images=()).dataset)
    said = message("--annotations", empty, write(tmp_path / "results.json", []))
    assert said == f"compare.py: {empty} has 0 images; intervals over images need at least 2."


def test_names_that_do_not_fit(truth, tmp_path):
    files = two_detectors(tmp_path)
    assert "--names has 1 names for 2 files" in message("--annotations", truth, *files, "--names", "a")
    assert "two files of results have the name 'a'" in message("--annotations", truth, *files, "--names", "a", "a")
    assert "two files of results have the name 'align'" in message("--annotations", truth, files[0], files[0])
    assert "has 21 characters; the tables have room for 20" in message("--annotations", truth, *files, "--names", "a", "b" * 21)


@pytest.mark.parametrize(("option", "value"), [("--max-detections", 0), ("--confidence", 95), ("--resamples", 0)])
def test_numbers_out_of_range(truth, tmp_path, option, value, capsys):
    message("--annotations", truth, *two_detectors(tmp_path), option, value)
    assert f"{option} {value}: expected" in capsys.readouterr().err


def test_tables_fit_100_columns():
    widest = Estimate(99.9, 99.9, 99.9), Estimate(-99.9, -99.9, -99.9)
    errors = ErrorSplit(99.9, dict.fromkeys(ERROR_TYPES, 9_999_999), dict.fromkeys(ERROR_TYPES, 99.9))
    ap, minus = (dict.fromkeys(("AP", "AP50", "AP75"), estimate) for estimate in widest)
    compared = [compare.Compared(f"{i}" * 20, "p", 9_999_999, 999_999, ap, minus, errors) for i in (1, 2)]
    text = compare.format_comparison(coco(annotation(1)), compared, 100, 0.95, 2000)
    assert max(map(len, text.splitlines())) <= 100
