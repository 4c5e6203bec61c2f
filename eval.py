"""Evaluate a checkpoint of train.py, or a detector of torchvision: `python eval.py ckpt=<run>/best.ckpt`. See `--help`."""

import roi_quantization  # noqa: F401 -- first: it says so where the package is not installed

# isort: split
import math
import sys

import hydra
from omegaconf import DictConfig

from roi_quantization.detection.common.configuration import CONFIGS, evaluated_split, path_setting
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.model.build import build_detector, instantiate
from roi_quantization.detection.model.lightning_module import DetectionModule
from roi_quantization.detection.runs.checkpoint import (
    check_categories,
    compose_with_checkpoint,
    load_checkpoint,
    load_weights,
    register_checkpoint,
)
from roi_quantization.detection.runs.command_line import log_into_run_folder, replace_null_choices
from roi_quantization.detection.runs.cross_evaluation import check_operators, cross_evaluate, name_of
from roi_quantization.detection.runs.distributed import share_run_dir_with_ranks, silence_other_ranks
from roi_quantization.detection.runs.errors import handle_errors
from roi_quantization.detection.runs.interruption import explain_errors
from roi_quantization.detection.runs.lock import exclusive_run_folder
from roi_quantization.detection.runs.memory import set_up_memory
from roi_quantization.detection.runs.results import report, report_cross, report_differences
from roi_quantization.detection.runs.run_folder import check_run_folder, replace_results
from roi_quantization.detection.runs.setup import set_up_run
from roi_quantization.detection.runs.trainer import build_trainer, check_limits


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Evaluate `cfg.ckpt`, or a detector that has weights of its own, on `cfg.split`, and fill `cfg.run_dir`.

    An earlier evaluation in this folder is replaced, once nothing is missing to begin this one.

    Returns:
        The metrics: `test/AP`, `test/AP50`, ... in percent, with the name of the split.

    Raises:
        InputError: the folder has a training or a prediction, or another process is running there; or the configuration is of another
            program.
    """
    cfg.run_dir = path_setting(cfg.run_dir, "run_dir")
    with exclusive_run_folder(cfg.run_dir):
        return _evaluate(cfg)


def _evaluate(cfg: DictConfig) -> dict[str, float]:
    check_run_folder(cfg.run_dir, "eval.py")
    if "split" not in cfg:
        raise InputError("this is a configuration of another program: it has no `split`. Compose one with compose('eval', [...], ckpt=...)")
    cfg.split = cfg.split or evaluated_split(cfg.data)
    if cfg.split not in ("test", "val", "train"):
        raise InputError(f"split={cfg.split}: expected test, val or train")
    split = "val" if cfg.split == "val" else "test"  # that of the data module
    run_dir = set_up_run(cfg, groups=("coco_eval",))
    check_limits(cfg.trainer, split)
    check_operators(cfg.cross)
    if cfg.ckpt is None and cfg.detector.get("weights") is None:
        raise InputError("no checkpoint is given. Set ckpt=<run>/best.ckpt, or detector=torchvision and detector.weights=COCO_V1")
    data = instantiate(cfg.data)
    data.prepare_data()
    if cfg.split == "train":
        data.test_on_train()
    data.setup({"test": "test", "val": "validate"}[split])
    dataset = getattr(data, split)
    if dataset is None:
        other = "val" if cfg.split == "test" else "test"
        raise InputError(f"split={cfg.split}: this data set has no such split. Set split={other}, or data.{cfg.split}")

    if cfg.ckpt is None:
        detector, source = build_detector(cfg, num_classes=None), cfg.detector.weights
        detector.match_categories(data.categories)
    else:
        checkpoint, source = load_checkpoint(path_setting(cfg.ckpt, "ckpt")), cfg.ckpt
        check_categories(checkpoint, data.categories)
        detector = build_detector(cfg, num_classes=len(data.categories) + 1, pretrained=False)
        load_weights(detector, checkpoint)

    module = DetectionModule(detector, categories=data.categories, coco_eval=instantiate(cfg.coco_eval))
    trainer = build_trainer(cfg.trainer, enable_checkpointing=False)
    share_run_dir_with_ranks(trainer, run_dir)
    if cfg.get("features") is not None:
        instantiate(cfg.features).attach(detector, data)
    run = {"test": trainer.test, "val": trainer.validate}[split]
    replace_results(cfg, run_dir, "eval.py")
    with explain_errors(run_dir):
        run(module, datamodule=data, verbose=False)
    cross = cross_evaluate(cfg, module, data, split)
    if trainer.is_global_zero:
        report_cross(cross, run_dir)
        report_differences(cross, dataset, module, name_of(cfg.roi) or "roi", run_dir)
        report(module, dataset, run_dir, title=f"{source} on {cfg.split}")
    return module.metrics.named(cfg.split)


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="eval")
def _main(cfg: DictConfig) -> float:
    silence_other_ranks()
    set_up_memory()
    metrics = {}
    with handle_errors("eval.py"):
        metrics = evaluate(compose_with_checkpoint(cfg))
    return next((value for name, value in metrics.items() if "/AP" in name), math.nan)  # the first is AP


def main() -> None:
    """Compose the configuration from the checkpoint's and the command line, and run."""
    sys.argv[1:] = log_into_run_folder(replace_null_choices(sys.argv[1:]))
    register_checkpoint(sys.argv[1:], "eval.py", is_optional=True)
    _main()


if __name__ == "__main__":
    main()
