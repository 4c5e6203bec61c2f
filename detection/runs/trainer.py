"""Lightning's Trainer, from the configuration and from what the scripts add to it."""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from roi_quantization.detection.common.configuration import check_count
from roi_quantization.detection.common.errors import InputError, MissingPackageError
from roi_quantization.detection.model.build import instantiate
from roi_quantization.detection.runs.distributed import cluster_plugins
from roi_quantization.detection.runs.progress import TrainingProgressBar

log = logging.getLogger(__name__)

MERGED = ("callbacks", "plugins", "logger")  # given in the configuration and by the scripts


def build_trainer(
    cfg: DictConfig, callbacks: Sequence[pl.Callback] = (), plugins: Sequence[Any] = (), loggers: Sequence[Logger] = (), **options: Any
) -> pl.Trainer:
    """Build the Trainer of `cfg`, with these callbacks, plugins and loggers beside those in `cfg`.

    `trainer.logger=false` turns off all loggers. A progress bar among `trainer.callbacks` replaces this project's.

    Raises:
        InputError: a setting that this project makes itself, one that Lightning does not take, or a strategy that does not work here.
    """
    if "enable_checkpointing" in cfg:
        raise InputError("trainer.enable_checkpointing: the scripts decide this. Remove it, and see `checkpoint` in configs/train.yaml")
    if cfg.get("logger") is True and not loggers:
        raise InputError("trainer.logger=true: there is no logger here. Name one by its _target_, or remove it")
    given = {key: _instantiate_list(cfg.get(key)) for key in MERGED}
    callbacks = [*callbacks, *given["callbacks"]]
    if cfg.get("enable_progress_bar", True) and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        callbacks.append(TrainingProgressBar())
    own = copy.deepcopy(cfg)
    with open_dict(own):
        for key in MERGED:
            own.pop(key, None)
    options |= {"callbacks": callbacks, "plugins": [*plugins, *cluster_plugins(), *given["plugins"]]}
    options["logger"] = False if cfg.get("logger") is False else [*loggers, *given["logger"]]
    try:
        trainer = instantiate(own, **options)
    except InputError:
        raise
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise InputError(f"Lightning does not take these settings of trainer: {error}") from error
    check_strategy(trainer)
    return trainer


def build_loggers(cfg: DictConfig | None) -> list[Logger]:
    """Build the loggers of the group `logger`: none for `~logger` and `logger=null`."""
    if not cfg:
        return []
    try:
        return list(instantiate(cfg).values())
    except ImportError as error:
        remedy = 'For TensorBoard run pip install -e ".[tensorboard]"' if "tensorboard" in cfg else "Install its package"
        raise MissingPackageError(f"logger: {', '.join(cfg)} cannot be imported: {error}. {remedy}, or choose logger=csv") from error


def log_configuration(loggers: Sequence[Logger], cfg: DictConfig) -> None:
    """Give the loggers the configuration as hyperparameters. Of a CSVLogger the run folder has config.yaml."""
    for logger in loggers:
        if not isinstance(logger, CSVLogger):
            logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))


@contextmanager
def closed_loggers(trainer: pl.Trainer) -> Iterator[None]:
    """Close the loggers at the end. A W&B run that stays open is continued by the next run of a sweep in this process."""
    try:
        yield
    finally:
        for logger in trainer.loggers:
            finish = getattr(logger.experiment, "finish", None)
            if finish is not None:
                finish()


def check_strategy(trainer: pl.Trainer) -> None:
    """Check that each rank has the whole model, and that the processes start from the beginning of the script.

    Raises:
        InputError: they do not. Results and logs of processes that are spawned or forked do not come back to the script.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or getattr(strategy, "_start_method", "popen") != "popen":
        name = getattr(strategy, "_start_method", None) or type(strategy).__name__
        raise InputError(f"trainer.strategy: {name} is not supported. Use strategy=ddp (trainer=ddp or trainer=ddp_cpu), or one device")


def check_limits(cfg: DictConfig, split: str) -> None:
    """Check that `trainer` leaves something to evaluate on the split that is reported.

    Raises:
        InputError: it leaves nothing.
    """
    key = f"limit_{split}_batches"
    if cfg.get(key) is not None and cfg[key] == 0:
        raise InputError(f"trainer.{key}={cfg[key]}: nothing would be evaluated. Set 1 or more, or remove it")


def warn_of_partial_validation(cfg: DictConfig) -> None:
    """Warn where `trainer` leaves out images of val, on which the best checkpoint is chosen."""
    limit = cfg.get("limit_val_batches")
    if limit and not (isinstance(limit, float) and limit == 1):  # 1 is one batch, 1.0 are all
        log.warning("trainer.limit_val_batches=%s: the best checkpoint is chosen on a part of val. Remove it, or set data.subset", limit)


def check_trains_as_configured(cfg: DictConfig) -> None:
    """Check for settings of `trainer` that change the data, leave out the results of a training or do nothing.

    Raises:
        InputError: there is one; the message says what to set instead.
    """
    if cfg.get("fast_dev_run"):
        raise InputError(
            f"trainer.fast_dev_run={cfg.fast_dev_run}: it leaves out loggers and checkpoints. Set trainer.max_steps=1 and data.subset=4"
        )
    clip = cfg.get("gradient_clip_val")
    if clip is not None and not clip >= 0:
        raise InputError(f"trainer.gradient_clip_val={clip}: expected a number from 0 on, the norm of all gradients, or null")
    for key in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        if cfg.get(key) is not None:
            check_count(cfg[key], f"trainer.{key}")
    interval = cfg.get("val_check_interval")
    if interval is not None and not interval > 0:
        raise InputError(f"trainer.val_check_interval={interval}: expected training batches, a share of them such as 0.5, or null")
    if cfg.get("overfit_batches"):
        raise InputError(
            f"trainer.overfit_batches={cfg.overfit_batches}: it replaces the order of images, so that a run could not go on. Set "
            "data.train_subset=<images>"
        )


def _instantiate_list(given: Any) -> list[Any]:
    """Instantiate one object, a list or a mapping of them as a list; nothing for None, true and false."""
    if given is None or isinstance(given, bool):
        return []
    if not OmegaConf.is_config(given):  # a name, such as a plugin's
        return [given]
    found = instantiate(given)
    if OmegaConf.is_dict(found):
        return list(found.values())
    return list(found) if OmegaConf.is_list(found) else [found]
