"""The convolutions of VGG16, at stride 16 or 32."""

from pathlib import Path
from typing import Literal

from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from roi_quantization.detection.common.configuration import path_setting
from roi_quantization.detection.common.errors import InputError
from roi_quantization.roi_heads.weights import load_vgg16


class VGG16(nn.Module):
    """`[N, 3, H, W]`, normalised RGB -> `[N, 512 * width, H // stride, W // stride]`.

    The layers and their names are torchvision's `vgg16().features`.

    Args:
        stride: 16 omits pool5, as Fast R-CNN does; 32 keeps it.
        width: factor of all numbers of channels; 1 is VGG16.
        norm: "batch" puts batch norm after each convolution, as `vgg16_bn` has it.
        weights: see `load_vgg16`; None initialises randomly (Kaiming, as torchvision's VGG does).
        frozen_blocks: number of the five blocks of convolutions, from the image on, that are not trained: no gradients, and batch norm in
            evaluation mode. Fast R-CNN freezes 2 (conv1 and conv2).

    Raises:
        InputError: another stride or norm; weights whose names or shapes do not fit.
    """

    mean = (0.485, 0.456, 0.406)
    """of RGB in [0, 1]: what torchvision's weights were trained with."""
    std = (0.229, 0.224, 0.225)

    def __init__(
        self,
        stride: Literal[16, 32] = 16,
        width: float = 1.0,
        norm: Literal["none", "batch"] = "none",
        weights: str | Path | None = None,
        frozen_blocks: int = 0,
    ):
        super().__init__()
        if stride not in (16, 32):
            raise InputError(f"stride={stride}: expected 16 (without pool5) or 32 (with pool5)")
        if not width > 0:
            raise InputError(f"width={width}: expected a number above 0, 1 for VGG16's own number of channels")
        if norm not in ("none", "batch"):
            raise InputError(f"norm={norm}: expected 'none' or 'batch'")
        if not 0 <= frozen_blocks <= 5:
            raise InputError(f"frozen_blocks={frozen_blocks}: VGG16 has five blocks of convolutions, expected 0 to 5")
        channels = [layer if layer == "M" else max(1, round(layer * width)) for layer in cfgs["D"]]
        self.features = make_layers(channels if stride == 32 else channels[:-1], batch_norm=norm == "batch")
        self.stride = stride
        self.out_channels = channels[-2]
        self.frozen_blocks = frozen_blocks
        if weights is None:
            self._initialise()
        else:
            self._load(load_vgg16(path_setting(weights, "backbone.weights"), batch_norm=norm == "batch"), weights)
        for block in self._frozen():
            block.requires_grad_(False).eval()  # here as well: Lightning keeps the mode of modules

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)

    def split(self) -> tuple[nn.Sequential, nn.Sequential]:
        """Return the layers before the first one that is trained, and the others. They share their weights with this backbone.

        Where none is trained, the others are pool5: strides 16 and 32 have the same maps before it. `requires_grad` is not asked: in a copy
        with averaged weights no weight is trained, and its maps are those of this backbone.
        """
        trained = (i for i in range(len(self._frozen()), len(self.features)) if list(self.features[i].parameters()))
        first = next(trained, len(self.features) - isinstance(self.features[-1], nn.MaxPool2d))
        return self.features[:first], self.features[first:]

    def train(self, mode: bool = True) -> "VGG16":
        super().train(mode)
        for block in self._frozen():
            block.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        pools = [i for i, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d)]
        ends = [*pools, len(self.features)]  # at stride 16 the fifth block has no pool
        return list(self.features[: ends[self.frozen_blocks - 1]]) if self.frozen_blocks else []

    def _initialise(self) -> None:
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def _load(self, state: dict[str, Tensor], source: str | Path) -> None:
        found = {key: value for key, value in state.items() if key.startswith("features.")}
        wanted = self.state_dict()
        for key, value in wanted.items():
            if key not in found and not key.endswith("num_batches_tracked"):
                raise InputError(f"{source} lacks {key}. Expected torchvision's names of VGG16 (vgg16_bn with norm=batch)")
            if key in found and found[key].shape != value.shape:
                shapes = f"{list(found[key].shape)}, the backbone has {list(value.shape)}"
                raise InputError(f"{source}: {key} has shape {shapes}; VGG16's own fit width=1")
        if foreign := sorted(found.keys() - wanted.keys()):
            raise InputError(
                f"{source} has {foreign[0]} and {len(foreign) - 1} more that this VGG16 does not have. vgg16_bn needs norm=batch"
            )
        self.load_state_dict(wanted | found)
