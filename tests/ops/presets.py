"""The presets as the shipped configurations define them, and boxes to test them with."""

from functools import partial
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from roi_quantization.ops.geometry import IntegralRule, LatticeRule

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "roi"
PRESETS = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
WITHOUT_BOX_GRADIENT = {"pool", "pool_floor", "pool_bins", "pool_exclusive"}


def preset(name: str, **knobs: object) -> partial:
    """The operator of `configs/roi/<name>.yaml`, a callable (features, boxes, output_size, spatial_scale), with some knobs changed."""
    return instantiate(OmegaConf.load(PRESETS[name]), **knobs)


def rule_of(operator: partial) -> LatticeRule | IntegralRule:
    """Where an operator of a configuration looks."""
    knobs = {k: v for k, v in operator.keywords.items() if k != "reduce"}
    return LatticeRule(**knobs) if len(knobs) > 1 else IntegralRule(**knobs)


def random_boxes(count: int, images: int, width: float, height: float, seed: int = 0) -> Tensor:
    """`[K, 5]` boxes of all sizes; some reach over the image's edges, in every direction."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(count, 4, generator=generator, dtype=torch.float64)
    size = torch.tensor([width, height], dtype=torch.float64)
    low = (u[:, :2] * 1.2 - 0.2) * size
    high = low + u[:, 2:] ** 2 * size
    image = torch.randint(images, (count, 1), generator=generator)
    return torch.cat([image, low, high], 1)


# Boxes that break other implementations: no width, no area, reversed, one cell, all of the map, outside of it on each side, far too large.
AWKWARD = torch.tensor(
    [
        [0, 16.0, 16.0, 16.0, 80.0],
        [0, 37.0, 21.0, 37.0, 21.0],
        [1, 90.0, 70.0, 20.0, 30.0],
        [1, 32.0, 32.0, 48.0, 48.0],
        [0, 0.0, 0.0, 160.0, 128.0],
        [1, -200.0, 10.0, -60.0, 60.0],
        [1, 400.0, 300.0, 500.0, 420.0],
        [0, -3e4, -2e4, 4e4, 5e4],
        [0, 7.999, 8.0, 24.0, 24.001],
    ],
    dtype=torch.float64,
)
