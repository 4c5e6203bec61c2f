"""What docs/recipes.md uses of detectron2, which PyPI does not have: `ROIPooler` and `Boxes`, by the code of its version 0.6."""

import math
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import RoIAlign


class Boxes:
    """`detectron2.structures.Boxes`."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def area(self) -> Tensor:
        return (self.tensor[:, 2] - self.tensor[:, 0]) * (self.tensor[:, 3] - self.tensor[:, 1])

    def __len__(self) -> int:
        return len(self.tensor)


class ROIPooler(nn.Module):
    """`detectron2.modeling.poolers.ROIPooler`."""

    def __init__(
        self,
        output_size: int,
        scales: list[float],
        sampling_ratio: int,
        pooler_type: str,
        canonical_box_size: int = 224,
        canonical_level: int = 4,
    ):
        super().__init__()
        assert pooler_type == "ROIAlignV2"
        self.output_size = (output_size, output_size)
        self.level_poolers = nn.ModuleList(RoIAlign(output_size, scale, sampling_ratio, aligned=True) for scale in scales)
        self.min_level, self.max_level = int(-math.log2(scales[0])), int(-math.log2(scales[-1]))
        self.canonical_box_size, self.canonical_level = canonical_box_size, canonical_level

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        rois = torch.cat([torch.cat([b.tensor.new_full((len(b), 1), i), b.tensor], dim=1) for i, b in enumerate(box_lists)])
        if len(self.level_poolers) == 1:
            return self.level_poolers[0](x[0], rois)
        sizes = torch.sqrt(torch.cat([boxes.area() for boxes in box_lists]))
        levels = torch.floor(self.canonical_level + torch.log2(sizes / self.canonical_box_size + 1e-8))
        levels = torch.clamp(levels, self.min_level, self.max_level).long() - self.min_level
        output = torch.zeros(len(rois), x[0].shape[1], *self.output_size, dtype=x[0].dtype, device=x[0].device)
        for level, pooler in enumerate(self.level_poolers):
            (index,) = torch.nonzero(levels == level, as_tuple=True)
            output.index_put_((index,), pooler(x[level], rois[index]))
        return output


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import detectron2` find it."""
    contents = {"detectron2": {}, "detectron2.modeling": {}}
    contents |= {"detectron2.modeling.poolers": {"ROIPooler": ROIPooler}, "detectron2.structures": {"Boxes": Boxes}}
    for name, content in contents.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
