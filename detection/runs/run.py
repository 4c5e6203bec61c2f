"""What train.py and eval.py have in common: how a run begins, and the report at its end."""

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from roi_quantization.detection.evaluation.coco import Metrics, format_table, write_metrics, write_results
from roi_quantization.detection.evaluation.figures import plot_curves, plot_detection_sheet
from roi_quantization.detection.files import atomic_write
from roi_quantization.detection.model.lightning_module import LOGGED, DetectionModule
from roi_quantization.detection.runs.distributed import is_rank_zero
from roi_quantization.detection.runs.progress import TimeLeft
from roi_quantization.detection.runs.training_checkpoints import FINISHED

log = logging.getLogger(__name__)


def set_up_run(cfg: DictConfig) -> Path:
    """Checks the machine, seeds, writes the configuration into the run folder and returns that folder."""
    check_accelerator(cfg.trainer)
    check_precision(cfg.trainer)
    silence_lightning()
    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if is_rank_zero():
        atomic_write(run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True).encode())
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
        if cfg.trainer.get("strategy", "auto") != "auto":
            os.environ["OMP_NUM_THREADS"] = str(cfg.threads)  # without it Lightning shares the cores among its processes
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    return run_dir


def progress_bar(trainer: DictConfig) -> list[pl.Callback]:
    """The callback that shows the losses and the time left, where a progress bar is wanted."""
    return [TimeLeft()] if trainer.enable_progress_bar else []


def silence_lightning() -> None:
    """Passes over what Lightning tells of every run and nobody can act on; its other warnings stay."""
    for module in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"pytorch_lightning.{module}").setLevel(logging.WARNING)
    known = ("exists and is not empty", "LeafSpec", "does not have many workers", "smaller than the logging interval", "DistributedSampler")
    known += ("Total length of `list` across ranks is zero",)  # of validation batches where there is no val split
    known += ("in eval mode at the start of training",)  # frozen blocks
    known += ("You're resuming from a checkpoint that ended before the epoch ended",)  # DetectionData knows the place in the epoch
    for message in known:
        warnings.filterwarnings("ignore", f".*{message}")


def check_accelerator(trainer: DictConfig) -> None:
    """Raises ValueError where the configuration wants CUDA devices that are not there."""
    if trainer.accelerator not in ("cuda", "gpu") or torch.backends.mps.is_available():
        return
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = trainer.devices if isinstance(trainer.devices, int) and trainer.devices > 0 else 1
    if present < wanted:
        raise ValueError(
            f"trainer.accelerator={trainer.accelerator} with trainer.devices={trainer.devices} wants a CUDA device, and PyTorch sees "
            f"{present} here. Choose trainer=cpu, or see that the driver and a CUDA build of PyTorch are there"
        )


def check_precision(trainer: DictConfig) -> None:
    """Raises ValueError where Lightning would cast whole batches to 16 bits: boxes would be rounded, to whole pixels and worse."""
    if str(trainer.get("precision")) in ("bf16-true", "16-true"):
        raise ValueError(
            f"trainer.precision={trainer.precision} rounds boxes as well: 301.3 pixels are 302 in bfloat16. Choose bf16-mixed or 16-mixed, "
            "which compute in 16 bits and keep coordinates in 32"
        )


def check_metric(name: str, validates: bool, objects: int = 1) -> str:
    """Whether a checkpoint is the better one for more of `optimized_metric` or for less: "max" or "min", as `ModelCheckpoint` has it.

    Args:
        objects: annotated on the val split.

    Raises:
        ValueError: there are validations, and none of them has this metric, or all have it undefined.
    """
    known = [f"val/{logged}" for logged in LOGGED]
    if validates and name not in known:
        raise ValueError(f"optimized_metric={name}: the best checkpoint is chosen on the val split, by one of {', '.join(known)}")
    if validates and "AP" in name and objects == 0:
        raise ValueError(f"optimized_metric={name}: the val split has no objects, so no checkpoint is the best by AP. val/loss chooses one")
    return "min" if "loss" in name else "max"


def draw_curves(run_dir: Path) -> None:
    """Draws curves.png from metrics.csv; a run too short to have logged a loss keeps its results all the same."""
    try:
        plot_curves(run_dir / "metrics.csv", run_dir / "curves.png")
    except (FileNotFoundError, ValueError) as error:
        log.warning("No curves.png: %s", error)


def write_cross(run_dir: Path, cross: dict[str, Metrics]) -> None:
    """Writes cross.json: operator -> metrics of the run's weights with it."""
    atomic_write(run_dir / "cross.json", json.dumps({name: metrics.as_json() for name, metrics in cross.items()}, indent=2).encode())


def report_cross(cross: dict[str, Metrics], run_dir: Path) -> None:
    """Writes cross.json where weights were evaluated with other operators than their own, and prints it."""
    if not cross:
        return
    write_cross(run_dir, cross)
    print("\nThe same weights with other operators:")
    for name, metrics in cross.items():
        print(f"  {name:20}" + "  ".join(f"{key} {metrics.stats[key]:5.1f}" for key in ("AP", "AP50", "AP75")))


def report(module: DetectionModule, dataset: Any, run_dir: Path, title: str) -> None:
    """Writes results.json, metrics.json and detections.png of the module's last evaluation, and prints the table."""
    write_results(run_dir / "results.json", module.results)
    plot_detection_sheet(dataset, module.detections, run_dir / "detections.png")
    write_metrics(run_dir / FINISHED, module.metrics)
    print(f"\n{title}: {len(dataset)} images\n{format_table(module.metrics)}\n\nThe run folder: {run_dir}")
