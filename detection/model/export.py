"""A trained detector as one graph: `torch.export` for every operator, ONNX for those that ONNX has."""

from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from roi_quantization import ops
from roi_quantization.detection.common.errors import InputError, MissingPackageError
from roi_quantization.detection.model.fast_rcnn import FastRCNN
from roi_quantization.ops.functional import ROI_POOL
from roi_quantization.ops.geometry import LatticeRule
from roi_quantization.roi_heads.extractor import RoIOperator

OPSET = 18
INPUTS, OUTPUTS = ("image", "proposals"), ("boxes", "scores")
DYNAMIC = {"image": {1: Dim.DYNAMIC, 2: Dim.DYNAMIC}, "proposals": {0: Dim.DYNAMIC}}


class ExportedDetector(nn.Module):
    """The detector of one image, up to non-maximum suppression: the box and the score of every proposal for every class.

    The sizes of the outputs follow from those of the inputs, which every runtime can do. The NMS is left to the caller: see
    docs/python_api.md.

    Args:
        detector: the trained detector. It is put into evaluation mode.

    Raises:
        InputError: it finds its own proposals.
    """

    def __init__(self, detector: FastRCNN):
        super().__init__()
        if type(detector) is not FastRCNN:
            raise InputError(
                f"a {type(detector).__name__} cannot be exported: it finds its own proposals. A FastRCNN can (detector=fast_rcnn)"
            )
        self.detector = detector
        self.eval()

    def forward(self, image: Tensor, proposals: Tensor) -> tuple[Tensor, Tensor]:
        """Classify and regress proposals.

        Args:
            image: uint8 RGB `[3, H, W]`, resized as the checkpoint's `eval_transform` does.
            proposals: `[L, 4]` `(x1, y1, x2, y2)` in pixels of this image.

        Returns:
            `boxes` `[L, C, 4]` in pixels of this image, of each class without the background, and `scores` `[L, C]`. Column 0 is label 1.
        """
        height, width = image.shape[1:]
        stride = self.detector.backbone.stride
        normalised = (image.float() - self.detector.mean) / self.detector.std
        padded = nn.functional.pad(normalised, (0, -width % stride, 0, -height % stride))
        heads = self.detector.roi_heads
        scores, deltas = heads.predict(self.detector.backbone(padded[None]), [proposals], [(height, width)])
        boxes = heads.box_coder.decode_single(deltas, proposals).unflatten(1, (-1, 4))
        x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
        return torch.stack([x, y], dim=3).flatten(2)[:, 1:], scores.softmax(-1)[:, 1:]


def export_program(detector: FastRCNN) -> ExportedProgram:
    """Export a detector with `torch.export`, for images of any size and any number of proposals.

    Returns:
        The program `(image, proposals) -> (boxes, scores)`, see `ExportedDetector`. It calls the operators `roi_quantization::...`, so
        who runs it imports `roi_quantization.ops`.
    """
    with torch.no_grad():
        exported = ExportedDetector(detector)
        return torch.export.export(exported, _example(detector), dynamic_shapes=DYNAMIC)


def export_onnx(detector: FastRCNN, path: str | Path) -> None:
    """Export a detector to ONNX, for images of any size and any number of proposals.

    The graph is `(image, proposals) -> (boxes, scores)`, see `ExportedDetector`. RoIAlign becomes ONNX's `RoiAlign` (`half_pixel` is its
    `coordinate_transformation_mode`), RoIPool becomes `MaxRoiPool`.

    Raises:
        InputError: ONNX has no operator that computes the same as the detector's.
        MissingPackageError: the packages of the extra `export` are not installed.
    """
    for package in ("onnx", "onnxscript"):
        try:
            import_module(package)
        except ImportError as error:
            raise MissingPackageError(f'the export to ONNX needs {package}: {error}. Run pip install -e ".[export]"') from error
    exported, extractor = ExportedDetector(detector), detector.roi_heads.box_roi_pool
    own, extractor.operator = extractor.operator, onnx_operator(extractor.operator)
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                exported,
                _example(detector),
                input_names=INPUTS,
                output_names=OUTPUTS,
                dynamic_shapes=DYNAMIC,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        program.save(path)
    finally:
        extractor.operator = own


def _example(detector: FastRCNN) -> tuple[Tensor, Tensor]:
    """An image and three proposals: sizes that differ, so that none is taken for another."""
    side, device = 4 * detector.backbone.stride, detector.mean.device
    image = torch.zeros(3, side, side + 1, dtype=torch.uint8, device=device)
    return image, torch.tensor([[0.0, 0.0, side, side], [4.0, 4.0, side, 40.0], [0.0, 8.0, 9.0, 10.0]], device=device)


def onnx_operator(operator: RoIOperator) -> RoIOperator:
    """Return what stands for an operator in the graph of an export: ONNX's own that computes the same.

    Raises:
        InputError: there is none.
    """
    function, knobs = (operator.func, dict(operator.keywords)) if isinstance(operator, partial) else (operator, {})
    if function is ops.lattice_pool:
        reduce = knobs.pop("reduce", "mean")
        rule = LatticeRule(**knobs)
        if reduce == "max" and rule == ROI_POOL:
            return _max_roi_pool
        align = LatticeRule(half_pixel=rule.half_pixel, sampling_ratio=rule.sampling_ratio)
        if reduce == "mean" and rule == align:
            return partial(_roi_align, rule)
    name = getattr(function, "__name__", str(function))
    raise InputError(
        f"there is no ONNX operator for {name} with {knobs or 'its defaults'}. ONNX has RoIAlign (roi=align, with any sampling_ratio and "
        "half_pixel) and RoIPool (roi=pool); export_program takes every operator"
    )


def _roi_align(rule: LatticeRule, features: Tensor, boxes: list[Tensor], output_size: int, spatial_scale: float) -> Tensor:
    (of_image,) = boxes
    return torch.onnx.ops.symbolic(
        "RoiAlign",
        (features, of_image, torch.zeros_like(of_image[:, 0], dtype=torch.int64)),
        {
            "mode": "avg",
            "coordinate_transformation_mode": "half_pixel" if rule.half_pixel else "output_half_pixel",
            "sampling_ratio": max(rule.sampling_ratio, 0),
            "output_height": output_size,
            "output_width": output_size,
            "spatial_scale": spatial_scale,
        },
        dtype=features.dtype,
        shape=(of_image.shape[0], features.shape[1], output_size, output_size),
        version=16,
    )


def _max_roi_pool(features: Tensor, boxes: list[Tensor], output_size: int, spatial_scale: float) -> Tensor:
    (of_image,) = boxes
    return torch.onnx.ops.symbolic(
        "MaxRoiPool",
        (features, torch.cat([torch.zeros_like(of_image[:, :1]), of_image], dim=1)),
        {"pooled_shape": [output_size, output_size], "spatial_scale": spatial_scale},
        dtype=features.dtype,
        shape=(of_image.shape[0], features.shape[1], output_size, output_size),
        version=1,
    )
