"""Checkpoints of train.py: what is inside, and whether it fits."""

import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from torch import Tensor, nn

from roi_quantization.detection.runs.config_security import check_targets_allowed

PARTS = ("roi", "backbone", "head", "data", "proposals")


def load_checkpoint(path: str | Path) -> dict:
    """Everything in a checkpoint, on the CPU; files with more than tensors and plain containers are refused.

    Raises:
        FileNotFoundError: there is none.
        ValueError: truncated, damaged, or no checkpoint of train.py.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; train.py leaves best.ckpt and last.ckpt in its run folder")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()  # torch.load looks at no checksum
            if damaged:
                raise ValueError(f"{damaged} does not fit its checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is no whole checkpoint, or holds more than tensors and plain containers: none of that was run") from error
    except Exception as error:  # what torch.load raises depends on where a file ends
        raise ValueError(f"{path} is no whole checkpoint: it is truncated, damaged or something else ({type(error).__name__})") from error
    missing = [key for key in ("state_dict", "config", "categories") if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise ValueError(f"{path} was not written by train.py: it has no {', '.join(missing)}")
    for key, fits in (("state_dict", _is_state), ("config", lambda value: isinstance(value, dict)), ("categories", _are_categories)):
        if not fits(checkpoint[key]):
            raise ValueError(f"{path} was not written by train.py: its {key} is something else")
    return checkpoint


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())


def _are_categories(value: Any) -> bool:
    def is_category(entry: Any) -> bool:
        return isinstance(entry, dict) and isinstance(entry.get("id"), int) and isinstance(entry.get("name"), str)

    return isinstance(value, list) and all(map(is_category, value))


def register_checkpoint(arguments: list[str], script: str) -> None:
    """Offers the parts of the checkpoint on the command line to Hydra, which composes after this; ends the program where there is none."""
    path = next((argument.removeprefix("ckpt=") for argument in arguments if argument.startswith("ckpt=")), None)
    if path is not None:
        try:
            register_parts(load_checkpoint(path)["config"], path)
        except (FileNotFoundError, ValueError) as error:
            sys.exit(f"{script}: {error}")
    elif not {"-h", "--help", "--hydra-help", "--version"} & set(arguments):
        sys.exit(f"{script}: which checkpoint? Say it with ckpt=<run>/best.ckpt; `python {script} --help` shows what else can be said")


def register_parts(config: dict, source: str | Path) -> None:
    """Lets Hydra choose the parts of a checkpoint's configuration: the option `checkpoint` of each group in `PARTS`.

    Raises:
        ValueError: a part is missing, or what it would call is not this project's (`check_targets_allowed`).
    """
    for part in PARTS:
        if not isinstance(config.get(part), dict):
            raise ValueError(f"{source} was not written by train.py: its configuration has no {part}")
    check_targets_allowed({part: config[part] for part in PARTS}, source)
    for part in PARTS:
        ConfigStore.instance().store(group=part, name="checkpoint", node=config[part])


def check_categories(checkpoint: dict, categories: list[dict]) -> None:
    """Raises ValueError where a checkpoint was trained on other classes, or on the same in another order."""
    trained = [category["name"] for category in checkpoint["categories"]]
    present = [category["name"] for category in categories]
    if trained != present:
        raise ValueError(
            f"the checkpoint was trained on {len(trained)} classes ({_some(trained)}), the data has {len(present)} ({_some(present)}): "
            "its scores mean nothing there. Evaluate it on data with its own classes, in the order of their category ids"
        )


def load_weights(detector: nn.Module, checkpoint: dict) -> None:
    """Puts a checkpoint's weights into a detector; the averaged ones where there are any.

    Raises:
        ValueError: a weight is missing, left over or of another shape; the message names the first and says what usually differs.
    """
    weights = checkpoint["state_dict"]
    prefix = "averaged.module." if any(key.startswith("averaged.") for key in weights) else "detector."
    found = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    wanted = detector.state_dict()
    problems = [f"{key} is not in the checkpoint" for key in wanted.keys() - found.keys()]
    problems += [f"{key} of the checkpoint has no place in the detector" for key in found.keys() - wanted.keys()]
    problems += [
        f"{key} has shape {list(found[key].shape)} in the checkpoint, {list(wanted[key].shape)} in the detector"
        for key in wanted.keys() & found.keys()
        if wanted[key].shape != found[key].shape
    ]
    if problems:
        raise ValueError(
            f"the checkpoint does not fit the detector, {len(problems)} of its weights differ: {sorted(problems)[0]}. Was backbone, "
            "head.extractor.output_size or head.box_head.hidden changed?"
        )
    detector.load_state_dict(found)


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
