"""Where pretrained VGG16 weights come from: torchvision by name, or a file."""

import os
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import get_model_weights


def load_vgg16(weights: str | Path, batch_norm: bool = False) -> dict[str, Tensor]:
    """State dict in float32, by the names of torchvision's VGG16 (`features.N.*` and, where there are any, `classifier.N.*`).

    Args:
        weights: a name of torchvision's (`IMAGENET1K_V1`; fetched once into the cache of `torch.hub`), or a file that holds such a state
            dict, float16 or float32.
        batch_norm: whether a name means `vgg16_bn`, whose layers are numbered differently.

    Raises:
        ValueError: neither a name nor a file, or a file that holds something else; the message names it.
    """
    weights = os.path.expanduser(str(weights))  # YAML reads a file name such as 2024 as a number
    names = get_model_weights("vgg16_bn" if batch_norm else "vgg16").__members__
    names = {name: entry for name, entry in names.items() if "FEATURES" not in name}  # made for pixels of another scale and mean
    if weights in names:
        state = names[weights].get_state_dict(progress=True, check_hash=True)
    elif Path(weights).is_file():
        state = read_state(weights)
    else:
        raise ValueError(f"weights={weights}: no such file, and no name of torchvision's VGG16 weights ({', '.join(names)})")
    if not isinstance(state, dict) or not any(str(key).startswith("features.") for key in state):
        raise ValueError(f"{weights} holds no weights of a VGG16: expected a state dict with keys like 'features.0.weight'")
    return {key: value.float() for key, value in state.items() if isinstance(value, Tensor)}


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a file that `torch.save` wrote, on the CPU and without running code in it.

    Raises:
        ValueError: it is damaged, or has more than tensors and plain containers inside.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises depends on where a file ends
        reason = f"truncated, damaged, or more than tensors inside ({type(error).__name__})"
        raise ValueError(f"{path} is not a readable file of weights: {reason}") from error
