"""What COCO's metrics are computed of: IoU thresholds, size ranges and the number of detections."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from roi_quantization.detection.common.errors import InputError

COCO_IOU_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
COCO_AREAS = (("small", 0.0, 32.0), ("medium", 32.0, 96.0), ("large", 96.0, None))
COCO_MAX_DETECTIONS = 100  # of an image and category
ALL_SIZES = (0.0, 1e10)  # square pixels, COCO's
SINGLE_THRESHOLDS = (0.5, 0.75, 0.9)  # of AP50, AP75 and AP90, whatever AP is a mean over
SEGM = "segm_"  # before the names of the metrics of masks


@dataclass(frozen=True)
class Protocol:
    """What metrics are means over and limited to. The defaults are COCO's.

    Attributes:
        iou_thresholds: of AP and AR, which are means over them. AP50 and AP75 do not depend on them.
        areas: name, lowest and highest size of each range in pixels, the side of a square of the same area, both ends
            included. None: no upper limit.
        max_detections: maximum number of detections evaluated per image and category.

    Raises:
        InputError: thresholds or ranges that cannot be evaluated; the message names the setting.
    """

    iou_thresholds: tuple[float, ...] = COCO_IOU_THRESHOLDS
    areas: tuple[tuple[str, float, float | None], ...] = COCO_AREAS
    max_detections: int = COCO_MAX_DETECTIONS

    def __post_init__(self) -> None:
        thresholds = self.iou_thresholds
        if not thresholds or any(not _is_number(t) or not 0 < t <= 1 for t in thresholds) or list(thresholds) != sorted(set(thresholds)):
            raise InputError(
                f"coco_eval.iou_thresholds={list(thresholds)}: expected ascending numbers above 0 and up to 1, such as [0.5, 0.75]"
            )
        for area in self.areas:
            if not _is_range(area):
                raise InputError(
                    f"coco_eval.areas: {area} is not a size range. Expected [name, low, high] in pixels with 0 <= low < high, such as "
                    "[tiny, 0, 16]; high is null where there is no limit, and a name is a word"
                )
        names = [name for name, _, _ in self.areas]
        if len(set(names)) < len(names):
            raise InputError(
                f"coco_eval.areas: the names {', '.join(names)} are not all different. Each names a metric, such as AP_{names[0]}"
            )

    @property
    def has_coco_thresholds(self) -> bool:
        return self.iou_thresholds == COCO_IOU_THRESHOLDS

    @property
    def evaluated_thresholds(self) -> np.ndarray | None:
        """The IoU thresholds to match at: those of AP and the `SINGLE_THRESHOLDS`. None: COCO's."""
        return None if self.has_coco_thresholds else np.array(sorted({*self.iou_thresholds, *SINGLE_THRESHOLDS}))

    @property
    def square_pixels(self) -> dict[str, tuple[float, float]]:
        """The size ranges in square pixels by name."""
        return {name: (low**2, ALL_SIZES[1] if high is None else high**2) for name, low, high in self.areas}

    @property
    def sizes(self) -> dict[str, str]:
        """The size ranges in words by name: `< 32 px`, `32 to 96 px`, `> 96 px`."""
        return {
            name: f"> {low:g} px" if high is None else f"{low:g} to {high:g} px" if low else f"< {high:g} px"
            for name, low, high in self.areas
        }

    @property
    def deviations(self) -> list[str]:
        """What is not COCO's, a sentence each."""
        found = []
        if self.max_detections != COCO_MAX_DETECTIONS:
            found.append(f"Up to {self.max_detections} detections of an image and class count, where COCO has {COCO_MAX_DETECTIONS}.")
        if not self.has_coco_thresholds:
            found.append(f"AP and AR are means over IoU {self.thresholds_in_words}, where COCO has 0.5:0.05:0.95.")
        if self.areas != COCO_AREAS:
            sizes = ", ".join(f"{name} {words}" for name, words in self.sizes.items()) or "none"
            found.append(f"Size ranges: {sizes}, where COCO has small < 32 px, medium 32 to 96 px, large > 96 px.")
        return found

    @property
    def thresholds_in_words(self) -> str:
        """`0.5:0.05:0.95` for many at equal distances, else all: `0.3, 0.5`."""
        steps = np.diff(self.iou_thresholds)
        if len(steps) > 2 and np.allclose(steps, steps[0]):
            return f"{self.iou_thresholds[0]:g}:{steps[0]:g}:{self.iou_thresholds[-1]:g}"
        return ", ".join(f"{threshold:g}" for threshold in self.iou_thresholds)

    def describe(self) -> str:
        """Describe the protocol in one line, for comparison with another."""
        sizes = ", ".join(f"{name} {words}" for name, words in self.sizes.items())
        return f"IoU {self.thresholds_in_words}, {self.max_detections} detections, sizes {sizes or 'none'}"

    def metric(self, name: str) -> str:
        """Return the name that loggers and callers get a metric by: `AP`, and `AP_iou0.3_0.5` over other thresholds than COCO's."""
        if self.has_coco_thresholds or name.removeprefix(SEGM).partition("_")[0] not in ("AP", "AR"):
            return name
        return f"{name}_iou{self.thresholds_in_words.replace(':', '-').replace(', ', '_')}"  # characters that every logger takes

    def logged(self, key: str) -> str:
        """Return the key that loggers get for `val/AP`."""
        split, _, name = key.partition("/")
        return f"{split}/{self.metric(name)}"

    def as_json(self) -> dict[str, Any]:
        """Return plain containers."""
        areas = [list(area) for area in self.areas]
        return {"max_detections": self.max_detections, "iou_thresholds": list(self.iou_thresholds), "areas": areas}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Protocol":
        """Invert `as_json`; what earlier versions did not write is COCO's."""
        return cls(
            tuple(content.get("iou_thresholds", COCO_IOU_THRESHOLDS)),
            tuple((name, low, high) for name, low, high in content.get("areas", COCO_AREAS)),
            content.get("max_detections", COCO_MAX_DETECTIONS),
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_range(area: Any) -> bool:
    if not isinstance(area, tuple) or len(area) != 3:
        return False
    name, low, high = area
    is_name = isinstance(name, str) and re.fullmatch(r"[A-Za-z]\w*", name) is not None and name != "all"
    return is_name and _is_number(low) and low >= 0 and (high is None or (_is_number(high) and low < high))


COCO_PROTOCOL = Protocol()
