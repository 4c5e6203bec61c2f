"""Evaluation of weights with other operators than they were trained with.

`python -m roi_quantization.detection.runs.cross_evaluation runs/<sweep>` completes the matrix of a finished sweep from its checkpoints.
"""

import argparse
import sys
from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm import tqdm

from roi_quantization.detection.common.config_security import check_targets_allowed
from roi_quantization.detection.common.config_sources import choices, name_config_folder
from roi_quantization.detection.common.configuration import FAST_RCNN, read_configuration
from roi_quantization.detection.common.errors import ExpectedError, InputError
from roi_quantization.detection.common.renamed_targets import upgrade_config
from roi_quantization.detection.data.data_fingerprint import changed_splits, digest, recorded_digest
from roi_quantization.detection.evaluation.coco import CocoEvaluation
from roi_quantization.detection.model.build import build_detector, instantiate, read_operator
from roi_quantization.detection.model.lightning_module import DetectionModule
from roi_quantization.detection.report import write_report
from roi_quantization.detection.report.sweep import Run, read_sweep
from roi_quantization.detection.runs.checkpoint import check_categories, load_checkpoint, load_weights
from roi_quantization.detection.runs.results import Evaluation, write_cross
from roi_quantization.detection.runs.setup import silence_lightning
from roi_quantization.detection.runs.trainer import build_trainer
from roi_quantization.roi_heads.extractor import replaced_operator

OF_THE_RUN = ("callbacks", "logger")  # of `trainer`: they would write into the checkpoints and curves of the run


def check_operators(names: Sequence[str]) -> None:
    """Check that each name is an operator, before training starts.

    Raises:
        InputError: one is not.
    """
    for name in names:
        try:
            instantiate(read_operator(name))
        except InputError as error:
            raise InputError(f"cross: {error}") from error


def cross_evaluate(cfg: DictConfig, module: DetectionModule, data: pl.LightningDataModule, split: str) -> dict[str, Evaluation]:
    """Evaluate the module's weights on `split` with each operator of `cfg.cross`; with its own they have been already.

    Does not change the module or its last evaluation.
    """
    evaluations = {}
    for name in cfg.cross:
        leaf = read_operator(name)
        if leaf == cfg.roi:
            evaluations[name] = Evaluation(module.metrics, module.results)
            continue
        with replaced_operator(module.evaluated, instantiate(leaf)):
            crossed = DetectionModule(module.evaluated, categories=module.categories, coco_eval=module.coco_eval)
            evaluations[name] = _evaluate(cfg, crossed, data, split)
    return evaluations


def _evaluate(cfg: DictConfig, module: DetectionModule, data: pl.LightningDataModule, split: str) -> Evaluation:
    settings = OmegaConf.merge(cfg.trainer, {"enable_progress_bar": False})
    with open_dict(settings):
        for key in OF_THE_RUN:
            settings.pop(key, None)
    trainer = build_trainer(settings, enable_checkpointing=False)
    {"test": trainer.test, "val": trainer.validate}[split](module, datamodule=data, verbose=False)
    return Evaluation(module.metrics, module.results)


def complete(run: Run, operators: list[str]) -> None:
    """Evaluate a finished run's best checkpoint with each of `operators` that its cross.json lacks, and add them to it.

    Raises:
        InputError: the data are not those that the run recorded, so that the operators would be compared on different ones.
    """
    known = run.cross()
    config = without_training(OmegaConf.to_container(read_configuration(run.folder / "config.yaml")))
    check_targets_allowed(config, run.folder / "config.yaml")
    cfg = OmegaConf.create({"detector": FAST_RCNN} | upgrade_config(config))
    cfg.cross = [name for name in operators if name not in known]
    if not cfg.cross:
        return
    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup()
    recorded = recorded_digest(run.folder)
    if recorded is not None and (others := changed_splits(recorded, digest(data))):
        raise InputError(
            f"{cfg.data.root} has other images, annotations or proposals ({', '.join(others)}) than when {run.folder} was trained and "
            "evaluated, with which other operators would be compared. Put the old data back, or repeat the run"
        )
    checkpoint = load_checkpoint(run.folder / "best.ckpt")
    check_categories(checkpoint, data.categories)
    detector = build_detector(cfg, num_classes=len(data.categories) + 1, pretrained=False)
    load_weights(detector, checkpoint)
    if cfg.get("features") is not None:  # or the other operators would see maps that are padded otherwise
        instantiate(cfg.features).attach(detector, data)
    protocol = run.metrics.protocol  # its configuration may be of a version that had no other
    coco_eval = CocoEvaluation(iou_thresholds=protocol.iou_thresholds, areas=protocol.areas)
    module = DetectionModule(detector, categories=data.categories, coco_eval=coco_eval)
    module.metrics = run.metrics
    cross = cross_evaluate(cfg, module, data, "test" if data.test is not None else "val")
    write_cross(run.folder, known | {name: evaluation.metrics for name, evaluation in cross.items()})


def without_training(config: dict) -> dict:
    """Return a run's configuration without the parts that only train, and whose `_target_`s an evaluation therefore does not call."""
    config = {key: value for key, value in config.items() if key not in ("optim", "average", "logger")}
    trainer = {key: value for key, value in (config.get("trainer") or {}).items() if key not in OF_THE_RUN}
    return config | {"trainer": trainer}


def name_of(operator: DictConfig) -> str | None:
    """Return the name in configs/roi of an operator; None where it has other settings."""
    return next((name for name in choices("roi") if read_operator(name) == operator), None)


def operator_name(run: Run) -> str:
    """Return the name in configs/roi of a run's operator. The name of its arm may contain more, such as the learning rate."""
    own = name_of(run.config.roi)
    if own is None:
        raise InputError(f"the operator of {run.folder} is not in configs/roi. Name the operators to evaluate with: --operators")
    return own


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m roi_quantization.detection.runs.cross_evaluation",
        description="Evaluate all runs of a sweep with all its operators, and write the report again.",
    )
    parser.add_argument("sweep", help="folder of the sweep")
    parser.add_argument("--operators", nargs="+", help="names in configs/roi to evaluate with; default: those of the sweep")
    parser.add_argument("--config-dir", help="a folder of your own configurations; naming it permits the runs to call its _target_s")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's")
    arguments = parser.parse_args()
    silence_lightning()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        if arguments.config_dir:
            name_config_folder(arguments.config_dir)
        sweep = read_sweep(arguments.sweep)
        operators = arguments.operators or list(dict.fromkeys(operator_name(run) for run in sweep.finished))
        check_operators(operators)
        for run in tqdm(sweep.finished, unit="run"):
            complete(run, operators)
        print(write_report(arguments.sweep))
    except ExpectedError as error:
        sys.exit(f"cross_evaluation: {error}")


if __name__ == "__main__":
    main()
