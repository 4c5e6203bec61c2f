"""The start of a run: its settings are checked, its folder is created, the random generators are seeded."""

import logging
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from roi_quantization.detection.common.configuration import CONFIGS, check_count, check_groups, flatten
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.instantiation import check_settings
from roi_quantization.detection.model.lightning_module import LOGGED, LOGGED_OF_MASKS

MAX_SEED = 2**32 - 1


def set_up_run(cfg: DictConfig, groups: Sequence[str] = ()) -> Path:
    """Check the settings and the machine, create the run folder, seed the generators, and return the folder.

    Args:
        cfg: of the script.
        groups: those that the script needs beside `detector`, `roi`, `data` and `trainer`. The detector checks for its own.
    """
    own = ("backbone",) if cfg.get("head") else ()  # whose settings the head refers to
    check_groups(cfg, ("detector", "roi", *own, "data", "trainer", *groups))
    check_seeds(cfg)
    check_settings(cfg)
    if cfg.threads is not None:
        check_count(cfg.threads, "threads")
    if HydraConfig.initialized():
        check_working_folder()
        check_added_keys(cfg, HydraConfig.get().overrides.task, HydraConfig.get().job.config_name)
    check_accelerator(cfg.trainer)
    check_precision(cfg.trainer)
    silence_lightning()
    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
        if cfg.trainer.get("strategy", "auto") != "auto":
            os.environ["OMP_NUM_THREADS"] = str(cfg.threads)  # without it Lightning shares the cores among its processes
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    return run_dir


def silence_lightning() -> None:
    """Filter the messages of Lightning that come with every run and that the user can do nothing about."""
    for module in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"pytorch_lightning.{module}").setLevel(logging.WARNING)
    known = ("exists and is not empty", "LeafSpec", "does not have many workers", "smaller than the logging interval", "DistributedSampler")
    known += ("Total length of `list` across ranks is zero",)  # of validation batches where there is no val split
    known += ("in eval mode at the start of training",)  # frozen blocks
    known += ("You have overridden `on_before_batch_transfer` in `LightningModule`",)  # DetectionData has none
    known += ("You're resuming from a checkpoint that ended before the epoch ended",)  # DetectionData skips what was seen
    for message in known:
        warnings.filterwarnings("ignore", f".*{message}")


def check_seeds(cfg: DictConfig) -> None:
    """Check that every seed in the configuration is one that PyTorch and NumPy take.

    Raises:
        InputError: one is not; the message names its key.
    """
    for key, value in flatten(OmegaConf.to_container(cfg, resolve=True)):
        name = key.rpartition(".")[2]
        is_seed = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SEED
        if (name == "seed" or name.endswith("_seed")) and not is_seed:
            raise InputError(f"{key}={value}: expected an integer from 0 to {MAX_SEED}")


def check_working_folder() -> None:
    """Check that Hydra has not changed the working folder.

    Raises:
        InputError: it has, so that relative paths would mean other files than where the command was typed.
    """
    if HydraConfig.get().job.chdir:
        raise InputError("hydra.job.chdir=true: paths are relative to the folder of the command. Remove it; results go to the run folder")


def check_added_keys(cfg: DictConfig, overrides: Sequence[str], config_name: str) -> None:
    """Check that something reads each key that the command line adds at the top level (`+key=value`), or in `checkpoint`.

    Raises:
        InputError: nothing reads one, such as `+max_epochs=4` for `trainer.max_epochs=4`.
    """
    path = CONFIGS / f"{config_name}.yaml"
    if not path.is_file():  # of --config-dir
        return
    primary = OmegaConf.load(path)
    known = {*primary, *(path.name for path in CONFIGS.iterdir() if path.is_dir())}
    values = [str(value) for _, value in flatten(OmegaConf.to_container(cfg))]
    interpolations = " ".join(value for value in values if "${" in value)
    for text in overrides:
        key = text.lstrip("+").partition("=")[0]
        top, _, rest = key.partition(".")
        is_read = top in known and (top != "checkpoint" or rest.partition(".")[0] in primary.get("checkpoint", {}))
        if text.startswith("+") and not is_read and not re.search(rf"\b{re.escape(top)}\b", interpolations):
            raise InputError(f"{text}: nothing reads {key}. See `python {config_name}.py --help` for the settings")


def check_accelerator(trainer: DictConfig) -> None:
    """Check that the CUDA devices that are asked for exist.

    Raises:
        InputError: there are fewer.
    """
    if trainer.accelerator not in ("cuda", "gpu") or torch.backends.mps.is_available():
        return
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = trainer.devices if isinstance(trainer.devices, int) and trainer.devices > 0 else 1
    if present < wanted:
        raise InputError(
            f"trainer.accelerator={trainer.accelerator} with trainer.devices={trainer.devices} needs a CUDA device, and PyTorch sees "
            f"{present} here. Choose trainer=cpu, or check the driver and that PyTorch is built for CUDA"
        )


def check_precision(trainer: DictConfig) -> None:
    """Check that Lightning does not cast whole batches to 16 bits, which would round boxes to whole pixels and worse.

    Raises:
        InputError: the precision does that.
    """
    if str(trainer.get("precision")) in ("bf16-true", "16-true"):
        raise InputError(
            f"trainer.precision={trainer.precision} rounds boxes as well: 301.3 pixels are 302 in bfloat16. Choose bf16-mixed or 16-mixed, "
            "which compute in 16 bits and keep coordinates in 32"
        )


def check_metric(name: str, validates: bool, objects: int = 1, has_losses: bool = True, masks: bool = False) -> str:
    """Return whether more or less of `optimized_metric` is better: "max" or "min", as `ModelCheckpoint` has it.

    Args:
        name: of the metric.
        validates: whether there is a val split.
        objects: number of objects on the val split.
        has_losses: whether the detector computes losses in evaluation.
        masks: whether masks are evaluated.

    Raises:
        InputError: validations do not have this metric, or it is undefined in all of them.
    """
    known = [f"val/{logged}" for logged in (*LOGGED, *(LOGGED_OF_MASKS if masks else ()))]
    if validates and name not in known:
        raise InputError(f"optimized_metric={name}: the best checkpoint is chosen on the val split, by one of {', '.join(known)}")
    if validates and "loss" in name and not has_losses:
        raise InputError(f"optimized_metric={name}: this detector computes no losses in evaluation. Set optimized_metric=val/AP")
    if validates and "AP" in name and objects == 0:
        raise InputError(f"optimized_metric={name}: the val split has no objects, so AP chooses no checkpoint. Set val/loss")
    return "min" if "loss" in name else "max"
