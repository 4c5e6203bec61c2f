"""Training on feature maps that the frozen layers of a backbone compute once for each image, instead of in each step."""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchvision import tv_tensors
from torchvision.transforms import v2

from roi_quantization.detection.common.configuration import path_setting
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.data.coco import CocoDetection
from roi_quantization.detection.data.feature_cache import FeatureCache
from roi_quantization.detection.data.images import ImageRecord, read_image
from roi_quantization.detection.data.module import DetectionData
from roi_quantization.detection.model.fast_rcnn import FastRCNN, frozen_and_trained

Layers = Callable[[Tensor], Tensor]  # [N, 3, H, W] -> [N, C, h, w]
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class FrozenFeatures:
    """Lets the splits of a data module give feature maps, which are computed where the files in `cache_dir` do not have them.

    A map is the output of the layers before the first one that is trained. It is that of the image alone, padded with zeros to a multiple
    of the stride, so that strides which pad it to the same size share a map. In a batch of images of different sizes the backbone would
    see more padding at the right and lower border, and give slightly different values there.

    Args:
        cache_dir: folder of the files (see `FeatureCache`): about 2 MB for an image of 600 x 800 pixels at stride 16 with 512 channels.
        precision: of the computation, as Lightning's Trainer has it. The maps are stored in float16.
        run_layers: `layers -> (batch -> maps)`, what runs the frozen layers in the place of PyTorch, such as `ncnn_layers`. It has to give
            the same maps to the precision of float16: the files are shared.

    Raises:
        InputError: `run_layers` with another precision than float32.
    """

    def __init__(self, cache_dir: Path | str, precision: str = "32-true", run_layers: Callable[[nn.Module], Layers] | None = None):
        self.cache_dir = Path(path_setting(cache_dir, "features.cache_dir"))
        self.precision, self.run_layers = str(precision), run_layers
        if run_layers is not None and self.precision != "32-true":
            raise InputError(f"features.precision={precision}: features.run_layers computes in float32. Set features.precision=32-true")

    def attach(self, detector: FastRCNN, data: DetectionData) -> None:
        """Compute the maps of all splits that are set up, and let them return these.

        Raises:
            InputError: the first layers of the backbone are trained, a transform does more than resize and flip, or the detector resizes
                images itself. Nothing was computed.
        """
        if not isinstance(detector, FastRCNN):
            raise InputError(
                f"features=cached: a {type(detector).__name__} resizes images itself. Choose detector=fast_rcnn, or remove features"
            )
        frozen, _ = frozen_and_trained(detector.backbone)
        splits = {name: split for name in ("train", "val", "test") if (split := getattr(data, name)) is not None}
        steps = {name: resize_and_flips(split.transform, name) for name, split in splits.items()}
        before = detector.mean.device
        detector.to("cuda" if torch.cuda.is_available() else "cpu")
        for name, split in splits.items():
            self._attach(detector, frozen, split, *steps[name])
        detector.to(before)

    @torch.inference_mode()
    def _attach(self, detector: FastRCNN, frozen: nn.Module, split: CocoDetection, resize: nn.Module, flips: tuple[bool, ...]) -> None:
        device, stride = detector.mean.device, detector.backbone.stride
        dtype = AUTOCAST.get(self.precision)

        @cache
        def run() -> Layers:
            return frozen if self.run_layers is None else self.run_layers(frozen)

        def compute(image: ImageRecord, flipped: bool) -> Tensor:
            pixels = resize(read_image(image, has_boxes=True)).to(device)
            with torch.autocast(device.type, dtype) if dtype is not None else nullcontext():
                return run()(detector.batch([pixels.flip(-1) if flipped else pixels]))[0]

        side = max(2 * stride, 64)  # the same for strides 16 and 32, whose maps are shared
        sample = frozen(torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device))
        cells = sample.shape[-1] * stride // side  # along the side of a square of one stride

        def size(image: ImageRecord) -> tuple[int, int]:
            canvas = tv_tensors.BoundingBoxes(torch.zeros(1, 4), format="XYXY", canvas_size=(image.height, image.width))
            return tuple(-(-side // stride) * cells for side in resize(canvas).canvas_size)

        key = "\n".join([layers_key(frozen), str((detector.backbone.mean, detector.backbone.std)), repr(resize), self.precision])
        split.features = FeatureCache(self.cache_dir, key, sample[0])
        split.features.prepare(split.records, flips, size, compute)


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


def layers_key(layers: nn.Module) -> str:
    """Return the structure of these layers, with the code of traced ones, and a hash of their weights."""
    content = hashlib.sha256()
    code = "".join(layer.code for layer in layers.modules() if isinstance(layer, GraphModule))
    for name, value in sorted(layers.state_dict().items()):
        content.update(name.encode())
        content.update(value.detach().cpu().contiguous().numpy().tobytes())
    return f"{layers}\n{code}{content.hexdigest()}"
