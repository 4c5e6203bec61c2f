"""The ranks of a distributed run, by the environment variables of torchrun, SLURM and Lightning.

Lightning itself knows the rank only when training starts.
"""

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

from roi_quantization.detection.common.errors import InputError

# of torchrun, SLURM, and Lightning: each is 0 or unset on rank zero
_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")


def is_rank_zero() -> bool:
    """Whether this process is rank zero, the one that writes; a process that runs alone is."""
    return all(os.environ.get(name, "0") == "0" for name in _RANK_VARIABLES)


def silence_other_ranks() -> None:
    """Log warnings only on ranks other than zero."""
    if not is_rank_zero():
        logging.getLogger().setLevel(logging.WARNING)


def is_distributed() -> bool:
    """Whether several processes were started for this run, here or on other machines."""
    by_srun = "SLURM_NTASKS" in os.environ and SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) > 1
    return by_srun or int(os.environ.get("WORLD_SIZE", 1)) > 1 or "NODE_RANK" in os.environ


def new_folder(path: str) -> str:
    """Return `path`, a folder named by the time: the OmegaConf resolver `new_folder`.

    Ends the program where srun or torchrun has started several processes, whose clocks differ. Lightning passes the folder of rank zero
    to the processes that it starts (`share_run_dir_with_ranks`).
    """
    if is_distributed():
        sys.exit(
            "several processes were started for this run, and each would create a run folder of its own. Set one with "
            "hydra.run.dir=runs/<name> (docs/distributed.md)"
        )
    return path


OmegaConf.register_new_resolver("new_folder", new_folder, replace=True)


def cluster_plugins() -> list[Any]:
    """Return plugins for the Trainer: under SLURM one that does not requeue the job.

    Lightning's requeueing saves in the middle of a step, and under another name than `PeriodicCheckpoint`.
    """
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        return [SLURMEnvironment(auto_requeue=False)]
    return []


def share_run_dir_with_ranks(trainer: pl.Trainer, run_dir: str | Path) -> None:
    """Give the processes that Lightning is going to start the run folder of this one.

    Lightning starts them with the command of this process and its `hydra.run.dir`.

    Raises:
        InputError: this is a run of a sweep, where the command is that of the whole sweep.
    """
    if trainer.world_size == 1 or trainer.strategy.cluster_environment.creates_processes_externally or not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        raise InputError(
            f"each run of this sweep needs {trainer.world_size} processes, which this launcher cannot start. Use one device a run "
            "(trainer.devices=1), or let SLURM start them: hydra/launcher=slurm hydra.launcher.tasks_per_node=<devices>"
        )
    OmegaConf.set_readonly(hydra, False)
    hydra.run.dir = str(run_dir)  # resolved once: in the other processes resume=auto might choose another folder
