"""Training on feature maps that a frozen backbone computes once for each image, instead of in each step."""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.data.coco import CocoDetection
from roi_quantization.detection.data.feature_cache import FeatureCache
from roi_quantization.detection.data.images import ImageRecord, read_image
from roi_quantization.detection.data.module import DetectionData
from roi_quantization.detection.model.fast_rcnn import FastRCNN

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class FrozenFeatures:
    """Lets the splits of a data module give feature maps, which are computed where the files in `cache_dir` do not have them.

    The map of an image is that of the image alone, padded with zeros to a multiple of the stride. In a batch of images of different sizes
    the backbone would see more padding at the right and lower border, and give slightly different values there.

    Args:
        cache_dir: folder of the files (see `FeatureCache`): about 2 MB for an image of 600 x 800 pixels at stride 16 with 512 channels.
        precision: of the computation, as Lightning's Trainer has it. The maps are stored in float16.
    """

    def __init__(self, cache_dir: Path | str, precision: str = "32-true"):
        self.cache_dir, self.precision = Path(cache_dir), str(precision)

    def attach(self, detector: FastRCNN, data: DetectionData) -> None:
        """Compute the maps of all splits that are set up, and let them return these.

        Raises:
            InputError: the backbone is trained, or a transform does more than to resize and to flip. Nothing was computed.
        """
        check_frozen(detector.backbone)
        splits = {name: split for name in ("train", "val", "test") if (split := getattr(data, name)) is not None}
        steps = {name: resize_and_flips(split.transform, name) for name, split in splits.items()}
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        training, before = detector.training, detector.mean.device
        detector.to(device).eval()
        for name, split in splits.items():
            self._attach(detector, split, *steps[name])
        detector.to(before).train(training)

    def _attach(self, detector: FastRCNN, split: CocoDetection, resize: nn.Module, flips: tuple[bool, ...]) -> None:
        stride = detector.backbone.stride

        def size(image: ImageRecord) -> tuple[int, int]:
            canvas = tv_tensors.BoundingBoxes(torch.zeros(1, 4), format="XYXY", canvas_size=(image.height, image.width))
            return tuple(-(-side // stride) for side in resize(canvas).canvas_size)

        key = "\n".join([backbone_key(detector.backbone), repr(resize), self.precision])
        split.features = FeatureCache(self.cache_dir, key, detector.backbone.out_channels)
        split.features.prepare(split.records, flips, size, self._compute(detector, resize))

    def _compute(self, detector: FastRCNN, resize: nn.Module) -> Callable[[ImageRecord, bool], Tensor]:
        device = detector.mean.device
        dtype = AUTOCAST.get(self.precision)

        @torch.inference_mode()
        def compute(image: ImageRecord, flipped: bool) -> Tensor:
            pixels = resize(read_image(image, has_boxes=True)).to(device)
            with torch.autocast(device.type, dtype) if dtype is not None else nullcontext():
                return detector.backbone(detector.batch([pixels.flip(-1) if flipped else pixels]))[0]

        return compute


def check_frozen(backbone: nn.Module) -> None:
    """Check that training does not change what a backbone computes.

    Raises:
        InputError: a parameter is trained, or a batch norm or dropout is in training mode.
    """
    trained = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    if trained:
        raise InputError(
            f"features=cached: the backbone is trained ({trained[0]} and {len(trained) - 1} more), so its maps change. Freeze it with "
            "backbone.frozen_blocks=5, or remove features"
        )
    changing = [
        name for name, part in backbone.named_modules() if part.training and isinstance(part, (nn.modules.batchnorm._BatchNorm, nn.Dropout))
    ]
    if changing:
        raise InputError(f"features=cached: {changing[0]} of the backbone is in training mode, so its maps change. Freeze it as well")


def resize_and_flips(transform: Callable | None, split: str) -> tuple[nn.Module, tuple[bool, ...]]:
    """Take a split's transform apart.

    Returns:
        The resizing, and which flips occur: `(False,)` or `(False, True)`.

    Raises:
        InputError: it does something else, such as to change colours.
    """
    steps = list(transform.transforms) if isinstance(transform, v2.Compose) else [] if transform is None else [transform]
    flips = [step for step in steps if isinstance(step, v2.RandomHorizontalFlip)]
    resizes = [step for step in steps if isinstance(step, v2.Resize)]
    others = [step for step in steps if step not in flips and step not in resizes]
    if others or len(flips) > 1:
        what = type((others or flips)[0]).__name__
        raise InputError(
            f"features=cached: the transform of {split} has {what}, of which there would be more maps than can be computed. Keep one size "
            "(short_side a number) and at most a flip, or remove features"
        )
    return v2.Compose(resizes) if resizes else nn.Identity(), (False, True) if flips and flips[0].p > 0 else (False,)


def backbone_key(backbone: nn.Module) -> str:
    """Return what a backbone's maps depend on: its structure, its stride, its normalisation, and a hash of its weights."""
    content = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        content.update(name.encode())
        content.update(value.detach().cpu().contiguous().numpy().tobytes())
    return "\n".join([str(backbone), str(backbone.stride), str((backbone.mean, backbone.std)), content.hexdigest()])
