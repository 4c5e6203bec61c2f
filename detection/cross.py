"""Train with one operator, test with another."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from detection.build import instantiate
from detection.evaluation.coco import Metrics
from detection.module import DetectionModule

OPERATORS = Path(__file__).resolve().parents[1] / "configs" / "roi"


def read_operator(name: str) -> DictConfig:
    """configs/roi/<name>.yaml; ValueError that lists the choices where there is none."""
    path = OPERATORS / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(
            f"cross: there is no operator {name}; choose from {', '.join(sorted(path.stem for path in OPERATORS.glob('*.yaml')))}"
        )
    return OmegaConf.load(path)


def cross_evaluate(cfg: DictConfig, module: DetectionModule, data: pl.LightningDataModule, split: str) -> dict[str, Metrics]:
    """Metrics of the module's weights on `split` with each operator of `cfg.cross`; `module.metrics` where that is its own.

    The module and its last evaluation are left as they were.
    """
    metrics = {}
    extractor = module.detector.roi_heads.box_roi_pool
    own = extractor.operator
    for name in cfg.cross:
        leaf = read_operator(name)
        if leaf == cfg.roi:
            metrics[name] = module.metrics
            continue
        extractor.operator = instantiate(leaf)
        try:
            metrics[name] = _evaluate(cfg, DetectionModule(module.detector, categories=module.categories), data, split)
        finally:
            extractor.operator = own
    return metrics


def _evaluate(cfg: DictConfig, module: DetectionModule, data: pl.LightningDataModule, split: str) -> Any:
    trainer = instantiate(cfg.trainer, logger=False, callbacks=[], enable_checkpointing=False, enable_progress_bar=False)
    {"test": trainer.test, "val": trainer.validate}[split](module, datamodule=data, verbose=False)
    return module.metrics
