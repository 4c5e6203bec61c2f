"""Train and evaluate a detector with the RoI operator of your choice: `python train.py roi=align`. `--help` lists the choices."""

import roi_quantization  # noqa: F401 -- first: it says so where the package is not installed

# isort: split
import logging
import math
import sys

import hydra
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint

from roi_quantization.detection.common.configuration import CONFIGS, evaluated_split, path_setting
from roi_quantization.detection.common.errors import InputError, named_setting
from roi_quantization.detection.data.data_fingerprint import DataFingerprint
from roi_quantization.detection.data.loading_time import LoadingTimeMonitor
from roi_quantization.detection.model.build import build_detector, instantiate
from roi_quantization.detection.model.lightning_module import DetectionModule
from roi_quantization.detection.runs.checkpoint import load_checkpoint
from roi_quantization.detection.runs.command_line import log_into_run_folder, replace_null_choices
from roi_quantization.detection.runs.cross_evaluation import check_operators, cross_evaluate
from roi_quantization.detection.runs.distributed import share_run_dir_with_ranks, silence_other_ranks
from roi_quantization.detection.runs.errors import handle_errors
from roi_quantization.detection.runs.fine_tuning import initialize_from
from roi_quantization.detection.runs.interruption import GracefulStop, TerminateOnNonFiniteLoss, explain_errors, reraise_signal
from roi_quantization.detection.runs.last_validation import ValidateAtEnd
from roi_quantization.detection.runs.lock import exclusive_run_folder
from roi_quantization.detection.runs.memory import set_up_memory
from roi_quantization.detection.runs.results import draw_curves, report, report_cross
from roi_quantization.detection.runs.resume import check_fits, checkpoint_to_resume
from roi_quantization.detection.runs.run_folder import check_run_folder, replace_results, write_config
from roi_quantization.detection.runs.setup import check_metric, set_up_run
from roi_quantization.detection.runs.sweep import run_in_sweep
from roi_quantization.detection.runs.trainer import (
    build_loggers,
    build_trainer,
    check_limits,
    check_trains_as_configured,
    closed_loggers,
    log_configuration,
    warn_of_partial_validation,
)
from roi_quantization.detection.runs.training_checkpoints import AtomicCheckpointIO, PeriodicCheckpoint

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, float]:
    """Train, evaluate the best checkpoint on the test split (on val where there is none), and fill `cfg.run_dir`.

    Returns:
        The metrics by name: `cfg.optimized_metric` of the best checkpoint, and `test/AP`, `test/AP50`, ... in percent.

    Raises:
        InputError: the configuration is of another program; or a setting or a file is wrong, and the message names it.
    """
    cfg.run_dir = path_setting(cfg.run_dir, "run_dir")
    with exclusive_run_folder(cfg.run_dir):
        return _train(cfg)


def _train(cfg: DictConfig) -> dict[str, float]:
    check_operators(cfg.cross)
    check_run_folder(cfg.run_dir, "train.py")
    if "optim" not in cfg:
        raise InputError("this is a configuration of another program: it has no `optim`. Compose one with compose('train', [...])")
    resumed = checkpoint_to_resume(cfg)
    run_dir = set_up_run(cfg, groups=("optim", "coco_eval"))
    check_trains_as_configured(cfg.trainer)
    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup()
    split = evaluated_split(cfg.data)
    if getattr(data, split) is None:
        raise InputError("the data have no val and no test split, so nothing would be evaluated. Set data.val or data.test")
    check_limits(cfg.trainer, split)
    if data.val is not None:
        warn_of_partial_validation(cfg.trainer)
    objects = 0 if data.val is None else data.val.num_objects
    coco_eval = instantiate(cfg.coco_eval)
    detector = build_detector(cfg, num_classes=len(data.categories) + 1, pretrained=cfg.init_from is None)
    mode = check_metric(cfg.optimized_metric, data.val is not None, objects, detector.has_evaluation_losses, data.masks)
    if cfg.init_from is not None and resumed is None:
        initialize_from(detector, path_setting(cfg.init_from, "init_from"), data.categories)
    with named_setting("average"):
        average = instantiate(cfg.get("average"))
    module = DetectionModule(
        detector,
        **instantiate(cfg.optim),
        categories=data.categories,
        config=OmegaConf.to_container(cfg),  # with its interpolations: in eval.py the others follow when one part changes
        seed=cfg.seed,
        coco_eval=coco_eval,
        average=average,
    )

    monitor = coco_eval.protocol.logged(cfg.optimized_metric)
    best = ModelCheckpoint(run_dir, filename="best", monitor=monitor, mode=mode, save_weights_only=True, enable_version_counter=False)
    periodic = PeriodicCheckpoint(run_dir, cfg.checkpoint.every_n_steps, cfg.checkpoint.keep)
    fingerprint = DataFingerprint(data, required=cfg.checkpoint.same_data)
    if resumed is not None:
        check_fits(resumed, module, fingerprint)
    stop = GracefulStop()
    callbacks = [fingerprint, periodic, stop, TerminateOnNonFiniteLoss(run_dir, cfg.seed, stop), LoadingTimeMonitor()]
    if data.val is not None:
        callbacks += [best, ValidateAtEnd()]
    trainer = build_trainer(cfg.trainer, callbacks, [AtomicCheckpointIO()], build_loggers(cfg.get("logger")))
    share_run_dir_with_ranks(trainer, run_dir)
    if cfg.get("features") is not None:  # which takes long, so all that can be refused was refused before
        if resumed is not None:  # the maps are those of its weights, which Lightning loads afterwards
            module.load_state_dict(load_checkpoint(resumed)["state_dict"])
        instantiate(cfg.features).attach(detector, data)
    if resumed is None:
        replace_results(cfg, run_dir, "train.py")
    else:  # a finished run that is trained on keeps its results until the first step
        write_config(cfg, run_dir)
    with closed_loggers(trainer):
        log_configuration(trainer.loggers, cfg)
        with explain_errors(run_dir):
            trainer.fit(module, data, ckpt_path=resumed)
            trainer.save_checkpoint(run_dir / "last.ckpt")
        periodic.clear(trainer)
        if not periodic.has_trained:
            log.warning("Training was complete at step %d: nothing was trained. Set a larger trainer.max_epochs", trainer.global_step)
        chosen = best.best_model_path
        if not chosen:
            chosen = run_dir / "best.ckpt"
            trainer.save_checkpoint(chosen, weights_only=True)
            if data.val is not None and periodic.has_trained:
                log.warning("Nothing was validated: best.ckpt holds the last weights.")

        module.metrics = None  # those of a validation
        evaluate = trainer.test if split == "test" else trainer.validate
        with explain_errors(run_dir):
            evaluate(module, datamodule=data, ckpt_path=chosen, verbose=False)

    cross = cross_evaluate(cfg, module, data, split)
    if trainer.is_global_zero:
        fingerprint.write(run_dir)
        report_cross(cross, run_dir)
        report(module, getattr(data, split), run_dir, title=f"{chosen} on {split}")
        draw_curves(run_dir, trainer.log_every_n_steps)
    score = math.nan if best.best_model_score is None else float(best.best_model_score)
    return {cfg.optimized_metric: score} | module.metrics.named(split)


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def _main(cfg: DictConfig) -> float:
    silence_other_ranks()
    set_up_memory()
    metrics = {}
    with handle_errors("train.py"), reraise_signal():
        metrics = train(cfg) if cfg.arm is None else run_in_sweep(train, cfg)
    return metrics.get(cfg.optimized_metric, math.nan)


def main() -> None:
    """Compose the configuration from the command line, and run."""
    sys.argv[1:] = log_into_run_folder(replace_null_choices(sys.argv[1:]))
    _main()


if __name__ == "__main__":
    main()
