"""Configurations composed from Python, as the command line of a script composes them."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import Container, DictConfig, OmegaConf, open_dict

from roi_quantization.detection.common.config_sources import (
    check_choices,
    compose_from_all,
    name_config_folder,
    name_folders_of_overrides,
)
from roi_quantization.detection.common.configuration import path_setting
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.runs.checkpoint import (
    PARTS,
    checkpoint_paths,
    chooses_detector,
    forget_parts,
    keep_eval_transform,
    load_checkpoint,
    register_parts,
)
from roi_quantization.detection.runs.distributed import new_folder  # noqa: F401 -- a resolver of run_dir
from roi_quantization.detection.runs.resume import run_folder  # noqa: F401 -- a resolver of run_dir

WITH_CHECKPOINT = ("eval", "predict")
CHECKPOINT_OPTIONAL = ("eval",)  # where a detector is chosen that has weights of its own


def compose(
    name: str, overrides: Sequence[str] = (), *, ckpt: str | Path | None = None, config_dir: str | Path | None = None
) -> DictConfig:
    """Compose the configuration of a script, for `train(cfg)` and `evaluate(cfg)`.

    ```python
    cfg = roi_quantization.compose("train", ["roi=pool", "trainer.max_epochs=2"])
    metrics = roi_quantization.train(cfg)
    ```

    Args:
        name: of the script: "train", "eval", "predict", "explain", "recall", "predict_cost" or "probe".
        overrides: as on the command line, such as "roi=pool". Without `run_dir=` the run folder is the one that the command would have.
        ckpt: the checkpoint of "eval" and "predict"; `ckpt=` among the overrides is the same. "eval" needs none where `detector=`
            chooses a detector that has weights of its own.
        config_dir: a folder of your own configurations, as `--config-dir`. Naming it permits checkpoints to call its `_target_`s.

    Raises:
        InputError: "eval" or "predict" without a checkpoint, with one that would call what is not allowed, or with a part that is not
            there, such as roi=allign.
        hydra.errors.HydraException: an override is not valid, or there is no such choice.
    """
    if config_dir is not None:
        name_config_folder(config_dir)
    name_folders_of_overrides(overrides)
    if name in WITH_CHECKPOINT:
        cfg = compose_with_parts(name, overrides, ckpt)
    elif ckpt is not None:
        raise InputError(f"ckpt={ckpt}: the configuration of {name} has no checkpoint. Those of {' and '.join(WITH_CHECKPOINT)} have")
    else:
        cfg = compose_from_all(name, overrides, return_hydra_config=True)
    return _as_in_application(cfg)


def compose_with_parts(name: str, overrides: Sequence[str], ckpt: str | Path | None) -> DictConfig:
    """Compose "eval" or "predict" with the parts of a checkpoint; the node `hydra` is left in."""
    paths = [path_setting(ckpt, "ckpt")] if ckpt is not None else checkpoint_paths(overrides)
    if not paths and name in CHECKPOINT_OPTIONAL and chooses_detector(overrides):
        forget_parts()
        check_choices(overrides, PARTS)
        return compose_from_all(name, overrides, return_hydra_config=True)
    if len(paths) != 1:
        raise InputError(f"{name} needs one checkpoint, got {len(paths)}: give ckpt=<run>/best.ckpt")
    register_parts(load_checkpoint(paths[0])["config"], paths[0])
    check_choices(overrides, PARTS)
    cfg = compose_from_all(name, overrides, return_hydra_config=True)
    cfg.ckpt = paths[0]
    keep_eval_transform(cfg, overrides)
    return cfg


def _as_in_application(cfg: DictConfig) -> DictConfig:
    """Resolve what only Hydra can resolve (`${hydra:...}`, the run folder), and remove the node `hydra`."""
    OmegaConf.set_readonly(cfg.hydra, False)
    with hydra_config(cfg):
        if "run_dir" in cfg and "${hydra:" in str(OmegaConf.to_container(cfg, resolve=False)["run_dir"]):
            with open_dict(cfg):
                cfg.run_dir = str(Path(cfg.hydra.run.dir).absolute())
        with open_dict(cfg):
            _resolve_hydra(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def _resolve_hydra(node: Container) -> None:
    raw = OmegaConf.to_container(node, resolve=False)
    for key in node if OmegaConf.is_dict(node) else range(len(node)):
        if key == "hydra":
            continue
        if isinstance(raw[key], str) and "${hydra:" in raw[key]:
            node[key] = node[key]
        elif isinstance(raw[key], dict | list):
            _resolve_hydra(node._get_node(key))


@contextmanager
def hydra_config(cfg: DictConfig) -> Iterator[None]:
    """Let `${hydra:...}` be resolved by `cfg.hydra` inside; afterwards by what it was before, if anything."""
    instance = HydraConfig.instance()
    before = instance.cfg
    instance.set_config(copy.deepcopy(cfg))
    try:
        yield
    finally:
        instance.cfg = before
