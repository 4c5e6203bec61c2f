"""Evaluate a checkpoint of train.py: `python eval.py ckpt=runs/<run>/best.ckpt`, also with another operator: `roi=pool`. See `--help`."""

import roi_quantization  # noqa: F401 -- first, because it says so where the package is not installed

# isort: split
import sys

import hydra
from omegaconf import DictConfig

from roi_quantization.detection.configuration import CONFIGS
from roi_quantization.detection.model.build import build_detector, instantiate
from roi_quantization.detection.model.lightning_module import DetectionModule
from roi_quantization.detection.runs.checkpoint import check_categories, load_checkpoint, load_weights, offer_checkpoint
from roi_quantization.detection.runs.distributed import before_launch, cluster_plugins, quiet_others
from roi_quantization.detection.runs.errors import message_alone
from roi_quantization.detection.runs.interruption import told_plainly
from roi_quantization.detection.runs.run import begin, progress_bar, report


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Evaluates `cfg.ckpt` on `cfg.split` and fills `cfg.run_dir`. Returns the metrics: `test/AP`, `test/AP50`, ... in percent."""
    if cfg.split not in ("test", "val"):
        raise ValueError(f"split={cfg.split}: expected test or val")
    run_dir = begin(cfg)
    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup({"test": "test", "val": "validate"}[cfg.split])
    dataset = getattr(data, cfg.split)
    if dataset is None:
        raise ValueError(f"split={cfg.split}: this data set has none")

    checkpoint = load_checkpoint(cfg.ckpt)
    check_categories(checkpoint, data.categories)
    detector = build_detector(cfg, num_classes=len(data.categories) + 1, pretrained=False)
    load_weights(detector, checkpoint)

    module = DetectionModule(detector, categories=data.categories, coco_eval=instantiate(cfg.coco_eval))
    options = {"callbacks": progress_bar(cfg.trainer), "plugins": cluster_plugins()}
    trainer = instantiate(cfg.trainer, logger=False, enable_checkpointing=False, **options)
    before_launch(trainer, run_dir)
    run = {"test": trainer.test, "val": trainer.validate}[cfg.split]
    with told_plainly(run_dir):
        run(module, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        report(module, dataset, run_dir, title=f"{cfg.ckpt} on {cfg.split}")
    return {f"{cfg.split}/{name}": value for name, value in module.metrics.stats.items()}


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="eval")
def main(cfg: DictConfig) -> float:
    quiet_others()
    with message_alone("eval.py"):
        return evaluate(cfg)[f"{cfg.split}/AP"]


if __name__ == "__main__":
    offer_checkpoint(sys.argv[1:], "eval.py")
    main()
