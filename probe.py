"""Measure what RoI operators cost on the features of a pretrained backbone, per object: `python probe.py backbone.weights=IMAGENET1K_V1`.

Trains nothing: a linear regression of boxes from frozen features, in closed form. See `--help` and docs/predicted_cost.md.
"""

import roi_quantization  # noqa: F401 -- first, because it says so where the package is not installed

# isort: split
import sys
from collections.abc import Mapping

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from roi_quantization.detection.common.configuration import CONFIGS, check_count, check_groups
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.data.coco import CocoDetection
from roi_quantization.detection.model.build import instantiate, read_operator
from roi_quantization.detection.model.fast_rcnn import FastRCNN
from roi_quantization.detection.report.probe import Pairs, Probe, choose_rois, format_probe, probe
from roi_quantization.detection.runs.command_line import replace_null_choices
from roi_quantization.detection.runs.errors import handle_errors
from roi_quantization.roi_heads.extractor import RoIOperator
from roi_quantization.scripts.predict_cost import load_split


def probe_operators(cfg: DictConfig) -> Probe:
    """Print how well boxes are regressed from the features of each of `cfg.operators`."""
    check_groups(cfg, ("data", "proposals", "backbone"))
    for knob in ("rois_per_object", "channels", "output_size"):
        check_count(cfg[knob], knob)
    check_count(cfg.resamples, "resamples", least=2)
    names = list(dict.fromkeys([cfg.reference, *cfg.operators]))
    operators = {name: instantiate(read_operator(name)) for name in names}
    dataset = load_split(cfg)
    torch.manual_seed(cfg.seed)
    detector = FastRCNN(instantiate(cfg.backbone), roi_heads=None).eval()
    if cfg.backbone.get("weights", "its own") is None:
        print("The backbone has random weights. Choose backbone.weights=IMAGENET1K_V1 or a file for trained ones.\n")
    features, pairs = pool_features(dataset, detector, operators, cfg)
    objects = len(np.unique(pairs.object_of))
    print(
        f"{cfg.split}: {len(dataset)} images, {dataset.num_objects} objects, of which {objects} have {len(pairs.rois)} RoIs with IoU >= 0.5"
    )
    print(f"Linear regression of boxes from the features of {type(detector.backbone).__name__} at stride {detector.backbone.stride}\n")
    found = probe(features, pairs, detector.backbone.stride)
    print(format_probe(found, cfg.reference, cfg.resamples))
    return found


@torch.inference_mode()
def pool_features(
    dataset: CocoDetection, detector: FastRCNN, operators: Mapping[str, RoIOperator], cfg: DictConfig
) -> tuple[dict[str, np.ndarray], Pairs]:
    """Return the randomly projected RoI features `[N, output_size^2 * channels]` of each operator, and the RoIs with their objects."""
    stride, width = detector.backbone.stride, detector.backbone.out_channels
    channels = min(cfg.channels, width)
    projection = torch.linalg.qr(torch.randn(width, channels, generator=torch.Generator().manual_seed(cfg.seed)))[0]
    pooled: dict[str, list[torch.Tensor]] = {name: [] for name in operators}
    rois, objects, object_of, image_of, count = [], [], [], [], 0
    for index in tqdm(range(len(dataset)), desc="features", unit="image", leave=False):
        image, target = dataset[index]
        boxes, place = choose_rois(target["proposals"], target["boxes"], cfg.rois_per_object, seed=cfg.seed + index)
        if len(boxes):
            maps = detector.backbone(detector.batch([image]))
            for name, operator in operators.items():
                of_rois = operator(maps, [boxes], cfg.output_size, 1 / stride)
                pooled[name].append(torch.einsum("kcyx,cd->kdyx", of_rois, projection).flatten(1))
            rois.append(boxes.double())
            objects.append(target["boxes"][place].double())
            object_of.append(place + count)
            image_of.append(torch.full((len(boxes),), index))
        count += len(target["boxes"])
    if not rois:
        raise InputError("No proposal overlaps an object by IoU 0.5. Look at `python recall.py` and choose other proposals.")
    pairs = Pairs(*(torch.cat(parts).numpy() for parts in (rois, objects, object_of, image_of)))
    return {name: torch.cat(parts).numpy() for name, parts in pooled.items()}, pairs


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="probe")
def _main(cfg: DictConfig) -> None:
    with handle_errors("probe.py"):
        probe_operators(cfg)


def main() -> None:
    """Compose the configuration from the command line, and run."""
    sys.argv[1:] = replace_null_choices(sys.argv[1:])
    _main()


if __name__ == "__main__":
    main()
