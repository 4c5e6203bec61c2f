"""Predict what quantizing RoI coordinates costs on a data set, without training: `python predict_cost.py data=custom data.root=...`.

The ceiling needs annotations and proposals. `results=` of a run trained with RoIAlign adds the prediction of AP.
"""

import roi_quantization  # noqa: F401 -- first, because it says so where the package is not installed

# isort: split
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from roi_quantization.detection.alignment.misalignment import Operator, is_supported
from roi_quantization.detection.common.config_sources import choices
from roi_quantization.detection.common.configuration import (
    CONFIGS,
    check_count,
    check_groups,
    differences,
    evaluated_split,
    path_setting,
    read_configuration,
)
from roi_quantization.detection.common.errors import InputError, MissingFileError
from roi_quantization.detection.common.renamed_targets import upgrade_config
from roi_quantization.detection.data.coco import CocoDetection
from roi_quantization.detection.evaluation.coco import Metrics, evaluate
from roi_quantization.detection.evaluation.protocol import COCO_PROTOCOL, Protocol
from roi_quantization.detection.evaluation.results_file import read_metrics, read_results
from roi_quantization.detection.evaluation.sizes import resize_scales, resize_sides
from roi_quantization.detection.evaluation.statistics import Estimate
from roi_quantization.detection.model.build import instantiate, read_operator
from roi_quantization.detection.report.predicted_cost import Ceiling, Foreground, ceiling, gather_foreground, is_exact, predict
from roi_quantization.detection.report.predicted_cost_output import format_ceilings, format_prediction, plot_costs, summarize_cost
from roi_quantization.detection.runs.command_line import number_picture, replace_null_choices
from roi_quantization.detection.runs.errors import handle_errors

Ceilings = dict[int, dict[str, Ceiling]]  # stride -> operator -> ceiling
Predictions = dict[int, dict[str, dict[str, Estimate]]]  # stride -> operator -> metric -> difference to the reference


def predict_cost(cfg: DictConfig) -> tuple[Ceilings, Predictions]:
    """Print and draw the ceiling of each operator, and with `cfg.results` the predicted differences.

    Returns:
        The ceilings by stride and operator, and the predictions likewise, which are empty without results.
    """
    check_groups(cfg, ("data", "proposals"))
    check_count(cfg.output_size, "output_size")
    check_count(cfg.resamples, "resamples", least=2)
    strides, sides = check_strides(cfg.backbone.stride), resize_sides(cfg.data.get("eval_transform"))
    operators = load_operators([cfg.reference, *(name for name in cfg.operators if name != cfg.reference)])
    if cfg.reference not in operators:
        raise InputError(f"reference={cfg.reference}: where this operator samples is not known. Choose one of configs/roi.")
    if cfg.results is not None and not is_exact(operators[cfg.reference], cfg.output_size):
        raise InputError(
            f"reference={cfg.reference} with results={cfg.results}: this operator rounds RoIs or bins, so that its detections have the "
            "errors that would be added. Name the results of a run whose operator rounds nothing, such as reference=align."
        )
    dataset = load_split(cfg)
    scales = resize_scales(dataset.coco, *sides)
    results, image_ids, protocol = load_results(cfg, strides, dataset)

    foreground = gather_foreground(read_images(dataset, scales))
    halves = [stride // 2 for stride in strides if stride % 2 == 0 and stride // 2 not in strides]  # for the last sentence
    ceilings = {
        stride: {name: ceiling(foreground, operator, stride, cfg.output_size) for name, operator in operators.items()}
        for stride in tqdm([*strides, *halves], desc="ceilings", unit="stride", leave=False)
    }
    others = {name: operator for name, operator in operators.items() if name != cfg.reference}
    predictions: Predictions = {}
    if results:
        for stride in tqdm([*strides, *halves], desc="predictions", unit="stride", leave=False):
            resamples = cfg.resamples if stride in strides else 2  # of half the stride only the value is used
            predictions[stride] = predict(
                dataset.coco, results, image_ids, others, cfg.reference, stride, scales, cfg.output_size, resamples, protocol
            )

    print(f"{cfg.split}: {len(dataset)} images, {len(foreground.objects)} objects, proposals overlap {_covered(foreground):.1%} of them\n")
    for stride in strides:
        print(format_ceilings(ceilings[stride], cfg.reference, stride))
        if results:
            print(f"\n{format_prediction(predictions[stride], cfg.reference, stride, len(image_ids))}")
        print(f"\n{summarize_cost(ceilings, predictions, cfg.reference, stride)}\n")
    plot_costs({s: ceilings[s] for s in strides}, {s: predictions[s] for s in strides if results}, cfg.reference, cfg.picture)
    print(f"The picture: {cfg.picture}")
    return {s: ceilings[s] for s in strides}, {s: predictions[s] for s in strides if results}


def check_strides(strides: int | Sequence[int]) -> list[int]:
    """Return the strides as a list. InputError where one is no whole number above 0."""
    listed = list(strides) if OmegaConf.is_list(strides) else [strides]
    if not listed or not all(isinstance(stride, int) and stride > 0 for stride in listed):
        raise InputError(f"backbone.stride={strides}: expected a whole number of pixels above 0, or a list of them such as [16,32]")
    return listed


def load_operators(names: Sequence[str]) -> dict[str, Operator]:
    """Instantiate operators of `configs/roi`. Those whose sampling is unknown are left out with a message."""
    operators = {}
    for name in names:
        operator = instantiate(read_operator(name))
        if is_supported(operator):
            operators[name] = operator
        else:
            print(f"{name} is left out: where this operator samples is not known.")
    return operators


def load_split(cfg: DictConfig) -> CocoDetection:
    """Return the data set of `cfg.split`; null: `evaluated_split`."""
    cfg.split = cfg.split or evaluated_split(cfg.data)
    if cfg.split not in ("val", "test"):
        raise InputError(f"split={cfg.split}: expected test or val")
    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup({"val": "validate", "test": "test"}[cfg.split])
    dataset = getattr(data, cfg.split)
    if dataset is None:
        raise InputError(f"split={cfg.split}: this data set has no such split. Set data.{cfg.split}.")
    return dataset


def read_images(dataset: CocoDetection, scales: dict[int, float] | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield proposals, objects and labels of each image in pixels of the network's input."""
    for index, record in enumerate(tqdm(dataset.records, desc="proposals", unit="image", leave=False)):
        boxes, labels, _ = dataset.ground_truth(index)
        scale = 1.0 if scales is None else scales[record.id]
        yield dataset.proposals(record) * scale, boxes * scale, labels


def load_results(cfg: DictConfig, strides: list[int], dataset: CocoDetection) -> tuple[list[dict], list[int], Protocol]:
    """Read `cfg.results`, the ids of the images that they are of, and how they were evaluated.

    Raises:
        MissingFileError: there is no such file.
        InputError: it holds no results, its run had another operator, stride, image size or number of bins than asked for here, or
            their AP on this split is not that of metrics.json. Or a checkpoint is given in its place.
    """
    if cfg.ckpt is not None:
        raise InputError(
            f"ckpt={cfg.ckpt}: a prediction needs the detections of a checkpoint. Evaluate it with `python eval.py ckpt={cfg.ckpt} "
            f"split={cfg.split} hydra.run.dir=runs/evaluated` and set results=runs/evaluated"
        )
    if cfg.results is None:
        return [], dataset.image_ids, COCO_PROTOCOL
    path = Path(path_setting(cfg.results, "results"))
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise MissingFileError(f"results={cfg.results}: there is no such file. Name the results.json of a run of train.py or eval.py.")
    results, evaluated = read_results(path), read_metrics(path)
    if not results:
        raise InputError(f"results={path} holds no results. Expected the results.json of a run that detects something.")
    if evaluated is not None:
        evaluated = replace(evaluated, of=len(dataset))  # not of the run's own subset
    image_ids = dataset.image_ids if evaluated is None or evaluated.image_ids is None else list(evaluated.image_ids)
    unknown = {result["image_id"] for result in results}.union(image_ids) - set(dataset.image_ids)
    if unknown:
        raise InputError(
            f"results={path} has results of {len(unknown)} images that are not in split={cfg.split} of this data set, the first is image "
            f"{min(unknown, key=str)}. Choose the data and split that they were made on."
        )
    check_operator(cfg, path)
    check_run(cfg, path.parent / "config.yaml", strides)
    if evaluated is not None:
        check_metrics(cfg, path, results, image_ids, evaluated, dataset)
        for label in evaluated.labels:
            print(f"Of the results: {label}")
    return results, image_ids, COCO_PROTOCOL if evaluated is None else evaluated.protocol


def check_operator(cfg: DictConfig, path: Path) -> None:
    """Refuse results_<operator>.json of a cross-evaluation, beside which the configuration is that of another operator."""
    name = path.stem.removeprefix("results_")
    if name != path.stem and name in choices("roi") and read_operator(name) != read_operator(cfg.reference):
        raise InputError(
            f"results={path} are of weights that were tested with {name}, and not of reference={cfg.reference}. Name the results.json of a "
            f"run with {cfg.reference}."
        )


def check_metrics(
    cfg: DictConfig, path: Path, results: list[dict], image_ids: list[int], recorded: Metrics, dataset: CocoDetection
) -> None:
    """Compare metrics.json with the metrics of the results on this split.

    Raises:
        InputError: a result has a category that the split lacks, or the metrics differ.
    """
    wrong = (
        f"They are of another split than {cfg.split}, of other data than data.root={cfg.data.root} or other data.classes, or one of "
        f"{path.name}, metrics.json and the annotations was changed. Set split and data as the run had them, or evaluate it again."
    )
    try:
        found = evaluate(dataset.coco, results, image_ids, recorded.max_detections, protocol=recorded.protocol).stats
    except InputError as error:
        raise InputError(f"results={path}: {error}. {wrong}") from error
    if metric := recorded.first_difference({name: found[name] for name in ("AP", "AP50", "AP75") if name in recorded.stats}):
        raise InputError(
            f"results={path} have {metric} {found[metric]:.6g} here, and {recorded.stats[metric]:.6g} in metrics.json beside them. {wrong}"
        )


def check_run(cfg: DictConfig, path: Path, strides: list[int]) -> None:
    """Compare this prediction with the configuration of the run that made the results, where it lies beside them."""
    if not path.is_file():
        return
    run = read_configuration(path)
    stride = OmegaConf.select(run, "backbone.stride")
    if run.get("backbone") is None:
        raise InputError(
            f"results={cfg.results} are of a detector without a backbone of one stride, as a pyramid. Name those of a run with one."
        )
    if stride is None:  # of a backbone of one's own
        print(f"Of the results: {path} does not say the stride of its backbone. It is taken to be backbone.stride={cfg.backbone.stride}.")
    elif stride not in strides:
        raise InputError(f"results={cfg.results} are of a run at stride {stride}. Set backbone.stride={stride}.")
    try:
        sides = resize_sides(OmegaConf.select(run, "data.eval_transform"))
    except InputError as error:
        raise InputError(f"results={cfg.results}: of their run, {error}.") from error
    for name, side, here in zip(("short_side", "max_side"), sides, resize_sides(cfg.data.get("eval_transform")), strict=True):
        if side != here:
            raise InputError(f"results={cfg.results} are of a run with data.eval_transform.{name}={side}, here it is {here}. Set the same.")
    bins = OmegaConf.select(run, "head.extractor.output_size")
    if bins not in (None, cfg.output_size):
        raise InputError(
            f"results={cfg.results} are of a run with {bins} bins per side, here there are {cfg.output_size}. Set output_size={bins}."
        )
    if not has_operator(run, cfg.reference):
        raise InputError(
            f"results={cfg.results} are of a run with another operator than reference={cfg.reference}. Name those of {cfg.reference}."
        )
    trained = None if run.get("ckpt") is None else Path(path_setting(run.ckpt, "ckpt")).parent / "config.yaml"
    if trained is not None and trained.is_file() and not has_operator(read_configuration(trained), cfg.reference):
        raise InputError(
            f"results={cfg.results} are of weights that were trained in {trained.parent} with another operator than "
            f"reference={cfg.reference}, and only tested with it. Name the results of a run that was trained with {cfg.reference}."
        )


def has_operator(run: DictConfig, name: str) -> bool:
    """Whether the operator of a run, perhaps of an earlier version, is the named one. True where its configuration has none."""
    if run.get("roi") is None:
        return True
    own, named = (OmegaConf.to_container(roi) for roi in (run.roi, read_operator(name)))
    return not differences(upgrade_config({"roi": own}), {"roi": named})


def _covered(foreground: Foreground) -> float:
    return len(set(foreground.object_of.tolist())) / max(len(foreground.objects), 1)


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="predict_cost")
def _main(cfg: DictConfig) -> None:
    with handle_errors("predict_cost.py"):
        number_picture(cfg)
        predict_cost(cfg)


def main() -> None:
    """Compose the configuration from the command line, and run."""
    sys.argv[1:] = replace_null_choices(sys.argv[1:])
    _main()


if __name__ == "__main__":
    main()
