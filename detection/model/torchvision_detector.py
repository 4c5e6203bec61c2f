"""The detectors of torchvision with the RoI operator of your choice: Faster R-CNN with a feature pyramid, and its relatives."""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchvision.models import detection, get_model_builder, list_models
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms.v2.functional import resize

from roi_quantization.detection.common.configuration import path_setting
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.model.build import build_operator
from roi_quantization.detection.model.fast_rcnn import MASK_THRESHOLD, check_images, to_original
from roi_quantization.detection.model.faster_rcnn import keep_coordinates, to_float32
from roi_quantization.detection.model.torchvision_backbone import freeze_norm
from roi_quantization.roi_heads.extractor import MultiScaleRoIExtractor, RoIOperator
from roi_quantization.roi_heads.weights import read_state

log = logging.getLogger(__name__)

GROUPS = ("backbone", "head", "proposals")  # which these detectors have themselves
SETTINGS = ("weights", "weights_backbone", "num_classes", "progress", "backbone")  # arguments of a builder that are no options
TRAINED_NORM = ("fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2")  # torchvision trains their batch norm with weights as well
EPS_0 = {f"{kind}rcnn_resnet50_fpn": "COCO_V1" for kind in ("faster", "mask", "keypoint")}  # weights that torchvision gives such norms


class TorchvisionDetector(GeneralizedRCNN):
    """A detector of torchvision in the place of `FastRCNN`. The names of its weights are torchvision's.

    Args:
        model: the detector. Each pooler of its RoI heads is replaced by a `MultiScaleRoIExtractor`.
        operator: see `RoIExtractor`.
        channels_last: memory format of the backbone and its maps. It changes the speed, not the numbers.
        class_names: of the labels, the background first, where they are not those of the data. See `match_categories`.
        masks: whether masks are learnt and returned.
    """

    has_evaluation_losses = False  # torchvision computes either losses or detections

    def __init__(
        self,
        model: GeneralizedRCNN,
        operator: RoIOperator,
        channels_last: bool = False,
        class_names: Sequence[str] | None = None,
        masks: bool = False,
    ):
        super().__init__(model.backbone, model.rpn, model.roi_heads, model.transform)
        for name in ("box_roi_pool", "mask_roi_pool", "keypoint_roi_pool"):
            pooler = getattr(self.roi_heads, name)
            if pooler is not None:
                setattr(self.roi_heads, name, MultiScaleRoIExtractor(operator, pooler))
        keep_coordinates(self.rpn)
        self.roi_heads.box_predictor.register_forward_hook(to_float32)  # its offsets, for the same reason
        self.backbone.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        self.class_names, self.masks = class_names, masks
        self.register_buffer("data_labels", None, persistent=False)

    def match_categories(self, categories: Sequence[Mapping[str, Any]]) -> None:
        """Let detections have the labels of a data set, `i` for entry `i - 1` of `categories`. Those of other classes are left out.

        A label of torchvision's weights is the id of COCO's category, of which there are 80 up to 90.

        Raises:
            InputError: a category of the data is not one of the weights, by id and name.
        """
        known = dict(enumerate(self.class_names))
        labels = torch.zeros(len(known), dtype=torch.int64)
        for label, category in enumerate(categories, 1):
            number, name = category["id"], category["name"]
            if number < 1 or known.get(number) != name:
                its = f"{known[number]!r}" if number in known else f"not there (they have {len(known) - 1})"
                raise InputError(
                    f"category {number} of the data is {name!r}, and that of the detector's weights is {its}. Categories are matched by id "
                    "and name. Give the data the ids of the weights, or choose some of its classes with data.classes"
                )
            labels[number] = label
        self.data_labels = labels

    def forward(self, images: list[Tensor], targets: list[dict]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detect objects, or compute losses: see `FastRCNN.forward`. `proposals` are not used, and there are no losses in evaluation."""
        check_images(images)
        scaled = [image / 255 for image in images]
        if self.training:
            names = ("boxes", "labels", "masks") if self.masks else ("boxes", "labels")
            return [], super().forward(scaled, [{name: target[name] for name in names} for target in targets])
        found = super().forward(scaled)
        return [self._finish(*of_image) for of_image in zip(found, images, targets, strict=True)], {}

    def _finish(self, found: dict[str, Tensor], image: Tensor, target: dict) -> dict[str, Tensor]:
        boxes, scores, labels = (found[name] for name in ("boxes", "scores", "labels"))
        if self.data_labels is not None:
            labels = self.data_labels[labels]
        keep = labels > 0
        boxes = to_original(boxes[keep], tuple(image.shape[1:]), target["original_size"])
        detection = {"boxes": boxes, "scores": scores[keep], "labels": labels[keep]}
        if self.masks:
            probabilities = resize(found["masks"][keep, 0], list(target["original_size"]), antialias=False)  # most often of that size
            detection["masks"] = probabilities > MASK_THRESHOLD
        return detection


def build_torchvision(
    cfg: DictConfig,
    num_classes: int | None,
    pretrained: bool,
    builder: str,
    weights: str | Path | None = None,
    categories: str | Sequence[str] | None = None,
    weights_backbone: str | None = None,
    options: Mapping[str, Any] | None = None,
    masks: bool = False,
) -> TorchvisionDetector:
    """Build a detector of torchvision with the operator of `cfg.roi`. See `build_detector`.

    Args:
        cfg: with `roi` and `channels_last`, and without the `GROUPS`.
        num_classes: background included. None: those of `weights`, which are complete then; else the last layers start random.
        pretrained: whether weights are loaded.
        builder: name of a function of `torchvision.models.detection`.
        weights: a name of torchvision's, or a file of a state dict.
        categories: of `weights` from a file: the names by label, the background first, or a name of torchvision's weights with the same.
        weights_backbone: a name of torchvision's weights of the backbone, where there are no `weights`.
        options: other arguments of the builder.
        masks: whether masks are learnt and returned. False evaluates the boxes alone of a detector that has masks.

    Raises:
        InputError: the detector has no RoI heads, or no masks where they are wanted; weights or options are not known, or they do not go
            together.
    """
    for group in GROUPS:
        if cfg.get(group):
            raise InputError(f"{group}: a detector of torchvision has its own, and would not use this one. Set {group}=null")
    options = _check_options(builder, options or {})
    if masks and not issubclass(_model_class(builder), MaskRCNN):
        raise InputError(f"detector.masks=true: {builder} has no branch for masks. Choose a detector.builder=maskrcnn_*")
    if weights is not None and weights_backbone is not None:
        raise InputError("detector.weights are of the whole detector. Remove detector.weights_backbone")
    operator, entry = build_operator(cfg.roi), None if weights is None else _entry(builder, "weights", weights)
    if num_classes is None:
        model, names = _build_trained(builder, weights, entry, categories, options)
        return TorchvisionDetector(model, operator, cfg.channels_last, names, masks)
    if weights is not None and entry is None:
        raise InputError(f"detector.weights={weights}: a training starts from a name of torchvision's, or from init_from=<checkpoint>")
    if pretrained:
        model = _build_for_training(builder, num_classes, entry, weights_backbone, options)
    else:
        is_trained = weights is not None or weights_backbone is not None
        model = _build_plain(builder, num_classes, is_trained, entry is not None and EPS_0.get(builder) == entry.name, options)
    if model.roi_heads.has_keypoint():
        raise InputError(f"detector.builder={builder} learns keypoints, which the data do not give. Train a fasterrcnn_* or maskrcnn_*")
    if pretrained and model.roi_heads.has_mask() and not masks:
        raise InputError(f"detector.builder={builder} learns masks. Set detector.masks=true, or train a fasterrcnn_*")
    return TorchvisionDetector(model, operator, cfg.channels_last, masks=masks)


def builders_with_heads() -> list[str]:
    """Return the names of torchvision's detectors that have RoI heads."""
    return [name for name in list_models(module=detection) if issubclass(_model_class(name), FasterRCNN)]


def _model_class(builder: str) -> type:
    return inspect.signature(get_model_builder(builder)).return_annotation


def _check_options(builder: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a builder. torchvision itself ignores those that it does not know."""
    known = builders_with_heads()
    if builder not in known:
        what = "has no RoI heads, so no operator" if builder in list_models(module=detection) else "is no detector of torchvision"
        raise InputError(f"detector.builder={builder}: it {what}. Choose one of {', '.join(known)}")
    functions: list[Callable] = [get_model_builder(builder), GeneralizedRCNNTransform.__init__]
    functions += [part.__init__ for part in _model_class(builder).__mro__ if issubclass(part, FasterRCNN)]
    taken = {name for function in functions for name in inspect.signature(function).parameters}
    taken -= {"self", "kwargs", *SETTINGS}
    for name in options:
        if name not in taken:
            raise InputError(f"detector.options.{name}: {builder} does not take it. It takes {', '.join(sorted(taken))}")
    return dict(options)


def _entry(builder: str, parameter: str, name: str | Path) -> Enum | None:
    """Return torchvision's weights of this name; None for a file.

    Raises:
        InputError: neither a name nor a file.
    """
    (entries, *_) = get_args(inspect.signature(get_model_builder(builder)).parameters[parameter].annotation)
    if str(name) in entries.__members__:
        return entries[str(name)]
    if parameter == "weights" and Path(path_setting(name, "detector.weights")).is_file():
        for entry in entries:
            if Path(entry.value.url).name == Path(name).name:
                folder = Path(torch.hub.get_dir()) / "checkpoints"
                raise InputError(
                    f"detector.weights={name} are torchvision's. Set detector.weights={entry.name}; the file may lie in {folder}"
                )
        return None
    place = "no such file, and no name" if parameter == "weights" else "no name"
    raise InputError(f"detector.{parameter}={name}: {place} of torchvision's weights for {builder} ({', '.join(entries.__members__)})")


def _build_trained(
    builder: str, weights: str | Path | None, entry: Enum | None, categories: str | Sequence[str] | None, options: Mapping[str, Any]
) -> tuple[GeneralizedRCNN, list[str]]:
    """Build a detector with all weights. Return it and the names of its classes."""
    if weights is None:
        raise InputError("detector.weights: a detector without a checkpoint needs them. Set detector.weights=COCO_V1 or a file, or ckpt=")
    if entry is not None:
        if categories is not None:
            raise InputError(f"detector.categories: the names of detector.weights={weights} are known. Remove it")
        return get_model_builder(builder)(weights=entry, weights_backbone=None, **options), entry.meta["categories"]
    if categories is None:
        raise InputError(
            f"detector.weights={weights}: a file does not name its classes. Set detector.categories=COCO_V1, where they are COCO's, or a "
            "list of the names by label, the background first"
        )
    if isinstance(categories, str):
        categories = _entry(builder, "weights", categories).meta["categories"]
    try:
        state = read_state(path_setting(weights, "detector.weights"))
        state = state.get("model", state)  # as torchvision's training script saves it
        rows = len(state["roi_heads.box_predictor.cls_score.bias"])
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"detector.weights={weights}: not the state dict of a detector of torchvision with RoI heads ({error})") from error
    if rows != len(categories):
        raise InputError(f"detector.weights={weights} has {rows} classes, detector.categories {len(categories)}, each with the background")
    model = _build_plain(builder, rows, is_trained=True, has_eps_0=False, options=options)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"detector.weights={weights} does not fit {builder}: {str(error).splitlines()[1].strip()}") from error
    return model, list(categories)


def _build_for_training(
    builder: str, num_classes: int, entry: Enum | None, weights_backbone: str | None, options: Mapping[str, Any]
) -> GeneralizedRCNN:
    """Build a detector of other classes than those of its weights, if there are any."""
    if entry is not None:
        model = get_model_builder(builder)(weights=entry, weights_backbone=None, **options)
        heads = model.roi_heads
        heads.box_predictor = FastRCNNPredictor(heads.box_predictor.cls_score.in_features, num_classes)
        if heads.has_mask():
            hidden = heads.mask_predictor.conv5_mask
            heads.mask_predictor = MaskRCNNPredictor(hidden.in_channels, hidden.out_channels, num_classes)
            log.info("The last layers of the masks start random")
        log.info("The last layers of the detector, class scores and box deltas, start random")
        return model
    if weights_backbone is None and options.get("trainable_backbone_layers") is not None:
        raise InputError("detector.options.trainable_backbone_layers: all layers are trained without pretrained weights. Remove it")
    backbone = None if weights_backbone is None else _entry(builder, "weights_backbone", weights_backbone)
    return get_model_builder(builder)(weights=None, weights_backbone=backbone, num_classes=num_classes, **options)


def _build_plain(builder: str, num_classes: int, is_trained: bool, has_eps_0: bool, options: Mapping[str, Any]) -> GeneralizedRCNN:
    """Build a detector whose weights are loaded afterwards, with the norms and frozen layers of torchvision's where it `is_trained`."""
    with _freezing(builder, is_trained or options.get("trainable_backbone_layers") is not None):
        model = get_model_builder(builder)(weights=None, weights_backbone=None, num_classes=num_classes, **options)
    if is_trained and builder not in TRAINED_NORM:
        freeze_norm(model.backbone.body)
    if has_eps_0:
        overwrite_eps(model, 0.0)
    return model


@contextmanager
def _freezing(builder: str, is_trained: bool) -> Iterator[None]:
    """Let a builder freeze the layers that it freezes where it loads weights. How many is decided by a private function of its module."""
    module = inspect.unwrap(get_model_builder(builder)).__globals__
    validate = module["_validate_trainable_layers"]
    module["_validate_trainable_layers"] = lambda _, *numbers: validate(is_trained, *numbers)
    try:
        yield
    finally:
        module["_validate_trainable_layers"] = validate
