"""Explain what RoI operators do with a box: `python explain.py box=[296,192,496,337] image_size=[512,512] stride=32 output_size=3`.

Prints every step and draws it. `image=` adds a real image and its features, `data=` averages over the proposals
of a data set. See `--help`.
"""

import roi_quantization  # noqa: F401 -- first, because it says so where the package is not installed

# isort: split
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from roi_quantization.detection.alignment.bin_figure import draw_bin, format_bin
from roi_quantization.detection.alignment.explanation import Explanation, format_steps, format_table
from roi_quantization.detection.alignment.explanation import explain as explain_operator
from roi_quantization.detection.alignment.explanation_figure import Photograph, draw_explanations
from roi_quantization.detection.alignment.misalignment import Operator, format_summary, is_supported, lattice_rule, summarize
from roi_quantization.detection.common.configuration import CONFIGS, check_groups, evaluated_split, path_setting
from roi_quantization.detection.common.errors import InputError, MissingFileError
from roi_quantization.detection.data.images import decode
from roi_quantization.detection.model.build import instantiate, read_operator
from roi_quantization.detection.model.fast_rcnn import FastRCNN
from roi_quantization.detection.model.vgg16 import VGG16
from roi_quantization.detection.runs.command_line import number_picture, replace_null_choices
from roi_quantization.detection.runs.errors import handle_errors


def explain(cfg: DictConfig) -> list[Explanation]:
    """Print and draw what each of `cfg.operators` does with `cfg.box`."""
    for knob in ("stride", "output_size"):
        if not (isinstance(cfg[knob], int) and cfg[knob] > 0):
            raise InputError(f"{knob}={cfg[knob]}: expected a whole number above 0")
    operators = load_operators(cfg.operators)
    image = None if cfg.image is None else read_image(path_setting(cfg.image, "image"))
    width, height = cfg.image_size if image is None else (image.shape[2], image.shape[1])
    found = [
        explain_operator(name, operator, cfg.box, (height, width), cfg.stride, cfg.output_size) for name, operator in operators.items()
    ]
    e, (x1, y1, x2, y2) = found[0], cfg.box
    pixels, cells = f"{x2 - x1:g} x {y2 - y1:g} pixels", f"{e.box[2] - e.box[0]:.2f} x {e.box[3] - e.box[1]:.2f} cells"
    print(f"The box ({x1:g}, {y1:g}) to ({x2:g}, {y2:g}) is {pixels} of an image {width} wide and {height} high.")
    print(f"At stride {e.stride} the map has {e.feature_map_size[1]} x {e.feature_map_size[0]} cells, and the box is {cells}.\n")
    if cfg.bin is not None:
        if not OmegaConf.is_list(cfg.bin) or len(cfg.bin) != 2:
            raise InputError(f"bin={cfg.bin}: expected [row,column], each from 0 to {cfg.output_size - 1}")
        row, column = cfg.bin
        sampling = [one for one in found if lattice_rule(one.operator) is not None] or found
        print("\n\n".join(format_bin(one, row, column) for one in sampling))
        draw_bin(sampling, row, column, cfg.picture)
        print(f"\nThe picture: {cfg.picture}")
        return found
    print("\n\n".join(format_steps(one) for one in found))
    print(f"\n{format_table(found)}")
    title = f"Sampled region of a box of {pixels} at stride {e.stride}: {cells}, {e.bins} x {e.bins} bins"
    draw_explanations(found, cfg.picture, title, None if image is None else photograph(image, found, cfg))
    print(f"\nThe picture: {cfg.picture}")
    return found


def explain_data(cfg: DictConfig) -> list[dict]:
    """Print the mean misalignment of a data set's proposals by stride and size. The split is test, or val where there is no test."""
    check_groups(cfg, ("proposals",))
    operators = load_operators(cfg.operators)
    data = instantiate(cfg.data)
    data.prepare_data()
    split = evaluated_split(cfg.data)
    data.setup("test" if split == "test" else "validate")
    dataset = getattr(data, split)
    items = (dataset[i] for i in tqdm(range(len(dataset)), desc="images"))
    rows = summarize(operators, ((target["proposals"], image.shape[-2:]) for image, target in items), output_size=cfg.output_size)
    print(f"Mean misalignment of the proposals of {len(dataset)} images ({split}), {cfg.output_size} x {cfg.output_size} bins\n")
    print(format_summary(rows))
    return rows


def load_operators(names: str | Sequence[str]) -> dict[str, Operator]:
    """Instantiate operators by their names in `configs/roi`.

    Raises:
        ValueError: no names, an unknown name, or an operator whose sampling is unknown.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise InputError("operators=[]: name at least one of configs/roi, such as operators=[pool,align]")
    try:
        operators = {name: instantiate(read_operator(name)) for name in names}
    except ValueError as error:
        raise InputError(f"operators={names}: {error}") from error
    for name, operator in operators.items():
        if not is_supported(operator):
            raise InputError(f"operators={names}: where {name} samples is not known. Name only operators of configs/roi.")
    return operators


def read_image(path: str) -> Tensor:
    """Read a picture as uint8 RGB `[3, H, W]`."""
    if not Path(path).is_file():
        raise MissingFileError(f"image={path}: no such file")
    try:
        return decode(path)
    except ValueError as error:
        raise InputError(f"image={path} does not decode: {error}") from error


@torch.no_grad()
def photograph(image: Tensor, explanations: list[Explanation], cfg: DictConfig) -> Photograph:
    """Compute the image's VGG16 features, normalised and padded as in the detector, and each operator's output on them."""
    torch.manual_seed(cfg.seed)
    detector = FastRCNN(VGG16(cfg.stride, weights=cfg.weights), roi_heads=None).eval()
    if cfg.weights is None:
        print("The VGG16 has random weights. Choose weights=IMAGENET1K_V1 or a file for trained ones.\n")
    features = detector.backbone(detector.batch([image]))
    boxes = [torch.tensor([list(cfg.box)], dtype=torch.float32)]
    pooled = [e.operator(features, boxes, e.bins, 1 / e.stride)[0].mean(0) for e in explanations]
    return Photograph(image, features[0].mean(0), pooled)


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="explain")
def _main(cfg: DictConfig) -> None:
    with handle_errors("explain.py"):
        number_picture(cfg)
        explain(cfg) if cfg.get("data") is None else explain_data(cfg)


def main() -> None:
    """Compose the configuration from the command line, and run."""
    sys.argv[1:] = replace_null_choices(sys.argv[1:])
    _main()


if __name__ == "__main__":
    main()
