"""Weights of a checkpoint as the start of a training on other classes."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.runs.checkpoint import check_weights, detector_weights, load_checkpoint

log = logging.getLogger(__name__)

PREDICTOR = "roi_heads.box_predictor."
PER_CLASS = (f"{PREDICTOR}cls_score.", "roi_heads.mask_predictor.mask_fcn_logits.")  # weights with a row for each class


def initialize_from(detector: nn.Module, path: str | Path, categories: Sequence[dict]) -> None:
    """Load the weights of a checkpoint into a detector of perhaps other classes.

    Rows of the classifier, of the box regressor and of the masks are kept for the background and for classes of the same name; those of
    other classes stay as they are. A regressor that is shared by all classes is kept whole. The log says which classes are which.

    Args:
        detector: as built for the new classes.
        path: the checkpoint.
        categories: `{"id", "name"}` of the new classes, in the order of the labels.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is not a checkpoint, or another weight than these rows does not fit; or the classes differ and the predictor of the
            detector is not torchvision's, so that it is not known which row is of which class.
    """
    checkpoint = load_checkpoint(path)
    before, now = ([category["name"] for category in classes] for classes in (checkpoint["categories"], categories))
    found, wanted = detector_weights(checkpoint), detector.state_dict()
    if before != now:
        if not isinstance(detector.roi_heads.box_predictor, FastRCNNPredictor):
            raise InputError(
                f"init_from={path}: it was trained on other classes, and head.box_predictor is not a BoxPredictor, so the rows of the "
                "classes are not known. Train on the same classes, or choose head=two_fc"
            )
        rows = {0: 0} | {now.index(name) + 1: before.index(name) + 1 for name in now if name in before}
        for key, fresh in wanted.items():
            width = _rows_of_a_class(key, fresh, len(now) + 1)
            if width and key in found and found[key].shape[0] == width * (len(before) + 1) and found[key].shape[1:] == fresh.shape[1:]:
                found[key] = _move_rows(found[key], fresh, rows, width)
    try:
        check_weights(found, wanted)
    except InputError as error:
        raise InputError(f"init_from={path}: {error}") from error
    detector.load_state_dict(found)
    kept, new = ([name for name in now if (name in before) == known] for known in (True, False))
    log.info(
        "Starts from %s: the rows of %s are kept, those of %s are new", path, ", ".join(kept) or "no class", ", ".join(new) or "no class"
    )


def _rows_of_a_class(key: str, value: Tensor, num_classes: int) -> int:
    """Return how many rows of a weight each class has; 0 where classes share it."""
    if key.startswith(PER_CLASS):
        return 1
    is_per_class = key.startswith(f"{PREDICTOR}bbox_pred.") and value.shape[0] == 4 * num_classes
    return 4 if is_per_class else 0


def _move_rows(found: Tensor, fresh: Tensor, rows: dict[int, int], width: int) -> Tensor:
    """Return `fresh` with the rows of known classes: label now -> label before."""
    moved, before = torch.clone(fresh).unflatten(0, (-1, width)), found.unflatten(0, (-1, width))
    for label, old in rows.items():
        moved[label] = before[old]
    return moved.flatten(0, 1)
