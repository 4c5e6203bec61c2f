"""Train and evaluate a Fast R-CNN with the RoI operator of your choice: `python train.py roi=align`. `--help` tells what can be chosen."""

import logging
from pathlib import Path

import hydra
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint

from detection.build import build_detector
from detection.evaluation.figures import curves
from detection.module import DetectionModule
from detection.progress import TimeLeft
from detection.run import check_accelerator, report

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, float]:
    """Trains, evaluates the best checkpoint on the test split (on val where there is none), and fills `cfg.run_dir`.

    Returns:
        The metrics by name: `cfg.optimized_metric` of the best checkpoint, and `test/AP`, `test/AP50`, ... in percent.
    """
    check_accelerator(cfg.trainer)
    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)

    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup()
    module = DetectionModule(
        build_detector(cfg, num_classes=len(data.categories) + 1),
        **instantiate(cfg.optim),
        categories=data.categories,
        config=OmegaConf.to_container(cfg),  # with its interpolations, so that eval.py can change one part and the others follow
    )

    checkpoints = ModelCheckpoint(
        run_dir, filename="best", monitor=cfg.optimized_metric, mode="max", save_last=True, enable_version_counter=False
    )
    trainer = instantiate(cfg.trainer, logger=list(instantiate(cfg.logger).values()), callbacks=[checkpoints, TimeLeft()])
    trainer.fit(module, data, ckpt_path=cfg.resume)

    split = "test" if data.test is not None else "val"
    evaluate = trainer.test if split == "test" else trainer.validate
    evaluate(module, datamodule=data, ckpt_path=checkpoints.best_model_path, verbose=False)

    if trainer.is_global_zero:
        if (run_dir / "metrics.csv").is_file():
            curves(run_dir / "metrics.csv", run_dir / "curves.png")
        report(module, getattr(data, split), run_dir, title=f"{split}, {checkpoints.best_model_path}")
    best = {cfg.optimized_metric: float(checkpoints.best_model_score)}
    return best | {f"{split}/{name}": value for name, value in module.metrics.stats.items()}


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> float:
    return train(cfg)[cfg.optimized_metric]


if __name__ == "__main__":
    main()
