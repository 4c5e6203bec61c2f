"""Build a detector, or one operator, from a configuration."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hydra.utils
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig
from torch import nn

from roi_quantization.detection.common.config_sources import choices, compose_from_all
from roi_quantization.detection.common.configuration import check_groups
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.instantiation import check_settings
from roi_quantization.detection.model.fast_rcnn import FastRCNN
from roi_quantization.roi_heads.extractor import RoIOperator


def instantiate(node: DictConfig, **more: Any) -> Any:
    """Call `hydra.utils.instantiate`; an error of what is built is raised itself, without Hydra's around it.

    Raises:
        InputError: a `_target_` is not there, or does not take a setting beside it. Nothing was called.
    """
    check_settings(node)
    try:
        return hydra.utils.instantiate(node, **more)
    except InstantiationException as error:
        cause = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None


def read_operator(name: str) -> DictConfig:
    """Compose `roi/<name>.yaml`, with the files that it builds on; of this project or of a folder that the user names.

    Raises:
        InputError: there is no such file; the message lists the choices.
    """
    known = choices("roi")
    if name not in known:
        raise InputError(
            f"there is no operator {name}. Choose from {', '.join(known)} (configs/roi), or name your folder with --config-dir"
        )
    return compose_from_all(f"roi/{name}").roi


def build_detector(cfg: DictConfig, num_classes: int | None, pretrained: bool = True) -> nn.Module:
    """Build the detector of `cfg.detector`, a callable `(cfg, num_classes, pretrained)`, of the parts in `cfg` that it wants.

    What it returns is `(images, targets) -> (detections, losses)`, see `FastRCNN.forward`, with a `backbone`, torchvision's `RoIHeads` or a
    relative as `roi_heads`, and `has_evaluation_losses`. One that can be built without `num_classes` has `match_categories`, see
    `TorchvisionDetector`.

    Args:
        cfg: with `detector`, `roi` and `channels_last`; `model.compile` where there is one, see `compile_backbone`.
        num_classes: background included. None: those of the pretrained weights.
        pretrained: whether parts with a setting `weights` load those. Not necessary where a checkpoint is loaded afterwards.

    Raises:
        InputError: a setting of a part of this project is wrong.
    """
    detector = instantiate(cfg.detector)(cfg, num_classes, pretrained)
    compile_backbone(detector, cfg.model.compile if "model" in cfg else False)
    return detector


def build_fast_rcnn(cfg: DictConfig, num_classes: int, pretrained: bool, masks: bool = False) -> FastRCNN:
    """Build the detector of `cfg.backbone`, `cfg.roi` and `cfg.head`. See `build_detector` and `build_parts`."""
    check_groups(cfg, ("proposals",))
    return FastRCNN(*build_parts(cfg, num_classes, pretrained, masks), channels_last=cfg.channels_last)


def build_parts(cfg: DictConfig, num_classes: int, pretrained: bool, masks: bool) -> tuple[nn.Module, nn.Module]:
    """Build the backbone, and the heads with the operator for it.

    Raises:
        InputError: `masks` are wanted and the head has no branch for them, or a setting is wrong.
    """
    check_groups(cfg, ("backbone", "head"))
    if masks and "mask_predictor" not in cfg.head:
        raise InputError("detector.masks=true: the head has no branch for masks. Choose mask_head=two_conv_small or four_conv")
    weights = cfg.backbone.get("weights")
    if not pretrained:
        cfg = copy.deepcopy(cfg)
        for part in (cfg.backbone, cfg.head.get("box_head", {})):
            if "weights" in part:
                part.weights = None
    with input_errors(cfg.backbone):
        backbone = instantiate(cfg.backbone)
    if not pretrained and weights is not None and hasattr(backbone, "normalize_as"):  # those of a checkpoint started from them
        backbone.normalize_as(weights)
    build_operator(cfg.roi)
    known = {
        "extractor": {"spatial_scale": 1 / backbone.stride},
        "box_head": {"in_channels": backbone.out_channels},
        "box_predictor": {"num_classes": num_classes},
    }
    if "mask_predictor" in cfg.head:
        known |= {
            "mask_extractor": {"spatial_scale": 1 / backbone.stride},
            "mask_head": {"in_channels": backbone.out_channels},
            "mask_predictor": {"num_classes": num_classes},
        }
    with input_errors(cfg.head):
        roi_heads = instantiate(cfg.head, **known)
    return backbone, roi_heads


def build_operator(node: DictConfig) -> RoIOperator:
    """Build a RoI operator. The settings of this project's are checked by a call."""
    with input_errors(node):
        operator = instantiate(node)
        if _is_own(node):
            operator(torch.zeros(1, 1, 1, 1), [torch.tensor([[0.0, 0.0, 1.0, 1.0]])], 1, 1.0)
    return operator


def compile_backbone(detector: nn.Module, backend: bool | str) -> None:
    """Let `torch.compile` compile the backbone when it is first called.

    Args:
        detector: its weights and their names stay as they are.
        backend: of `torch.compile`; True is its default, False does nothing.

    Raises:
        InputError: there is no such backend.
    """
    if backend is False:
        return
    backends = torch.compiler.list_backends(exclude_tags=())
    if backend is not True and backend not in backends:
        raise InputError(f"model.compile={backend}: expected true, false or one of {', '.join(backends)}")
    detector.backbone.compile(backend="inductor" if backend is True else backend)


@contextmanager
def input_errors(node: DictConfig) -> Iterator[None]:
    """Raise the ValueError or TypeError of a part of this project as an InputError: its arguments are settings, whose names are checked.

    Those of other code stay as they are.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError) or not _is_own(node):
            raise
        if isinstance(error, TypeError):
            raise InputError(f"{node._get_full_key(None)}: one of its settings has the wrong type: {error}") from error
        raise InputError(str(error)) from error


def _is_own(node: DictConfig) -> bool:
    """Whether the target of a configuration is of this project."""
    return str(node.get("_target_")).startswith("roi_quantization.")
