"""What do this package's operators gain in torchvision's detectors? Inference and a training step: torchvision's own operators, the same
with `accelerate_torchvision()`, and RoIAlign in the extractor that `detector=torchvision` puts in the place of torchvision's.

    python benchmarks/torchvision_detectors.py                        # Faster and Mask R-CNN, 2 images of 800 x 1066
    python benchmarks/torchvision_detectors.py --size 320 --rounds 1 # quicker

Weights are random, and every score counts, so that masks are pooled as in a trained detector. The ways take turns in one process on the
same images and proposals; the times are medians. The operators' share is theirs in PyTorch's profiler, forward and backward.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from meters import describe_machine, set_up_device
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn
from tqdm import tqdm

from roi_quantization.detection.common.files import atomic_write
from roi_quantization.ops import roi_align
from roi_quantization.ops.acceleration import accelerate_torchvision
from roi_quantization.roi_heads.extractor import MultiScaleRoIExtractor

BUILDERS = {"fasterrcnn_resnet50_fpn": fasterrcnn_resnet50_fpn, "maskrcnn_resnet50_fpn": maskrcnn_resnet50_fpn}
OPERATORS = tuple(
    f"{library}::{name}"
    for library, name in (
        ("torchvision", "roi_align"),
        ("torchvision", "_roi_align_backward"),
        ("roi_quantization", "lattice_pool"),
        ("roi_quantization", "lattice_pool_backward"),
    )
)


@contextmanager
def extractors(detector: nn.Module) -> Iterator[None]:
    """With torchvision's settings of RoIAlign."""
    heads = detector.roi_heads
    poolers = {name: pooler for name in ("box_roi_pool", "mask_roi_pool") if (pooler := getattr(heads, name)) is not None}
    for name, pooler in poolers.items():
        setattr(heads, name, MultiScaleRoIExtractor(partial(roi_align, sampling_ratio=pooler.sampling_ratio), pooler))
    yield
    for name, pooler in poolers.items():
        setattr(heads, name, pooler)


WAYS: dict[str, Callable[[nn.Module], AbstractContextManager]] = {
    "torchvision": nullcontext,
    "accelerated": lambda _: accelerate_torchvision(),
    "roi=align": extractors,
}


def main() -> None:
    arguments = parse_arguments()
    set_up_device("cpu", arguments.threads)
    rows = []
    for name in tqdm(BUILDERS, desc="detectors"):
        detector, images, targets = build(name, arguments.size)
        rows += [measure(name, call, arguments.rounds) for call in (Inference(detector, images), TrainingStep(detector, images, targets))]
    print(f"{describe_machine('cpu')}; 2 images, shorter side {arguments.size} pixels; seconds, and the RoI operators' share\n")
    print(format_rows(rows))
    if arguments.json:
        atomic_write(
            arguments.json, json.dumps({"machine": describe_machine("cpu"), "size": arguments.size, "rows": rows}, indent=2).encode()
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Torchvision's detectors with its own RoI operators and with this package's.")
    parser.add_argument("--size", type=int, default=800, help="shorter side of the images in pixels (800)")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each way, after one that is not counted (3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (2)")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


def build(name: str, size: int) -> tuple[nn.Module, list[Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    detector = BUILDERS[name](weights=None, weights_backbone=None, min_size=size, box_score_thresh=0.0)
    width = size * 4 // 3
    images = [torch.rand(3, size, width) for _ in range(2)]
    corner = torch.rand(2, 8, 2) * torch.tensor([width, size]) * 0.6
    boxes = torch.cat([corner, corner + 0.05 * size + torch.rand(2, 8, 2) * 0.3 * size], 2)
    masks = torch.zeros(8, size, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes[0].int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    targets = [{"boxes": of_image, "labels": torch.arange(1, 9), "masks": masks} for of_image in boxes]
    return detector, images, targets


class Inference:
    label = "inference"

    def __init__(self, detector: nn.Module, images: list[Tensor]):
        self.detector, self.images = detector, images

    def __call__(self) -> list[Tensor]:
        """Boxes and scores, best first."""
        with torch.no_grad():
            found = self.detector.eval()(self.images)
        return [image[key] for image in found for key in ("boxes", "scores")]


class TrainingStep:
    """Forward, losses, backward; no optimizer."""

    label = "training step"

    def __init__(self, detector: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]):
        self.detector, self.images, self.targets = detector, images, targets

    def __call__(self) -> list[Tensor]:
        """The losses."""
        self.detector.train().zero_grad()
        torch.manual_seed(0)  # of the sampled RoIs
        losses = self.detector(self.images, self.targets)
        sum(losses.values()).backward()
        return [loss.detach() for loss in losses.values()]


def measure(name: str, call: Inference | TrainingStep, rounds: int) -> dict:
    """Seconds and the operators' share in each way, and how far the results are from torchvision's."""
    seconds, share, results = {way: [] for way in WAYS}, {}, {}
    for way, context in WAYS.items():
        with context(call.detector), profile(activities=[ProfilerActivity.CPU]) as profiler:
            begin = time.perf_counter()
            results[way] = call()
            whole = time.perf_counter() - begin
        share[way] = sum(event.cpu_time_total for event in profiler.key_averages() if event.key in OPERATORS) / 1e6 / whole
    for _ in range(rounds):
        for way, context in WAYS.items():
            with context(call.detector):
                begin = time.perf_counter()
                call()
                seconds[way].append(time.perf_counter() - begin)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    return {
        "detector": name,
        "what": call.label,
        "seconds": medians,
        "share": share,
        "gain": {way: medians["torchvision"] / medians[way] for way in WAYS},
        "largest_difference": {way: largest_difference(results["torchvision"], found) for way, found in results.items()},
    }


def largest_difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest absolute difference of any number; infinite where the numbers of detections differ."""
    if [e.shape for e in expected] != [f.shape for f in found]:
        return float("inf")
    return max(float((e - f).abs().max()) for e, f in zip(expected, found, strict=True) if e.numel())


def format_rows(rows: list[dict]) -> str:
    lines = [f"{'':42}{'':14}{'seconds':>10}{'share':>8}{'gain':>8}{'differs by':>12}"]
    for row in rows:
        for way in WAYS:
            what = f"{row['detector']}, {row['what']}"
            seconds, share, gain, apart = (row[key][way] for key in ("seconds", "share", "gain", "largest_difference"))
            lines.append(f"{what:42}{way:14}{seconds:10.2f}{share:8.1%}{gain:7.2f}x{apart:12.1e}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
