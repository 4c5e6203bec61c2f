"""RoI operators on tensors: RoIPool, RoIWarp, RoIAlign, PrRoIPool, and every point between them."""

from roi_quantization.ops.functional import lattice_pool, prroi_pool, roi_align, roi_pool, roi_warp
from roi_quantization.ops.modules import PrRoIPool, RoIAlign, RoIPool, RoIWarp

__all__ = ["PrRoIPool", "RoIAlign", "RoIPool", "RoIWarp", "lattice_pool", "prroi_pool", "roi_align", "roi_pool", "roi_warp"]
