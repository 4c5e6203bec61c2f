"""Exported detectors and operators compute what they compute here: torch.export's for every operator, ONNX's in onnxruntime."""

import sys

import numpy as np
import pytest
import torch
import torchvision

from roi_quantization.detection.common.errors import MissingPackageError
from roi_quantization.detection.model.build import build_detector, instantiate, read_operator
from roi_quantization.detection.model.export import ExportedDetector, export_onnx, export_program, onnx_operator
from tests.configuration import ROOT, composed
from tests.test_documents import blocks

SMALL = ["backbone.width=0.0625", "head.box_head.hidden=32", "head.box_predictor.score_std=0.5", "head.box_predictor.delta_std=0.1"]


def detector_with(roi):
    torch.manual_seed(0)
    return build_detector(composed("train", f"roi={roi}", *SMALL), num_classes=4).eval()


@pytest.fixture(scope="module")
def image():
    """No multiple of the stride, and of another shape than the example that is traced."""
    return torch.randint(0, 256, (3, 90, 131), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def proposals():
    corner = torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([90.0, 60.0])
    size = 1 + 29 * torch.rand(40, 2, generator=torch.Generator().manual_seed(1))
    edges = torch.tensor([[0.0, 0.0, 131.0, 90.0], [8.0, 8.0, 24.0, 24.0], [24.0, 40.0, 56.0, 72.0]])  # halves of cells, too
    return torch.cat([torch.cat([corner, corner + size], 1), edges])


def test_the_exported_form_finds_what_the_detector_finds(image, proposals):
    detector = detector_with("align")
    target = {"proposals": proposals, "image_id": 0, "original_size": image.shape[1:]}
    with torch.no_grad():
        ((expected,), _) = detector([image], [target])
        assert_detections(detector.roi_heads, *ExportedDetector(detector)(image, proposals), expected)


def assert_detections(heads, boxes, scores, expected):
    """What is left after the NMS of docs/python_api.md is what the detector finds."""
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100), "as in the document"
    (text,) = (text for text in blocks(ROOT / "docs" / "python_api.md", "python") if "batched_nms" in text)
    found = {"torchvision": torchvision, "boxes": boxes, "scores": scores}
    exec(compile(text, "<block>", "exec"), found)
    assert len(found["scores"]) == len(expected["scores"]) > 10
    assert torch.equal(found["labels"], expected["labels"])
    torch.testing.assert_close(found["boxes"], expected["boxes"], atol=1e-3, rtol=0)
    torch.testing.assert_close(found["scores"], expected["scores"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("roi", ["align_max", *(pytest.param(roi, marks=pytest.mark.slow) for roi in ("pool_floor", "prroi"))])
def test_torch_export_takes_every_operator(roi, image, proposals):
    detector = detector_with(roi)
    program = export_program(detector)
    with torch.no_grad():
        expected = ExportedDetector(detector)(image, proposals)
    for mine, its in zip(program.module()(image, proposals), expected, strict=True):
        torch.testing.assert_close(mine, its)


def session(path):
    return pytest.importorskip("onnxruntime", reason="needs onnxruntime").InferenceSession(path)


@pytest.mark.slow
def test_onnxruntime_finds_the_same_boxes(image, proposals, tmp_path):
    pytest.importorskip("onnxscript", reason="needs onnx and onnxscript")
    detector = detector_with("align")
    own = detector.roi_heads.box_roi_pool.operator
    export_onnx(detector, tmp_path / "detector.onnx")
    assert detector.roi_heads.box_roi_pool.operator is own
    runtime = session(tmp_path / "detector.onnx")
    boxes, scores = runtime.run(["boxes", "scores"], {"image": image.numpy(), "proposals": proposals.numpy()})
    target = {"proposals": proposals, "image_id": 0, "original_size": image.shape[1:]}
    with torch.no_grad():
        ((expected,), _) = detector([image], [target])
    assert_detections(detector.roi_heads, torch.from_numpy(boxes), torch.from_numpy(scores), expected)
    boxes, scores = runtime.run(None, {"image": image.numpy(), "proposals": np.zeros((0, 4), np.float32)})
    assert boxes.shape == (0, 3, 4) and scores.shape == (0, 3)


class Pooling(torch.nn.Module):
    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, features, boxes):
        return self.operator(features, [boxes], 7, 1 / 16)


@pytest.mark.parametrize(
    "roi",
    ["align_adaptive", "pool", *(pytest.param(roi, marks=pytest.mark.slow) for roi in ("align", "align_1_sample", "align_no_half_pixel"))],
)
def test_the_operator_of_onnx_is_ours(roi, proposals, tmp_path):
    """Inside the map and beyond it, where values are negative, for boxes without area and turned around."""
    pytest.importorskip("onnxscript", reason="needs onnx and onnxscript")
    operator = instantiate(read_operator(roi))
    shapes = {"features": {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}, "boxes": {0: torch.export.Dim.DYNAMIC}}
    example = (torch.zeros(1, 2, 5, 6), torch.zeros(3, 4))
    program = torch.onnx.export(Pooling(onnx_operator(operator)).eval(), example, dynamic_shapes=shapes, dynamo=True, verbose=False)
    program.save(tmp_path / "operator.onnx")
    features = torch.randn(1, 2, 6, 9, generator=torch.Generator().manual_seed(0)) - 3
    far = torch.tensor([[-40.0, -30.0, 20.0, 20.0], [100.0, 60.0, 300.0, 200.0], [-90.0, -90.0, -50.0, -50.0], [-7.9, 8.1, 40.3, 88.2]])
    odd = torch.tensor([[30.0, 30.0, 30.0, 30.0], [50.0, 40.0, 20.0, 10.0], [7.99, 7.99, 8.01, 8.01]])
    boxes = torch.cat([proposals, far, odd])
    (found,) = session(tmp_path / "operator.onnx").run(None, {"features": features.numpy(), "boxes": boxes.numpy()})
    np.testing.assert_allclose(found, operator(features, [boxes], 7, 1 / 16).numpy(), atol=0 if roi == "pool" else 1e-5)


@pytest.mark.parametrize("roi", ["align_max", "warp", "pool_bins", "pool_floor", "prroi"])
def test_other_operators_are_refused_by_name(roi):
    with pytest.raises(ValueError, match=r"there is no ONNX operator for (lattice|prroi)_pool with .* export_program takes every operator"):
        onnx_operator(instantiate(read_operator(roi)))


def test_a_foreign_operator_is_refused_by_name():
    def mine(features, boxes, output_size, spatial_scale):
        raise AssertionError

    with pytest.raises(ValueError, match="there is no ONNX operator for mine with its defaults"):
        onnx_operator(mine)


def test_without_onnx_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingPackageError, match=r'needs onnx: .* pip install -e "\.\[export\]"'):
        export_onnx(detector_with("align"), tmp_path / "detector.onnx")
