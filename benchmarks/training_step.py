"""How long does a training step take, and where does the time go? Compared with the same step built from torchvision's parts.

    python benchmarks/training_step.py        # VGG16 at stride 16, 2 images of 600 x 800 pixels, 64 RoIs each; 3 minutes on two cores
    python benchmarks/training_step.py --device cuda --precision bf16 --json step.json

Both steps have the same backbone, fully connected layers, images, proposals and optimizer (SGD with momentum). Theirs has torchvision's
`RoIHeads` with torchvision's `roi_align` or `roi_pool`, and samples on the device. The steps alternate, and the
ratio is that of the medians. Loading is not included.

Each part is measured alone, forward and backward, on the inputs that it has in the step, so the parts need not add up to the step. They do
not include matching, sampling, losses and the normalization of images.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torchvision
from hydra import compose, initialize_config_dir
from meters import Call, describe_machine, set_up_device
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from tqdm import tqdm

from roi_quantization.detection.common.files import atomic_write
from roi_quantization.detection.model.build import build_detector, instantiate
from roi_quantization.detection.model.fast_rcnn import FastRCNN

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DETECTOR = ["backbone=vgg16", "backbone.frozen_blocks=2", "head=two_fc", "optim=sgd"]
TORCHVISION_OPERATORS = {
    "align": lambda size, scale: torchvision.ops.RoIAlign(size, scale, sampling_ratio=2, aligned=True),
    "pool": torchvision.ops.RoIPool,
}


class PoolingAdapter(nn.Module):
    """Call an operator of torchvision's the way `RoIHeads` does, with the images' shapes as well."""

    def __init__(self, operator: nn.Module):
        super().__init__()
        self.operator = operator

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: object) -> Tensor:
        return self.operator(features["0"], boxes)


class TorchvisionDetector(nn.Module):
    """The layers of a detector of ours around torchvision's `RoIHeads` and operator."""

    def __init__(self, ours: FastRCNN, operator: nn.Module):
        super().__init__()
        heads = ours.roi_heads
        self.backbone, self.batch = ours.backbone, ours.batch
        self.roi_heads = RoIHeads(
            PoolingAdapter(operator), heads.box_head, heads.box_predictor, 0.5, 0.5, 64, 0.25, (10.0, 10.0, 5.0, 5.0), 0.05, 0.5, 100
        )

    def forward(self, images: list[Tensor], targets: list[dict]) -> tuple[list, dict[str, Tensor]]:
        features = {"0": self.backbone(self.batch(images))}
        shapes = [tuple(image.shape[1:]) for image in images]
        return self.roi_heads(features, [target["proposals"] for target in targets], shapes, targets)


def make_batch(height: int, width: int, device: str) -> tuple[list[Tensor], list[dict]]:
    """Make two images of noise on a device with five objects each, and 2000 proposals on the CPU, 200 of them near the objects."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for image_id in range(2):
        objects = random_boxes(5, height, width, generator)
        near = objects.repeat(40, 1) + 0.1 * (objects[:, 2:] - objects[:, :2]).repeat(40, 2) * torch.randn(200, 4, generator=generator)
        proposals = torchvision.ops.clip_boxes_to_image(torch.cat([near, random_boxes(1800, height, width, generator)]), (height, width))
        target = {"boxes": objects, "labels": torch.randint(1, 21, (5,), generator=generator), "proposals": proposals}
        targets.append(target | {"image_id": image_id, "original_size": (height, width)})
        images.append(torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8).to(device))
    return images, targets


def random_boxes(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw boxes inside the image, with sides from 32 pixels to 0.9 of it."""
    size = torch.tensor([width, height])
    extent = torch.exp(torch.rand(count, 2, generator=generator) * torch.log(0.9 * size / 32)) * 32
    low = torch.rand(count, 2, generator=generator) * (size - extent)
    return torch.cat([low, low + extent], 1)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, precision: Callable[[], AbstractContextManager], *inputs: list) -> None:
    with precision():
        _, losses = model(*inputs)
        loss = sum(losses.values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def forward_backward(call: Call, gradients_of: list[Tensor], precision: Callable[[], AbstractContextManager]) -> None:
    """Call, and compute the gradients of its outputs with respect to `gradients_of`."""
    with precision():
        out = call()
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.grad(out, gradients_of, [torch.ones_like(o) for o in out], allow_unused=True)


def step_parts(
    detector: FastRCNN, optimizer: torch.optim.Optimizer, precision: Callable[[], AbstractContextManager], images: list, targets: list
) -> dict[str, Call]:
    """Return the parts of a step by name, each with the inputs that it has there."""
    heads = detector.roi_heads
    with torch.no_grad(), precision():
        pixels = detector.batch(images)
        sampled = heads.sample([target["proposals"] for target in targets], targets, epoch=0)
        proposals = [rois.proposals.to(pixels.device) for rois in sampled]
        features = detector.backbone(pixels)
        pooled = heads.box_roi_pool(features, proposals)
    features.requires_grad_()
    pooled.requires_grad_()
    trained = {name: [p for p in module.parameters() if p.requires_grad] for name, module in detector.named_children()}
    return {
        "backbone": partial(forward_backward, partial(detector.backbone, pixels), trained["backbone"], precision),
        "RoI operator": partial(forward_backward, partial(heads.box_roi_pool, features, proposals), [features], precision),
        "head": partial(forward_backward, lambda: heads.box_predictor(heads.box_head(pooled)), [pooled, *trained["roi_heads"]], precision),
        "optimizer": optimizer.step,
    }


def time_call(call: Call, device: str) -> float:
    """Return the seconds of one call, including the wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(roi: str, size: tuple[int, int], device: str, precision: Callable[[], AbstractContextManager], rounds: int) -> dict:
    """Return the medians in milliseconds of both steps and of the parts of ours, and all rounds."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", [*DETECTOR, f"roi={roi}"])
    ours = build_detector(cfg, num_classes=21).to(device).train()
    theirs = TorchvisionDetector(copy.deepcopy(ours), TORCHVISION_OPERATORS[roi](7, 1 / 16)).train()
    images, targets = make_batch(*size, device)
    on_device = [{name: value.to(device) if isinstance(value, Tensor) else value for name, value in target.items()} for target in targets]
    optimizers = [instantiate(cfg.optim).optimizer(instantiate(cfg.optim).groups(model)) for model in (ours, theirs)]
    calls = {
        name: partial(train_step, model, optimizer, precision, images, given)
        for name, model, optimizer, given in zip(("ours", "theirs"), (ours, theirs), optimizers, (targets, on_device), strict=True)
    }
    for call in calls.values():
        call()  # compiles, and allocates the momenta
    calls |= step_parts(ours, optimizers[0], precision, images, targets)
    for name in list(calls)[2:]:
        calls[name]()
    taken = {name: [] for name in calls}
    for _ in tqdm(range(rounds), desc=f"roi={roi}", leave=False):
        for name, call in calls.items():
            taken[name].append(1e3 * time_call(call, device))
    return {name: statistics.median(values) for name, values in taken.items()} | {"rounds": taken}


def format_table(found: dict) -> str:
    lines = [
        found["machine"],
        f"2 images of {found['height']} x {found['width']}, 64 RoIs each, VGG16 at stride 16, {found['precision']}",
        "",
    ]
    lines.append(f"{'ms a step':14}" + "".join(f"{roi:>10}{'':8}" for roi in found["operators"]))
    names = [name for name in next(iter(found["operators"].values())) if name != "rounds"]
    for name in names:
        cells = []
        for row in found["operators"].values():
            share = f"{row[name] / row['ours']:.1%}" if name not in ("ours", "theirs") else ""
            cells.append(f"{row[name]:10.1f}{share:>8}")
        lines.append(f"{'  ' * (name not in ('ours', 'theirs')) + name:14}" + "".join(cells))
    lines.append(f"{'theirs / ours':14}" + "".join(f"{row['theirs'] / row['ours']:10.2f}{'':8}" for row in found["operators"].values()))
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32", choices=["32", "bf16"])
    parser.add_argument("--operators", nargs="+", default=list(TORCHVISION_OPERATORS), choices=list(TORCHVISION_OPERATORS))
    parser.add_argument(
        "--size", nargs=2, type=int, default=[600, 800], metavar=("HEIGHT", "WIDTH"), help="of the images, pixels (default: 600 800)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="steps of each (default: 5; 50 take about a second on CUDA)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    set_up_device(args.device, args.threads)
    precision = partial(torch.autocast, args.device, torch.bfloat16) if args.precision == "bf16" else nullcontext
    found = {"machine": describe_machine(args.device), "precision": args.precision, "height": args.size[0], "width": args.size[1]}
    found["operators"] = {roi: measure(roi, tuple(args.size), args.device, precision, args.rounds) for roi in args.operators}
    print(format_table(found))
    if args.json:
        atomic_write(args.json, (json.dumps(found, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
