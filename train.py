"""Train and evaluate a Fast R-CNN with the RoI operator of your choice: `python train.py roi=align`. `--help` tells what can be chosen."""

import roi_quantization  # noqa: F401 -- first, because it says so where the package is not installed

# isort: split
import logging

import hydra
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint

from roi_quantization.detection.configuration import CONFIGS
from roi_quantization.detection.data.data_fingerprint import DataFingerprint
from roi_quantization.detection.data.loading_time import LoadingTimeMonitor
from roi_quantization.detection.model.build import build_detector, instantiate
from roi_quantization.detection.model.lightning_module import DetectionModule
from roi_quantization.detection.runs.cross_evaluation import check_operators, cross_evaluate
from roi_quantization.detection.runs.distributed import cluster_plugins, share_run_dir_with_ranks, silence_other_ranks
from roi_quantization.detection.runs.errors import exit_with_message
from roi_quantization.detection.runs.interruption import GracefulStop, TerminateOnNonFiniteLoss, explain_errors, reraise_signal
from roi_quantization.detection.runs.lock import exclusive_run_folder
from roi_quantization.detection.runs.resume import checkpoint_to_resume
from roi_quantization.detection.runs.run import check_metric, draw_curves, progress_bar, report, report_cross, set_up_run
from roi_quantization.detection.runs.sweep import run_in_sweep
from roi_quantization.detection.runs.training_checkpoints import AtomicCheckpointIO, PeriodicCheckpoint

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, float]:
    """Trains, evaluates the best checkpoint on the test split (on val where there is none), and fills `cfg.run_dir`.

    Returns:
        The metrics by name: `cfg.optimized_metric` of the best checkpoint, and `test/AP`, `test/AP50`, ... in percent.
    """
    check_operators(cfg.cross)
    resumed = checkpoint_to_resume(cfg)
    run_dir = set_up_run(cfg)
    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup()
    objects = 0 if data.val is None else data.val.num_objects
    mode = check_metric(cfg.optimized_metric, validates=data.val is not None, objects=objects)
    module = DetectionModule(
        build_detector(cfg, num_classes=len(data.categories) + 1),
        **instantiate(cfg.optim),
        categories=data.categories,
        config=OmegaConf.to_container(cfg),  # with its interpolations, so that eval.py can change one part and the others follow
        seed=cfg.seed,
        coco_eval=instantiate(cfg.coco_eval),
        average=instantiate(cfg.get("average")),
    )

    best = ModelCheckpoint(
        run_dir, filename="best", monitor=cfg.optimized_metric, mode=mode, save_weights_only=True, enable_version_counter=False
    )
    periodic = PeriodicCheckpoint(run_dir, cfg.checkpoint.every_n_steps, cfg.checkpoint.keep)
    fingerprint = DataFingerprint(data, required=cfg.checkpoint.same_data)
    callbacks = [fingerprint, periodic, GracefulStop(), TerminateOnNonFiniteLoss(run_dir, cfg.seed), LoadingTimeMonitor()]
    callbacks += progress_bar(cfg.trainer)
    if data.val is not None:
        callbacks.append(best)
    loggers = list(instantiate(cfg.logger).values())
    trainer = instantiate(cfg.trainer, logger=loggers, callbacks=callbacks, plugins=[AtomicCheckpointIO(), *cluster_plugins()])
    share_run_dir_with_ranks(trainer, run_dir)
    with explain_errors(run_dir):
        trainer.fit(module, data, ckpt_path=resumed)
        trainer.save_checkpoint(run_dir / "last.ckpt")
    periodic.clear(trainer)
    chosen = best.best_model_path
    if not chosen:
        chosen = run_dir / "best.ckpt"
        trainer.save_checkpoint(chosen, weights_only=True)
        if data.val is not None:
            log.warning("Training ended before the first validation: best.ckpt holds the last weights.")

    split = "test" if data.test is not None else "val"
    evaluate = trainer.test if split == "test" else trainer.validate
    with explain_errors(run_dir):
        evaluate(module, datamodule=data, ckpt_path=chosen, verbose=False)

    cross = cross_evaluate(cfg, module, data, split)
    if trainer.is_global_zero:
        draw_curves(run_dir)
        report_cross(cross, run_dir)
        report(module, getattr(data, split), run_dir, title=f"{chosen} on {split}")
    score = float("nan") if best.best_model_score is None else float(best.best_model_score)
    return {cfg.optimized_metric: score} | {f"{split}/{name}": value for name, value in module.metrics.stats.items()}


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(cfg: DictConfig) -> float:
    silence_other_ranks()
    with exit_with_message("train.py"), reraise_signal():
        if cfg.arm is not None:
            metrics = run_in_sweep(train, cfg)
        else:
            with exclusive_run_folder(cfg.run_dir):
                metrics = train(cfg)
    return metrics[cfg.optimized_metric]


if __name__ == "__main__":
    main()
