"""What train.py and eval.py have in common: the look at the machine before, and the report after."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from detection.evaluation.coco import format_table, write_metrics, write_results
from detection.evaluation.figures import detections_sheet
from detection.module import DetectionModule


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


def report(module: DetectionModule, dataset: Any, run_dir: Path, title: str) -> None:
    """Writes results.json, metrics.json and detections.png of the module's last evaluation, and prints the table."""
    write_results(run_dir / "results.json", module.results)
    write_metrics(run_dir / "metrics.json", module.metrics)
    detections_sheet(dataset, module.detections, run_dir / "detections.png")
    print(f"\n{title}: {len(dataset)} images\n{format_table(module.metrics)}\n\nThe run folder: {run_dir}")
