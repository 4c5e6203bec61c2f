"""The classification networks of torchvision as backbones."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model_builder, get_model_weights, list_models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops import FrozenBatchNorm2d

from roi_quantization.detection.common.configuration import path_setting
from roi_quantization.detection.common.errors import InputError
from roi_quantization.roi_heads.weights import read_state

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of RGB in [0, 1]


class TorchvisionBackbone(nn.Module):
    """`[N, 3, H, W]`, normalised RGB -> `[N, C, H // stride, W // stride]`: a classification network up to one of its layers.

    The names of its weights are torchvision's.

    Args:
        name: of the network, such as "resnet50".
        layer: whose output is the feature map, such as "layer3".
        stride: pixels per cell of the map. It is compared with that of a map that is computed.
        weights: a name of torchvision's, or a file of the network's state dict; None initialises randomly, as torchvision does.
        frozen: layers that are not trained, such as `["conv1", "bn1", "layer1"]`: no gradients, and batch norm in evaluation mode.
        frozen_norm: replace all batch norms by frozen ones, which keep the statistics and weights that they have.

    Raises:
        InputError: another network, layer, stride or weights than there are; the message names it.
    """

    def __init__(
        self,
        name: str,
        layer: str,
        stride: int,
        weights: str | Path | None = None,
        frozen: Sequence[str] = (),
        frozen_norm: bool = True,
    ):
        super().__init__()
        networks = list_models(module=torchvision.models)
        if name not in networks:
            raise InputError(f"backbone.name={name}: torchvision has no such classification network. It has {', '.join(networks)}")
        network = get_model_builder(name)(weights=None)
        if hasattr(network, "transform_input"):  # GoogLeNet's and Inception's builders set it where they load weights
            network.transform_input = True
        self.name = name
        self.normalize_as(weights)
        if weights is not None:
            _load(network, name, weights)
        if frozen_norm:
            freeze_norm(network)
        self.body = _extract(network, name, layer)
        self.out_channels, found = _measure(self.body, f"{layer} of {name}")
        if stride != found:
            raise InputError(f"backbone.stride={stride}: the stride of {layer} of {name} is {found}. Set backbone.stride={found}")
        self.stride = stride
        layers = dict(self.body.named_modules())
        for part in frozen:
            if part not in layers:
                names = [key for key, _ in self.body.named_children()]
                raise InputError(f"backbone.frozen: {name} has no layer {part} up to {layer}. It has {', '.join(names)}")
        self.frozen = tuple(frozen)
        for part in self._frozen():
            part.requires_grad_(False).eval()  # here as well: Lightning keeps the mode of modules

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)["map"]

    def train(self, mode: bool = True) -> "TorchvisionBackbone":
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    def normalize_as(self, weights: str | Path | None) -> None:
        """Expect pixels with the mean and standard deviation that these weights were trained with, without loading them.

        Those of a file are what all of torchvision's weights of this network have, and ImageNet's where these differ.
        """
        presets = {name: entry.transforms() for name, entry in get_model_weights(self.name).__members__.items()}
        known = {name: (tuple(preset.mean), tuple(preset.std)) for name, preset in presets.items()}
        imagenet = IMAGENET["mean"], IMAGENET["std"]
        (of_files, *others) = set(known.values()) or {imagenet}
        of_files = imagenet if others else of_files
        self.mean, self.std = imagenet if weights is None else known.get(str(weights), of_files)

    def _frozen(self) -> list[nn.Module]:
        return [self.body.get_submodule(part) for part in self.frozen]


def freeze_norm(module: nn.Module) -> None:
    """Replace the batch norms in a module by frozen ones with the same statistics and weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict({key: value for key, value in child.state_dict().items() if key != "num_batches_tracked"})
            setattr(module, name, frozen)
        else:
            freeze_norm(child)


def _load(network: nn.Module, name: str, weights: str | Path) -> None:
    entries = get_model_weights(name).__members__
    if str(weights) in entries:
        network.load_state_dict(entries[str(weights)].get_state_dict(progress=True, check_hash=True))
        return
    path = path_setting(weights, "backbone.weights")
    if not Path(path).is_file():
        raise InputError(f"backbone.weights={path}: no such file, and no name of torchvision's weights of {name} ({', '.join(entries)})")
    try:
        network.load_state_dict(read_state(path))
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"backbone.weights={path}: not the state dict of torchvision's {name}: {reason}") from error


def _extract(network: nn.Module, name: str, layer: str) -> nn.Module:
    """Return the network up to a layer."""
    try:
        return create_feature_extractor(network, {layer: "map"})
    except ValueError as error:
        _, nodes = get_graph_node_names(network)
        layers = list(dict.fromkeys(node.partition(".")[0] for node in nodes))
        raise InputError(f"backbone.layer={layer}: {name} has no such layer. It has {', '.join(layers)}, and layers in these") from error


@torch.no_grad()
def _measure(body: nn.Module, what: str) -> tuple[int, int]:
    """Return channels and stride of the map that a network makes."""
    side = 256
    was_training = body.training
    shape = body.eval()(torch.zeros(1, 3, side, side))["map"].shape
    body.train(was_training)
    if len(shape) != 4 or shape[2] != shape[3] or side % shape[2]:
        raise InputError(
            f"backbone.layer: {what} makes {list(shape)} of an image of {side} x {side} pixels, which is no map of whole strides"
        )
    return shape[1], side // shape[2]
