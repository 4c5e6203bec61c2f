"""The scripts in benchmarks/: what they print and write. How fast anything is, is not for here."""

import json
import math

import pytest
import torch
from PIL import Image

from roi_quantization.detection.model.build import build_detector
from tests.configuration import ROOT, composed


@pytest.fixture
def benchmark(monkeypatch):
    """The script, with two small shapes for its table."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as `python benchmarks/roi_operators.py` does
    import roi_operators

    tiny = roi_operators.Shape("tiny", (2, 16, 10, 12), 3, output_size=2)
    monkeypatch.setattr(roi_operators, "SHAPES", [tiny, tiny._replace(name="bf16", dtype=torch.bfloat16, training=False)])
    return roi_operators


@pytest.fixture
def run(benchmark, tmp_path, capsys):
    """-> what was printed, what the json holds. Not deterministic, which torchvision's operators refuse on a GPU, whatever ran before."""
    before = torch.are_deterministic_algorithms_enabled(), torch.cuda.current_stream() if torch.cuda.is_available() else None
    torch.use_deterministic_algorithms(False)

    def run(*arguments):
        files = ["--json", str(tmp_path / "out.json"), "--picture", str(tmp_path / "out.png")]
        benchmark.main([*files, "--seconds", "0.01", *arguments])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png"], "nothing half-written beside them"
        with Image.open(tmp_path / "out.png") as picture:
            assert picture.width > 1000
        return capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())

    yield run
    torch.use_deterministic_algorithms(before[0])
    if before[1] is not None:
        torch.cuda.set_stream(before[1])


def test_a_row_for_each_shape_and_operator(run, benchmark):
    text, found = run("--shapes", "all")
    assert max(map(len, text.splitlines())) <= 110
    assert [(row["shape"], row["operator"]) for row in found["rows"]] == [(s, o) for s in ("tiny", "bf16") for o in benchmark.OPERATORS]
    assert found["failures"] == []
    for row in found["rows"]:
        directions = row["called"]
        assert list(directions) == (["forward", "backward"] if row["shape"] == "tiny" else ["forward"]), "in testing no gradient is wanted"
        assert all(value > 0 for sides in directions.values() for value in sides.values())
    align = found["rows"][0]
    assert align["against"] == "align" and align["alike"] and align["largest_difference"] < 1e-5
    assert {row["against"]: row["alike"] for row in found["rows"] if row["shape"] == "bf16"} == {"align f32": False, "pool f32": False}
    assert "(align f32)" in text


def test_the_floor_by_hand(benchmark):
    """Features 2 x 16 x 10 x 12 and output 3 x 16 x 2 x 2 of 4 bytes, boxes 3 x 5 of 4: at 1000 bytes/s a byte is a millisecond."""
    tiny = benchmark.SHAPES[0]
    floors = benchmark.floors(tiny, bandwidth=1000)
    assert floors["called"] == floors["gpu"] == {"forward": 15360 + 60 + 768, "backward": 768 + 15360}
    assert floors["memory"] == {"forward": 768 / 2**20, "backward": (768 + 15360) / 2**20}
    assert benchmark.floors(tiny._replace(dtype=torch.bfloat16), 1000)["called"]["backward"] == (768 + 15360) / 2


def test_what_cannot_run_is_a_dash_and_a_reason(run, benchmark, monkeypatch):
    """Stand-ins for CUDA's meters, one of which cannot capture anything, and an operator of ours without a gradient."""

    def once(call):
        call()
        return 0.5

    def cannot_capture(call):
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("the capture is invalid")

    monkeypatch.setattr(benchmark, "meters", lambda *_: {"called": once, "memory": lambda call: 2.0, "gpu": cannot_capture})
    without_gradient = benchmark.OPERATORS["pool"]._replace(call=lambda features, boxes, shape: torch.ones(3, 16, 2, 2))
    monkeypatch.setitem(benchmark.OPERATORS, "pool", without_gradient)
    text, found = run("--operators", "pool", "--shapes", "all")

    training, testing = found["rows"]
    assert training["called"]["forward"]["ours"] == 0.5
    assert training["called"]["backward"]["ours"] is None and training["called"]["backward"]["theirs"] == 0.5
    assert training["gpu"]["forward"]["ours"] is None and testing["memory"]["forward"]["ours"] == 2

    assert max(map(len, text.splitlines())) <= 110
    _, called, gpu, memory, failures = (part.splitlines() for part in text.strip().split("\n\n"))
    assert [part[0].split("  ")[0] for part in (called, gpu, memory)] == ["ms, as called", "ms, the GPU alone", "peak memory, MiB"]
    assert called[2].split()[-4:] == ["-", "0.500", "-", "-"]
    assert gpu[2].split() == ["tiny", "pool", "pool", *8 * "-"]
    assert failures[0] == "not measured:"
    assert any(f.startswith("pool, called backward (tiny): RuntimeError: element 0 of tensors does not require grad") for f in failures)
    assert any(f.startswith("torchvision's pool, gpu forward (tiny, bf16): RuntimeError: operation not permitted") for f in failures)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_everything_of_torchvisions_is_measured(run):
    _, found = run("--device", "cuda", "--shapes", "tiny")
    assert [failure for failure in found["failures"] if failure["operator"].startswith("torchvision")] == []
    for row in found["rows"]:
        assert all(math.isfinite(row[what][d]["theirs"]) for what in ("called", "gpu", "memory") for d in ("forward", "backward"))


@pytest.mark.slow
def test_a_training_step_and_its_parts(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import training_step

    monkeypatch.setattr(training_step, "DETECTOR", [*training_step.DETECTOR, "backbone.width=0.0625", "head.box_head.hidden=16"])
    training_step.main(["--size", "64", "96", "--rounds", "2", "--json", str(tmp_path / "step.json")])
    text, found = capsys.readouterr().out, json.loads((tmp_path / "step.json").read_text())
    assert list(found["operators"]) == ["align", "pool"]
    for row in found["operators"].values():
        assert set(row) == {"ours", "theirs", "backbone", "RoI operator", "head", "optimizer", "rounds"}
        assert all(len(taken) == 2 and min(taken) > 0 for taken in row["rounds"].values())
    assert "theirs / ours" in text and max(map(len, text.splitlines())) <= 110


def test_both_training_steps_have_the_same_loss_on_the_same_rois(monkeypatch):
    """Where every proposal is sampled, ours is torchvision's; but for the loss of the boxes, whose beta is 1/9 there and 1 in the paper."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import training_step

    small = [
        "backbone.width=0.0625",
        "head.box_head.hidden=16",
        "head.box_head.dropout=0",
        "head.background_iou=[0,0.5]",
        "head.rois_per_image=3000",
    ]
    cfg = composed("train", *training_step.DETECTOR, *small, "head.foreground_fraction=1")
    ours = build_detector(cfg, num_classes=21).train()
    theirs = training_step.TorchvisionDetector(ours, training_step.TORCHVISION_OPERATORS["align"](7, 1 / 16)).train()
    theirs.roi_heads.fg_bg_sampler.batch_size_per_image, theirs.roi_heads.fg_bg_sampler.positive_fraction = 3000, 1
    inputs = training_step.make_batch(64, 96, "cpu")
    loss, other = ours(*inputs)[1], theirs(*inputs)[1]
    assert loss["loss_classifier"].item() == pytest.approx(other["loss_classifier"].item(), rel=1e-5)


@pytest.mark.slow
def test_coco_evaluation(monkeypatch, tmp_path, capsys):
    pytest.importorskip("faster_coco_eval", reason='needs faster-coco-eval: pip install -e ".[faster-evaluation]"')
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import coco_evaluation

    coco_evaluation.main(["--images", "4", "--repeat", "2", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["images"], found["detections"]) == (4, 400) and found["objects"] > 4
    assert list(found["rows"]) == ["plain pycocotools", "ours", "ours, coco_eval=faster"]
    assert all(row["largest_difference"] < 1e-10 for row in found["rows"].values())
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("400 detections", "over plain", *found["rows"]))
