"""Reading the checkpoints of train.py: their content, their configuration as options of Hydra, their weights."""

import logging
import pickle
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn

from roi_quantization.detection.common.config_security import check_targets_allowed
from roi_quantization.detection.common.config_sources import check_choices, name_folders_of_command, override_values
from roi_quantization.detection.common.configuration import FAST_RCNN, path_setting
from roi_quantization.detection.common.errors import ExpectedError, InputError, MissingFileError
from roi_quantization.detection.common.renamed_targets import rename_targets

log = logging.getLogger(__name__)

OPTIONAL_PARTS = ("backbone", "head", "proposals")  # null where the detector has its own
PARTS = ("detector", "roi", "data", *OPTIONAL_PARTS)


def load_checkpoint(path: str | Path) -> dict:
    """Load a checkpoint on the CPU. A file with anything but tensors and plain containers is refused.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is truncated, damaged, or not a checkpoint of train.py.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"there is no checkpoint {path}. train.py writes best.ckpt and last.ckpt into its run folder")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()  # torch.load compares no checksums
            if damaged:
                raise ValueError(f"{damaged} does not fit its checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is not an intact checkpoint, or contains more than tensors and plain containers. It was not run"
        ) from error
    except Exception as error:  # what torch.load raises depends on where a file ends
        raise InputError(
            f"{path} is not an intact checkpoint: it is truncated, damaged or another file ({type(error).__name__})"
        ) from error
    missing = [key for key in ("state_dict", "config", "categories") if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise InputError(f"{path} was not written by train.py: it has no {', '.join(missing)}")
    for key, is_valid in (("state_dict", _is_state), ("config", lambda value: isinstance(value, dict)), ("categories", _are_categories)):
        if not is_valid(checkpoint[key]):
            raise InputError(f"{path} was not written by train.py: its {key} has another type")
    return checkpoint


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())


def _are_categories(value: Any) -> bool:
    def is_category(entry: Any) -> bool:
        return isinstance(entry, dict) and isinstance(entry.get("id"), int) and isinstance(entry.get("name"), str)

    return isinstance(value, list) and all(map(is_category, value))


def register_checkpoint(arguments: list[str], script: str, is_optional: bool = False) -> None:
    """Register the parts of the checkpoint on the command line as options of Hydra, which composes afterwards.

    In a sweep over `ckpt` they are those of the first one (see `compose_with_checkpoint`). Ends the program where there is none, unless it
    `is_optional` and a detector is chosen, which may have weights of its own; and where a part is chosen that is not there.
    """
    options = get_args_parser().parse_args(arguments)
    try:
        name_folders_of_command(arguments)
        paths = checkpoint_paths(options.overrides)
        if paths:
            register_parts(load_checkpoint(paths[0])["config"], paths[0])
        elif not (options.help or options.hydra_help or (is_optional and chooses_detector(options.overrides))):
            raise InputError(f"no checkpoint is given. Set ckpt=<run>/best.ckpt; `python {script} --help` lists the other settings")
        check_choices(options.overrides, PARTS)
    except ExpectedError as error:
        sys.exit(f"{script}: {error}")


def chooses_detector(overrides: Iterable[str]) -> bool:
    """Whether Hydra's overrides choose a detector."""
    return any(text.lstrip("+").startswith("detector=") for text in overrides)


def checkpoint_paths(overrides: Iterable[str]) -> list[str]:
    """Parse the values of `ckpt` among Hydra's overrides, as Hydra does; several in a sweep."""
    given = [text for text in overrides if text.lstrip("+").startswith("ckpt=")]
    if not given:
        return []
    try:
        values = [OmegaConf.create({"ckpt": value}).ckpt for value in override_values(given[-1])]
    except HydraException as error:
        path = given[-1].partition("=")[2]
        raise InputError(f"{given[-1]} is not valid in Hydra's grammar ({error}). Quote the path: 'ckpt=\"{path}\"'") from error
    return [path_setting(value, "ckpt") for value in values if value is not None]


def register_parts(config: dict, source: str | Path) -> None:
    """Register the parts of a checkpoint's configuration as the option `checkpoint` of Hydra's groups in `PARTS`.

    Raises:
        InputError: a part is missing, or it would call what is not allowed (`check_targets_allowed`).
    """
    config = {"detector": FAST_RCNN} | config
    for part in PARTS:
        if not isinstance(config.get(part), dict) and not (part in OPTIONAL_PARTS and config.get(part, "") is None):
            raise InputError(f"{source} was not written by train.py: its configuration has no {part}")
    parts = {part: config[part] for part in PARTS if config[part] is not None}
    check_targets_allowed(parts, source)
    forget_parts()
    for part, node in rename_targets(parts).items():
        ConfigStore.instance().store(group=part, name="checkpoint", node=node)


def forget_parts() -> None:
    """Remove the parts of the last checkpoint from Hydra's groups."""
    for part in PARTS:
        ConfigStore.instance().repo.get(part, {}).pop("checkpoint.yaml", None)


def compose_with_checkpoint(cfg: DictConfig) -> DictConfig:
    """Return the configuration of a job of eval.py or predict.py, with the parts and the transform of its own checkpoint.

    In a sweep over `ckpt` Hydra has composed all jobs with the parts of the first. Without a checkpoint it is left as it is.
    """
    if cfg.ckpt is None:
        return cfg
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    if hydra.mode == RunMode.MULTIRUN:
        path = path_setting(cfg.ckpt, "ckpt")
        register_parts(load_checkpoint(path)["config"], path)
        cfg = compose(hydra.job.config_name, overrides=overrides)
    keep_eval_transform(cfg, overrides)
    return cfg


def keep_eval_transform(cfg: DictConfig, overrides: Iterable[str]) -> None:
    """Set `cfg.data.eval_transform` to the checkpoint's, except for what `overrides` name, and warn of each difference.

    Another data configuration has another transform, such as images of 600 pixels for a detector that was trained on 240.
    """
    prefix = "data.eval_transform"
    named = [text.lstrip("+~").partition("=")[0] for text in overrides]
    own = OmegaConf.to_container(ConfigStore.instance().load("data/checkpoint.yaml").node).get("eval_transform") or {}
    given = OmegaConf.to_container(cfg.data).get("eval_transform") or {}
    for key in [key for key in own | given if own.get(key) != given.get(key)]:
        setting = f"{prefix}.{key}"
        if any(name in (prefix, setting) or name.startswith(f"{setting}.") for name in named):
            log.warning("%s=%s is not the checkpoint's, which is %s", setting, given.get(key), own.get(key))
            continue
        log.warning(
            "%s=%s is the checkpoint's. The data configuration has %s: set it by name to use that", setting, own.get(key), given.get(key)
        )
        with open_dict(cfg.data):
            if key in own:
                cfg.data.eval_transform[key] = own[key]
            else:
                del cfg.data.eval_transform[key]


def check_categories(checkpoint: dict, categories: list[dict]) -> None:
    """Check that a checkpoint was trained on these classes, in this order.

    Raises:
        InputError: it was trained on others; the message names both.
    """
    trained = [category["name"] for category in checkpoint["categories"]]
    present = [category["name"] for category in categories]
    if trained != present:
        raise InputError(
            f"the checkpoint was trained on {len(trained)} classes ({_join(trained)}), the data has {len(present)} ({_join(present)}). "
            "Evaluate it on data with its own classes, in the order of their category ids"
        )


def load_weights(detector: nn.Module, checkpoint: dict) -> None:
    """Load a checkpoint's weights into a detector; the averaged ones where there are any.

    Raises:
        InputError: a weight is missing, left over or of another shape. The message names the first, and the usual causes.
    """
    found = detector_weights(checkpoint)
    check_weights(found, detector.state_dict())
    detector.load_state_dict(found)


def detector_weights(checkpoint: dict) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint's detector; of the averaged one where there is one."""
    weights = checkpoint["state_dict"]
    prefix = "averaged.module." if any(key.startswith("averaged.") for key in weights) else "detector."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def check_weights(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Check that the weights of a checkpoint, `found`, are those that a detector has.

    Raises:
        InputError: a weight is missing, left over or of another shape. The message names the first, and the usual causes.
    """
    problems = [f"{key} is not in the checkpoint" for key in wanted.keys() - found.keys()]
    problems += [f"{key} of the checkpoint has no place in the detector" for key in found.keys() - wanted.keys()]
    problems += [
        f"{key} has shape {list(found[key].shape)} in the checkpoint, {list(wanted[key].shape)} in the detector"
        for key in wanted.keys() & found.keys()
        if wanted[key].shape != found[key].shape
    ]
    if problems:
        raise InputError(
            f"the checkpoint does not fit the detector, {len(problems)} of its weights differ: {sorted(problems)[0]}. Was backbone, "
            "head.extractor.output_size or head.box_head.hidden changed?"
        )


def _join(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
