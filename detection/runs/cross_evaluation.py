"""Train with one operator, test with another.

python -m roi_quantization.detection.runs.cross_evaluation runs/<sweep>

completes the matrix of a finished sweep: what `cross` left out, from the checkpoints of its runs.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from roi_quantization.detection.configuration import CONFIGS
from roi_quantization.detection.evaluation.coco import Metrics
from roi_quantization.detection.model.build import build_detector, instantiate, read_operator
from roi_quantization.detection.model.lightning_module import DetectionModule
from roi_quantization.detection.report import write_report
from roi_quantization.detection.report.sweep import Run, read_sweep
from roi_quantization.detection.runs.checkpoint import check_categories, load_checkpoint, load_weights
from roi_quantization.detection.runs.config_security import check_targets_allowed
from roi_quantization.detection.runs.distributed import cluster_plugins
from roi_quantization.detection.runs.run import silence_lightning, write_cross


def check_operators(names: Sequence[str]) -> None:
    """Raises an error where one of them is no operator: it is not to be found when training is over."""
    for name in names:
        try:
            instantiate(read_operator(name))
        except ValueError as error:
            raise ValueError(f"cross: {error}") from error


def cross_evaluate(cfg: DictConfig, module: DetectionModule, data: pl.LightningDataModule, split: str) -> dict[str, Metrics]:
    """Metrics of the module's weights on `split` with each operator of `cfg.cross`; `module.metrics` where that is its own.

    The module and its last evaluation are left as they were.
    """
    metrics = {}
    extractor = module.evaluated.roi_heads.box_roi_pool
    own = extractor.operator
    for name in cfg.cross:
        leaf = read_operator(name)
        if leaf == cfg.roi:
            metrics[name] = module.metrics
            continue
        extractor.operator = instantiate(leaf)
        try:
            crossed = DetectionModule(module.evaluated, categories=module.categories, coco_eval=module.coco_eval)
            metrics[name] = _evaluate(cfg, crossed, data, split)
        finally:
            extractor.operator = own
    return metrics


def _evaluate(cfg: DictConfig, module: DetectionModule, data: pl.LightningDataModule, split: str) -> Any:
    options = {"callbacks": [], "plugins": cluster_plugins(), "enable_progress_bar": False}
    trainer = instantiate(cfg.trainer, logger=False, enable_checkpointing=False, **options)
    {"test": trainer.test, "val": trainer.validate}[split](module, datamodule=data, verbose=False)
    return module.metrics


def complete(run: Run, operators: list[str]) -> None:
    """Evaluates a finished run's best checkpoint with each of `operators` that its cross.json lacks, and adds them there."""
    known = run.cross()
    cfg = OmegaConf.load(run.folder / "config.yaml")
    check_targets_allowed(OmegaConf.to_container(cfg), run.folder / "config.yaml")
    cfg.cross = [name for name in operators if name not in known]
    if not cfg.cross:
        return
    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup()
    checkpoint = load_checkpoint(run.folder / "best.ckpt")
    check_categories(checkpoint, data.categories)
    detector = build_detector(cfg, num_classes=len(data.categories) + 1, pretrained=False)
    load_weights(detector, checkpoint)
    module = DetectionModule(detector, categories=data.categories)
    module.metrics = run.metrics
    write_cross(run.folder, known | cross_evaluate(cfg, module, data, "test" if data.test is not None else "val"))


def trained_with(run: Run) -> str:
    """The name in configs/roi of a run's operator: an arm may be named by other things as well, such as its rate."""
    own = next((path.stem for path in sorted((CONFIGS / "roi").glob("*.yaml")) if read_operator(path.stem) == run.config.roi), None)
    if own is None:
        raise ValueError(f"the operator of {run.folder} is none of configs/roi as it stands there: name those to test with, --operators")
    return own


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m roi_quantization.detection.runs.cross_evaluation", description="Completes the matrix of a sweep, and its report."
    )
    parser.add_argument("sweep", help="folder of the sweep")
    parser.add_argument("--operators", nargs="+", help="names in configs/roi to evaluate with; default: those that the sweep trained with")
    parser.add_argument("--threads", type=int, help="of the CPU; default: as many as PyTorch takes")
    arguments = parser.parse_args()
    silence_lightning()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        sweep = read_sweep(arguments.sweep)
        operators = arguments.operators or list(dict.fromkeys(trained_with(run) for run in sweep.finished))
        check_operators(operators)
        for run in tqdm(sweep.finished, unit="run"):
            complete(run, operators)
        print(write_report(arguments.sweep))
    except (OSError, ValueError) as error:
        sys.exit(f"cross: {error}")


if __name__ == "__main__":
    main()
