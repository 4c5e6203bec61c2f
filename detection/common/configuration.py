"""The folder of configurations, and the comparison of two configurations."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from roi_quantization.detection.common.errors import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# keys that do not change the result: paths, logging and the number of workers
IGNORED_KEYS = {"run_dir", "default_root_dir", "save_dir", "root", "cache_dir", "resume", "checkpoint", "logger", "num_workers"}
IGNORED_KEYS |= {"sweep_suffix", "sweep_variant", "enable_progress_bar", "enable_model_summary", "log_every_n_steps"}

FAST_RCNN = {"_target_": "roi_quantization.detection.model.build.build_fast_rcnn", "_partial_": True}  # the detector of earlier versions

# settings that earlier versions did not have, with the value that does what those did: the ends of dotted keys
ADDED_SETTINGS = {
    **{f"detector.{key}": value for key, value in FAST_RCNN.items()},
    "init_from": None,
    "model.compile": False,
    "data.classes": None,
    "box_predictor.class_agnostic": False,
    "detector.masks": False,
    "match_by": None,
    "coco_eval.iou_thresholds": [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95],
    "coco_eval.areas": [["small", 0, 32], ["medium", 32, 96], ["large", 96, None]],
}

FOLLOWING = {"data.masks"}  # settings that have the value of another
_MISSING = "not there"


def path_setting(value: Any, key: str) -> str:
    """Return a setting that is a path as text, with `~` as the home folder. YAML and Hydra read a name such as 2024 as a number.

    Raises:
        InputError: it is missing, or of a type from which the text cannot be restored.
    """
    if isinstance(value, str | os.PathLike) and str(value):
        return os.path.expanduser(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise InputError(f"{key}={value}: expected a path. Quote a name that is not plain text: '{key}=\"...\"'")


def read_configuration(path: Path) -> DictConfig:
    """Read the config.yaml of a run, or another file of settings.

    Raises:
        InputError: it holds no settings, or is truncated; the message names it.
    """
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise InputError(f"{path} is not a YAML file, or was truncated: {error}") from error
    if not OmegaConf.is_dict(config):
        raise InputError(f"{path} holds a list, expected settings")
    return config


def check_count(value: Any, key: str, least: int = 1) -> None:
    """Check that a setting is a whole number from `least` on.

    Raises:
        InputError: it is not.
    """
    if type(value) is not int or value < least:
        raise InputError(f"{key}={value}: expected a whole number from {least} on")


def evaluated_split(data: Mapping[str, Any]) -> str:
    """Return the split that results are of, from the settings of the data: test, or val where there is none."""
    return "val" if data.get("test") is None else "test"


def check_groups(cfg: DictConfig, groups: Sequence[str]) -> None:
    """Check that something is chosen of each of these groups: none was removed (`~data`, `data=null`).

    Raises:
        InputError: one is missing.
    """
    for group in groups:
        if not is_chosen(cfg, group):
            raise InputError(f"{group}: nothing is chosen. Choose a file of configs/{group} with {group}=<name>")


def is_chosen(cfg: DictConfig, group: str) -> bool:
    """Whether a file of the group is chosen: there is a `_target_`, and not only settings of one."""
    node = cfg.get(group)
    return bool(node) and any(key.rpartition(".")[2] == "_target_" for key, _ in flatten(OmegaConf.to_container(node)))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List `key was x and is y` for each setting that differs.

    Left out are the `IGNORED_KEYS`, the library that computes COCO's metrics, and `ADDED_SETTINGS` that one does not have and that have
    the value of earlier versions in the other: the runs of a sweep come in the order of its arms, whatever version each is of.
    """
    before, now = _deciding(before), _deciding(now)
    changed = [key for key in {**before, **now} if before.get(key, _MISSING) != now.get(key, _MISSING)]
    changed.sort(key=lambda key: key.count("."))  # the outer settings, which others take their values from, come first
    both = before.keys() & now.keys()
    changed = [key for key in changed if key in both or {**before, **now}[key] not in _values_of_earlier_versions(key)]
    return [f"{key} was {before.get(key, _MISSING)} and is {now.get(key, _MISSING)}" for key in changed]


def differences_beside_seeds(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the `differences` in other settings than seeds of a training: between two runs of one arm there should be none."""
    return [text for text in differences(before, now) if not _is_training_seed(text.partition(" ")[0])]


def _is_training_seed(key: str) -> bool:
    """Whether it is a seed that two runs of one arm may differ in. Those of the images do not count: other images are other tests."""
    return key.rpartition(".")[2] == "seed" and not key.startswith("data.source.")


def shorten(differing: list[str], limit: int = 5) -> str:
    """Join the first of `differences` in one line."""
    return "; ".join(differing[:limit] + ([f"and {len(differing) - limit} more"] if len(differing) > limit else []))


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of each setting in nested mappings."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide a result, by their dotted keys."""
    return {key: value for key, value in flatten(config) if not IGNORED_KEYS.intersection(key.split(".")) and not _is_derived(key)}


def _is_derived(key: str) -> bool:
    """Whether a setting follows another, or says which library computes COCO's metrics, which are the same."""
    group, _, rest = key.partition(".")
    return key in FOLLOWING or (group == "coco_eval" and rest not in ("iou_thresholds", "areas"))


def _values_of_earlier_versions(key: str) -> list[Any]:
    """Return the value in `ADDED_SETTINGS` of a dotted key, as a list of one or none."""
    return [value for end, value in ADDED_SETTINGS.items() if key == end or key.endswith(f".{end}")]


def sweep_lines(config: DictConfig) -> list[str]:
    """Return what Hydra makes the jobs of a sweep of: the sweeper's parameters, then the command line.

    Interpolations of the command line are left as they are, such as `arm=${roi.sampling_ratio}`: each job has its own value.

    Args:
        config: of the sweep, with `hydra`.
    """
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    task = OmegaConf.select(config, "hydra.overrides.task")
    return [f"{key}={value}" for key, value in params.items()] + (OmegaConf.to_container(task, resolve=False) if task else [])
