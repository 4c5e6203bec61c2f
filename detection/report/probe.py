"""What an operator costs on real features, without training: a linear box regressor on features that stay as they are.

The regressor is a ridge regression from the RoI features to the targets of box regression, in closed form. It is fitted and
tested by cross-validation over images, for each operator on the same RoIs, so that differences are paired over objects.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy import linalg, stats
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.evaluation.statistics import Estimate
from roi_quantization.detection.report.predicted_cost import SIZES
from roi_quantization.detection.report.prose import paper_name

FOLDS = 5  # of the cross-validation
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the standardised features, per RoI
_CODER = BoxCoder((1.0, 1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Pairs:
    """`N` RoIs and the objects that they overlap, in pixels of the network's input.

    Attributes:
        rois: float64 `[N, 4]`, xyxy.
        objects: float64 `[N, 4]`, the object of each RoI.
        object_of: int `[N]`, number of that object in the whole set.
        image_of: int `[N]`, number of the image.
    """

    rois: np.ndarray
    objects: np.ndarray
    object_of: np.ndarray
    image_of: np.ndarray


@dataclass(frozen=True)
class Probe:
    """How well boxes were regressed with each operator, by object: mean over the object's RoIs.

    Attributes:
        iou: operator -> `[M]`, IoU of the regressed box and the object.
        strict: operator -> `[M]`, share of the RoIs whose regressed box has an IoU of 0.75 or more.
        before: `[M]`, IoU of the RoIs themselves.
        cells: `[M]`, size of the objects in cells.
        image: int `[M]`.
    """

    iou: dict[str, np.ndarray]
    strict: dict[str, np.ndarray]
    before: np.ndarray
    cells: np.ndarray
    image: np.ndarray

    def difference(self, name: str, reference: str, resamples: int = 2000) -> Estimate:
        """Estimate the mean difference in IoU, in points, with a 95 % interval from resampled images."""
        change = 100 * (self.iou[name] - self.iou[reference])
        image = np.unique(self.image, return_inverse=True)[1]
        sums, counts = np.bincount(image, change), np.bincount(image).astype(float)
        if not change.any():
            return Estimate(0.0, 0.0, 0.0, n=len(sums))

        def mean(some: np.ndarray, of: np.ndarray, axis: int = -1) -> np.ndarray:
            return some.sum(axis=axis) / of.sum(axis=axis)

        found = stats.bootstrap(
            (sums, counts), mean, paired=True, n_resamples=resamples, method="basic", batch=max(1, 2**22 // len(sums)),
            rng=np.random.default_rng(0),
        )  # fmt: skip
        ends = found.confidence_interval
        return Estimate(float(change.mean()), float(ends.low), float(ends.high), float(found.standard_error), n=len(sums))


def choose_rois(proposals: Tensor, boxes: Tensor, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the proposals that overlap an object by IoU 0.5 or more, at most so many an object.

    Returns:
        The proposals `[K, 4]`, and the index of the object `[K]` that each overlaps most.
    """
    if not len(proposals) or not len(boxes):
        return proposals[:0], torch.zeros(0, dtype=torch.int64)
    overlap, place = box_iou(proposals, boxes).max(dim=1)
    order = torch.randperm(len(proposals), generator=torch.Generator().manual_seed(seed))
    order = order[overlap[order] >= 0.5]
    kept = torch.cat([order[place[order] == number][:most] for number in range(len(boxes))])
    return proposals[kept], place[kept]


def probe(features: Mapping[str, np.ndarray], pairs: Pairs, stride: int) -> Probe:
    """Regress boxes from the features of each operator.

    Args:
        features: operator -> `[N, D]`, of the RoIs of `pairs`.
        pairs: the RoIs and their objects.
        stride: pixels per cell.

    Raises:
        InputError: fewer images than folds have a RoI.
    """
    images = np.unique(pairs.image_of)
    if len(images) < FOLDS:
        raise InputError(
            f"{len(images)} images have a proposal that overlaps an object by IoU 0.5, the probe needs {FOLDS}. Use more images."
        )
    fold = np.searchsorted(images, pairs.image_of) % FOLDS
    rois, objects = torch.from_numpy(pairs.rois), torch.from_numpy(pairs.objects)
    targets = _CODER.encode_single(objects, rois).numpy()
    _, first, object_of = np.unique(pairs.object_of, return_index=True, return_inverse=True)
    count = np.bincount(object_of)

    def by_object(values: np.ndarray) -> np.ndarray:
        return np.bincount(object_of, values) / count

    iou = {name: _cross_validate(of_operator, targets, fold, pairs) for name, of_operator in features.items()}
    return Probe(
        iou={name: by_object(of_rois) for name, of_rois in iou.items()},
        strict={name: by_object(of_rois >= 0.75) for name, of_rois in iou.items()},
        before=by_object(_iou(pairs.rois, pairs.objects)),
        cells=np.sqrt((pairs.objects[first, 2:] - pairs.objects[first, :2]).prod(axis=1)) / stride,
        image=pairs.image_of[first],
    )


def format_probe(found: Probe, reference: str, resamples: int = 2000) -> str:
    """Format the probe of all operators as a table of at most 100 columns, and state what RoIPool, or the worst operator, loses."""
    form = "{:<16}{:>9}{:>8}{:>24}" + "{:>10}" * len(SIZES)
    sizes = {name: (found.cells >= least) & (found.cells < below) for name, (least, below) in SIZES.items()}
    lines = [
        f"Mean IoU of the regressed boxes and their objects, percent. That of the RoIs is {100 * found.before.mean():.1f}.",
        f"Differences to {reference} have 95 % intervals over {len(np.unique(found.image))} images; on the right they are by object size.",
        form.format("", "mean IoU", ">= 0.75", "difference", *SIZES),
    ]
    changes = {name: found.difference(name, reference, resamples) for name in found.iou if name != reference}
    for name, iou in found.iou.items():
        level, strict = f"{100 * iou.mean():.2f}", f"{100 * found.strict[name].mean():.1f}"
        if name == reference:
            lines.append(form.format(name, level, strict, "", *[""] * len(SIZES)))
            continue
        change = 100 * (iou - found.iou[reference])
        of_sizes = (f"{change[chosen].mean():+.2f}" if chosen.any() else "-" for chosen in sizes.values())
        lines.append(form.format(name, level, strict, changes[name].text(2, signed=True), *of_sizes))
    lines.append(form.format("objects", *[""] * 3, *(str(chosen.sum()) for chosen in sizes.values())))
    if changes:
        worst = "pool" if "pool" in changes else min(changes, key=lambda name: changes[name].value)
        shown = "" if changes[worst].excludes_zero else ", which is no difference that is shown"
        change = changes[worst].text(2, signed=True)
        lines.append(f"\nWith {paper_name(worst)} the mean IoU of the regressed boxes changes by {change} points{shown}.")
    return "\n".join(lines)


def _cross_validate(features: np.ndarray, targets: np.ndarray, fold: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Return the IoU of each RoI's box, regressed with the weights of the other folds.

    The penalty of a fold is the one that does best on the other folds.
    """
    x = features - features.mean(axis=0)
    x = np.concatenate([x / (x.std(axis=0) + 1e-6), np.ones((len(x), 1), dtype=x.dtype)], axis=1)
    free = np.append(np.ones(x.shape[1] - 1), 0)  # the constant is not penalised
    gram, moments = x.T @ x, x.T @ targets
    iou = np.empty((len(PENALTIES), len(x)))
    for k in range(FOLDS):
        held = fold == k
        others, own = gram - x[held].T @ x[held], moments - x[held].T @ targets[held]
        for place, penalty in enumerate(PENALTIES):
            weights = linalg.solve(others + np.diag(penalty * (~held).sum() * free).astype(x.dtype), own, assume_a="pos")
            boxes = _CODER.decode_single(torch.from_numpy(x[held] @ weights).double(), torch.from_numpy(pairs.rois[held])).numpy()
            iou[place, held] = _iou(boxes, pairs.objects[held])
    best = [iou[:, fold != k].mean(axis=1).argmax() for k in range(FOLDS)]
    return iou[np.array(best)[fold], np.arange(len(x))]


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return box_iou(torch.from_numpy(a)[:, None], torch.from_numpy(b)[:, None])[:, 0, 0].numpy()
