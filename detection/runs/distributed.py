"""Which of several processes this one is, told by the environment alone: Lightning knows it only when training begins."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

# of torchrun, SLURM, and Lightning itself: each is 0 or not there in the first process
_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")


def is_rank_zero() -> bool:
    """Whether this process is the one that writes: the only one, or the first of those that work together."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def silence_other_ranks() -> None:
    """In all processes of a run but the first nothing is logged but warnings: the first tells the rest for all."""
    if not is_rank_zero():
        logging.getLogger().setLevel(logging.WARNING)


def is_distributed() -> bool:
    """Whether several processes work on this run, here or on other machines."""
    by_srun = "SLURM_NTASKS" in os.environ and SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) > 1
    return by_srun or int(os.environ.get("WORLD_SIZE", 1)) > 1 or "NODE_RANK" in os.environ


def new_folder(path: str) -> str:
    """The OmegaConf resolver `new_folder`: `path`, named by the time. It ends the program where several processes would each name one.

    Processes that Lightning starts get the folder of the first (`share_run_dir_with_ranks`); those of srun or torchrun do not.
    """
    if is_distributed():
        sys.exit(
            "several processes were started for this run, and each would write into a folder of its own: name one with "
            "hydra.run.dir=runs/<name> (docs/distributed.md)"
        )
    return path


OmegaConf.register_new_resolver("new_folder", new_folder, replace=True)


def cluster_plugins() -> list[Any]:
    """For the Trainer: under SLURM its own way to queue a job again is left out. It saves in the middle of a step, under another name."""
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        return [SLURMEnvironment(auto_requeue=False)]
    return []


def share_run_dir_with_ranks(trainer: pl.Trainer, run_dir: str | Path) -> None:
    """To be called before Lightning starts the other processes, which it does with the command of this one and its `hydra.run.dir`.

    Raises:
        ValueError: in a sweep, where the command is that of the whole sweep.
    """
    if trainer.world_size == 1 or trainer.strategy.cluster_environment.creates_processes_externally or not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        raise ValueError(
            f"each run of this sweep wants {trainer.world_size} processes, which can only be started for a run by itself. Give each run "
            "one device (trainer.devices=1), or let SLURM start them: hydra/launcher=slurm hydra.launcher.tasks_per_node=<devices>"
        )
    OmegaConf.set_readonly(hydra, False)
    hydra.run.dir = str(run_dir)  # Hydra would resolve it once more, and resume=auto might find another
