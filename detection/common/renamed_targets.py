"""The configurations of earlier versions: `_target_`s from before everything was imported by the name `roi_quantization`."""

from typing import Any

_OPS = ("lattice_pool", "prroi_pool")
_HEADS = ("BoxPredictor", "FastRCNNHeads", "RoIExtractor", "TwoFCHead")
_DETECTION = {
    "backbone.VGG16": "model.vgg16.VGG16",
    "data.embedded.EmbeddedSet": "data.embedded.EmbeddedSet",
    "data.module.DetectionData": "data.module.DetectionData",
    "data.proposal_file.ProposalFile": "data.proposals.file.ProposalFile",
    "data.proposals.Grid": "data.proposals.grid.Grid",
    "data.selective_search.SelectiveSearch": "data.proposals.selective_search.SelectiveSearch",
    "data.transforms.resize_and_flip": "data.transforms.resize_and_flip",
    "evaluation.matching.SilentCOCOeval": "evaluation.matching.SilentCOCOeval",
    "evaluation.matching.faster_coco_eval": "evaluation.matching.faster_coco_eval",
    "optim.one_cycle": "model.optim.one_cycle",
    "optim.parameter_groups": "model.optim.parameter_groups",
    "optim.step_decay": "model.optim.step_decay",
}

RENAMED = {f"ops.{name}": f"roi_quantization.ops.{name}" for name in _OPS}
RENAMED |= {f"roi_heads.{name}": f"roi_quantization.roi_heads.{name}" for name in _HEADS}
RENAMED |= {f"detection.{old}": f"roi_quantization.detection.{new}" for old, new in _DETECTION.items()}


REWRITTEN: dict[str, str | None] = {
    "${backbone.weights}": "${oc.select:backbone.weights,null}",
    "${backbone.norm}": "${oc.select:backbone.norm,none}",
    "${..val.path}": None,  # test took val's proposals whatever its images were; null takes them where these are the same
}


def upgrade_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a run with the present names and references. `ADDED_SETTINGS` are not added."""
    return _rewrite(rename_targets(config))


def _rewrite(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _rewrite(value) for key, value in config.items()}
    return REWRITTEN.get(config, config) if isinstance(config, str) else config


def rename_targets(config: Any) -> Any:
    """Return plain containers with the present name of each `_target_` in them."""
    if isinstance(config, dict):
        return {
            key: RENAMED.get(value, value) if key == "_target_" and isinstance(value, str) else rename_targets(value)
            for key, value in config.items()
        }
    return [rename_targets(value) for value in config] if isinstance(config, list) else config
