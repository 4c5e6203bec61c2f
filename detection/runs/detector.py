"""A trained detector as an object that is called on pictures."""

import hashlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.export import ExportedProgram
from torchvision.transforms.v2.functional import to_pil_image

from roi_quantization.detection.common.config_sources import name_config_folder, name_folders_of_overrides
from roi_quantization.detection.common.configuration import path_setting
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.data.image_folder import ImageFolder
from roi_quantization.detection.data.images import ImageRecord, read_image
from roi_quantization.detection.data.pictures import is_batch, is_file, to_image
from roi_quantization.detection.data.proposals.file import ProposalFile
from roi_quantization.detection.data.proposals.grid import Grid
from roi_quantization.detection.data.proposals.provider import NoProposals, ProposalProvider
from roi_quantization.detection.model.build import build_detector, instantiate
from roi_quantization.detection.model.export import export_onnx, export_program
from roi_quantization.detection.runs.checkpoint import load_checkpoint, load_weights
from roi_quantization.detection.runs.composition import compose_with_parts

Found = dict[str, Any]

USED = ("detector", "roi", "head", "backbone", "proposals", "data.eval_transform", "channels_last", "model")  # what a `Detector` reads
INSTEAD = {
    "score_threshold": "Set head.score_threshold, for detector=torchvision +detector.options.box_score_thresh",
    "trainer": "Give load(..., device=...)",
    "threads": "Call torch.set_num_threads",
    "data": "Of the data it uses the checkpoint's data.eval_transform; set that by name, such as data.eval_transform.short_side=600",
    "ckpt": "The checkpoint is the first argument",
    "image": "Pictures are given to the detector: load(ckpt)(image)",
}


def load(
    ckpt: str | Path,
    overrides: Sequence[str] = (),
    *,
    device: str | torch.device | None = None,
    config_dir: str | Path | None = None,
) -> "Detector":
    """Load a checkpoint of train.py, to detect objects in pictures.

    ```python
    detector = roi_quantization.load("runs/<run>/best.ckpt")
    found = detector("dog.jpg")            # {"boxes": ..., "scores": ..., "labels": ..., "names": ["dog"], ...}
    ```

    Args:
        ckpt: the checkpoint.
        overrides: of what `USED` names in predict.py's configuration, such as "roi=pool", "proposals=selective_search" or
            "head.score_threshold=0.5".
        device: where the detector runs; None: on a GPU where there is one.
        config_dir: a folder of your own configurations. Naming it permits the checkpoint to call its `_target_`s.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is not an intact checkpoint, does not fit the overrides, or would call what is not allowed; or an override would
            do nothing here.
    """
    if config_dir is not None:
        name_config_folder(config_dir)
    name_folders_of_overrides(overrides)
    cfg = compose_with_parts("predict", overrides, ckpt)
    check_overrides(cfg, overrides)
    return Detector(cfg, device)


def check_overrides(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Check that a `Detector` uses each override: it is of `USED`, or those refer to it (`${...}`).

    Args:
        cfg: composed with the overrides.
        overrides: as on the command line.

    Raises:
        InputError: one would do nothing, as predict.py alone uses it; the message says what to use instead.
    """
    plain, read = OmegaConf.to_container(cfg), list(USED)
    for key in read:  # grows: what is read may refer to more
        node = plain
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        read += [name for name in re.findall(r"\$\{(?:oc\.select:)?([\w.]+)", str(node)) if name not in read]
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if key != "hydra.searchpath" and not any(key == name or key.startswith(f"{name}.") for name in read):
            remedy = INSTEAD.get(key.partition(".")[0], f"It uses {', '.join(USED)}")
            raise InputError(f"{override.input_line}: load does not use {key}. {remedy}")


class Detector:
    """A trained detector with its preprocessing and its proposals.

    Attributes:
        model: the network, `FastRCNN` or a detector of torchvision, in evaluation mode.
        categories: `{"id", "name"}` of each class; label `i` is entry `i - 1`.
        names: label -> name.
        transform: what an image goes through before the network.
        proposals: provider of the proposals, unless they are given.

    Args:
        cfg: of predict.py, with `ckpt`.
        device: where the network runs; None: on a GPU where there is one.
    """

    def __init__(self, cfg: DictConfig, device: str | torch.device | None = None):
        checkpoint = load_checkpoint(path_setting(cfg.ckpt, "ckpt"))
        self.categories: list[dict] = checkpoint["categories"]
        self.names = {label: category["name"] for label, category in enumerate(self.categories, 1)}
        model = build_detector(cfg, num_classes=len(self.categories) + 1, pretrained=False)
        load_weights(model, checkpoint)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()
        self.transform = instantiate(cfg.data.eval_transform)
        proposals = instantiate(cfg.proposals)
        proposals = NoProposals() if proposals is None else proposals
        self.proposals: ProposalProvider = proposals["test"] if isinstance(proposals, Mapping) else proposals

    def __call__(self, pictures: Any, proposals: Any = None) -> Found | list[Found]:
        """Detect objects in one picture, or in several.

        Args:
            pictures: a path, a PIL image, an array `[H, W, C]` or a tensor `[C, H, W]`, see `to_image`; or a list of such, or an array or
                tensor of four dimensions.
            proposals: the candidate windows, `[L, 4]` `(x1, y1, x2, y2)` in pixels of the picture, one such for each of several pictures.
                None: the provider of the checkpoint computes them.

        Returns:
            For each picture a dict of `boxes` `[D, 4]` in pixels of the picture given, `scores` `[D]`, highest first, `labels` `[D]`
            from 1, the `names` of the classes, a list, `proposals` `[D, 4]`, from which the boxes were regressed, where the detector
            names them, and `masks`, bool `[D, H, W]`, where it has them. Tensors on the CPU. Boxes of a file are in pixels of the
            upright picture. A list where several pictures were given.

        Raises:
            TypeError, InputError, MissingFileError: a picture or proposals that cannot be used.
        """
        several = is_batch(pictures)
        pictures = list(pictures) if several else [pictures]
        if proposals is not None:
            if isinstance(self.proposals, NoProposals):
                raise InputError("proposals: this detector finds its own, and would not use them. Leave them out")
            proposals = list(proposals) if several else [proposals]
            if len(proposals) != len(pictures):
                raise InputError(f"proposals: expected windows for each of {len(pictures)} pictures, got {len(proposals)}")
        with ExitStack() as stack:
            names = [f"picture {index}" if several else "picture" for index in range(len(pictures))]
            images = [to_image(picture, name) for picture, name in zip(pictures, names, strict=True)]
            records = [
                ImageRecord(number, Path(picture) if is_file(picture) else Path(name), image.shape[2], image.shape[1])
                for number, (picture, image, name) in enumerate(zip(pictures, images, names, strict=True), start=1)
            ]
            if proposals is not None:
                windows = {
                    record.id: to_windows(given, record, name) for record, given, name in zip(records, proposals, names, strict=True)
                }
                provider: ProposalProvider = GivenProposals(windows)
            else:
                provider = self.provider()
                if not isinstance(provider, Grid | NoProposals):  # others read the file of a picture
                    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                    records = [
                        record if is_file(picture) else in_file(record, image, folder)
                        for record, picture, image in zip(records, pictures, images, strict=True)
                    ]
            kept = dict(zip((record.id for record in records), images, strict=True))
            dataset = self.dataset(records, provider, read=lambda record: kept[record.id])
            found = [self._detect(*dataset[index]) for index in range(len(dataset))]
        return found if several else found[0]

    def provider(self) -> ProposalProvider:
        """Return the provider of proposals.

        Raises:
            InputError: it reads a file, which has no windows for new pictures.
        """
        if isinstance(self.proposals, ProposalFile):
            raise InputError(
                "proposals=file: it has no windows for these pictures. Choose proposals=selective_search or proposals=grid_photos, or in "
                "Python give detector(pictures, proposals=[...])"
            )
        return self.proposals

    def dataset(self, records: Sequence[ImageRecord], proposals: ProposalProvider | None = None, read: Any = read_image) -> ImageFolder:
        """Return what the network takes of each of these images."""
        return ImageFolder(records, self.provider() if proposals is None else proposals, self.transform, read)

    def export_onnx(self, path: str | Path) -> None:
        """Write the network to an ONNX file, see `roi_quantization.detection.model.export.export_onnx`."""
        export_onnx(self.model, path)

    def export_program(self) -> ExportedProgram:
        """Export the network with `torch.export`, see `roi_quantization.detection.model.export.export_program`."""
        return export_program(self.model)

    @torch.no_grad()
    def _detect(self, image: Tensor, target: dict) -> Found:
        target = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in target.items()}
        ((detection,), _) = self.model([image.to(self.device)], [target])
        detection = {name: value.float().cpu() if value.is_floating_point() else value.cpu() for name, value in detection.items()}
        return detection | {"names": [self.names[label] for label in detection["labels"].tolist()]}


class GivenProposals:
    """Proposals by the id of the image."""

    def __init__(self, windows: Mapping[int, Tensor]):
        self.windows = windows

    def prepare(self, images: Sequence[ImageRecord]) -> None:
        """Do nothing."""

    def __call__(self, image: ImageRecord) -> Tensor:
        return self.windows[image.id]


def to_windows(given: Any, image: ImageRecord, name: str) -> Tensor:
    """Return proposals as float32 `[L, 4]`, cut to their picture where they reach out of it by a pixel at most.

    Raises:
        InputError: another shape, or a window that is not inside the picture.
    """
    try:
        windows = torch.as_tensor(given, dtype=torch.float32, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}: the proposals are not numbers [L, 4]: {error}") from error
    if windows.ndim != 2 or windows.shape[1] != 4:
        raise InputError(f"{name}: the proposals have shape {tuple(windows.shape)}, expected [L, 4]: (x1, y1, x2, y2) in pixels")
    size = windows.new_tensor([image.width, image.height]).repeat(2)
    cut = windows.clamp(min=0).minimum(size)
    fits = windows.isfinite().all(1) & ((windows - cut).abs() <= 1).all(1) & (cut[:, 2:] > cut[:, :2]).all(1)
    if not fits.all():
        first = int((~fits).nonzero()[0])
        box = [round(value, 3) for value in windows[first].tolist()]
        raise InputError(
            f"{name}: proposal {first} is {box}, and the picture is {image.width} wide and {image.height} high. Expected "
            "(x1, y1, x2, y2) in its pixels with x1 < x2 and y1 < y2"
        )
    if len(windows) and windows.max() <= 1 and min(image.width, image.height) > 1:
        raise InputError(
            f"{name}: no proposal is larger than a pixel. Expected coordinates in pixels; multiply shares by the picture's size"
        )
    return cut


def in_file(image: ImageRecord, pixels: Tensor, folder: Path) -> ImageRecord:
    """Write a picture to a file that is named by its pixels, so that a cache of proposals finds it again."""
    path = folder / f"{hashlib.sha256(pixels.numpy().tobytes()).hexdigest()}.bmp"
    if not path.is_file():
        to_pil_image(pixels).save(path)
    return ImageRecord(image.id, path, image.width, image.height)
