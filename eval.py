"""Evaluate a checkpoint of train.py: `python eval.py ckpt=runs/<run>/best.ckpt`, also with another operator: `roi=pool`. See `--help`."""

import sys
from pathlib import Path

import hydra
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from detection.build import build_detector
from detection.checkpoint import check_categories, load_checkpoint, load_weights, offer_parts
from detection.module import DetectionModule
from detection.progress import TimeLeft
from detection.run import check_accelerator, report


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Evaluates `cfg.ckpt` on `cfg.split` and fills `cfg.run_dir`. Returns the metrics: `test/AP`, `test/AP50`, ... in percent."""
    check_accelerator(cfg.trainer)
    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)

    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup({"test": "test", "val": "validate"}[cfg.split])
    dataset = getattr(data, cfg.split)
    if dataset is None:
        raise ValueError(f"split={cfg.split}: this data set has none")

    checkpoint = load_checkpoint(cfg.ckpt)
    check_categories(checkpoint, data.categories)
    cfg.backbone.weights = None  # the checkpoint has them
    detector = build_detector(cfg, num_classes=len(data.categories) + 1)
    load_weights(detector, checkpoint)

    module = DetectionModule(detector, categories=data.categories)
    trainer = instantiate(cfg.trainer, logger=False, callbacks=[TimeLeft()], enable_checkpointing=False)
    run = {"test": trainer.test, "val": trainer.validate}[cfg.split]
    run(module, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        report(module, dataset, run_dir, title=f"{cfg.split}, {cfg.ckpt}")
    return {f"{cfg.split}/{name}": value for name, value in module.metrics.stats.items()}


@hydra.main(version_base="1.3", config_path="configs", config_name="eval")
def main(cfg: DictConfig) -> float:
    return evaluate(cfg)[f"{cfg.split}/AP"]


if __name__ == "__main__":
    # The checkpoint holds the configuration that the command line changes, so it is read before Hydra composes.
    path = next((argument.removeprefix("ckpt=") for argument in sys.argv[1:] if argument.startswith("ckpt=")), None)
    if path is not None:
        try:
            offer_parts(load_checkpoint(path)["config"])
        except (FileNotFoundError, ValueError) as error:
            sys.exit(f"eval.py: {error}")
    elif not {"-h", "--help", "--hydra-help", "--version"} & set(sys.argv):
        sys.exit("eval.py: which checkpoint? Say it with ckpt=<run>/best.ckpt; `python eval.py --help` shows what else can be said")
    main()
