"""Read a sweep's folder of finished, failed and missing runs.

<sweep>/<arm>_seed<seed>/config.yaml    what was run: arm, seed, backbone.stride, data ...
                         metrics.json   of the test split. Written last: a run that has it is finished
                         results.json   detections, each with the `proposal` that it was regressed from
                         cross.json     metrics of the same weights with other operators
                         failed.txt     traceback of a failed run
<sweep>/multirun.yaml                   Hydra's plan
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from pycocotools.coco import COCO

from roi_quantization.detection.common.configuration import (
    differences_beside_seeds,
    evaluated_split,
    flatten,
    path_setting,
    read_configuration,
    shorten,
    sweep_lines,
)
from roi_quantization.detection.common.errors import InputError, MissingFileError
from roi_quantization.detection.common.files import read_json
from roi_quantization.detection.common.renamed_targets import upgrade_config
from roi_quantization.detection.data.annotations import as_coco, choose_classes, choose_images, read_instances, restrict
from roi_quantization.detection.data.data_fingerprint import changed_splits, recorded_digest
from roi_quantization.detection.evaluation.coco import Metrics
from roi_quantization.detection.evaluation.protocol import SEGM, Protocol
from roi_quantization.detection.evaluation.results_file import read_results
from roi_quantization.detection.evaluation.sizes import resize_scales, resize_sides

# settings that decide, beside the operator, which cells of a feature map belong to a box
GEOMETRY = ("backbone.stride", "data.eval_transform.short_side", "data.eval_transform.max_side", "head.extractor.output_size")
OF_THE_ARM = re.compile(r"(roi|arm|cross)\b|.*\boperator\b")  # settings in which arms are meant to differ
_FOLDER = re.compile(r"(?P<arm>.+)_seed(?P<seed>\d+)")


@dataclass(frozen=True)
class Run:
    """One arm trained with one seed.

    Attributes:
        metrics: of the test split, or of val where the data has no test. None while the run is not finished.
        error: traceback of a failed run, else None.
    """

    arm: str
    seed: int
    folder: Path
    metrics: Metrics | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.metrics is not None

    @property
    def failed(self) -> bool:
        return not self.finished and self.error is not None

    @cached_property
    def config(self) -> DictConfig:
        path = self.folder / "config.yaml"
        if not path.is_file():
            raise MissingFileError(f"{path} does not exist. Is {self.folder} the folder of a run of train.py?")
        config = read_configuration(path)
        for key in ("data", "trainer"):  # the first and one of the last in it
            if key not in config:
                raise InputError(f"{path} has no {key}, which every run of train.py has. Was it truncated? Restore it, or repeat the run.")
        for key, said in (("arm", self.arm), ("seed", self.seed)):
            if config.get(key) is not None and str(config[key]) != str(said):  # arm=10 is a number there
                raise InputError(f"{path} has {key}={config[key]}, but the folder says {said}. Was it renamed or copied?")
        return config

    @property
    def stride(self) -> int | None:
        """Pixels of the network's input per cell. None of a detector with a pyramid of maps, and where the configuration does not say."""
        stride = OmegaConf.select(self.config, "backbone.stride")
        return None if stride is None else int(stride)

    def results(self) -> list[dict]:
        """Read the COCO results of the evaluated split, with boxes in pixels of the original images."""
        return read_results(self.folder / "results.json")

    def cross(self) -> dict[str, Metrics]:
        """Read the metrics of the same weights with other operators: operator -> metrics. Empty without cross-evaluation."""
        path = self.folder / "cross.json"
        if not path.is_file():
            return {}
        cross = {arm: _metrics(path, content) for arm, content in read_json(path, dict).items()}
        for arm, metrics in cross.items():
            if self.metrics is not None and metrics.protocol != self.metrics.protocol:
                both = f"{arm}: {metrics.protocol.describe()}; the run itself: {self.metrics.protocol.describe()}"
                raise InputError(f"{path}: the operators were evaluated differently ({both}). Remove it, and repeat the cross-evaluation.")
        return cross


@dataclass(frozen=True)
class Sweep:
    """Runs that have a folder, with arms and seeds in the order of the plan, unplanned ones last.

    Attributes:
        planned: (arm, seed) of each run that is expected.
    """

    folder: Path
    runs: tuple[Run, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    planned: tuple[tuple[str, int], ...]

    @property
    def finished(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.finished)

    @property
    def failed(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.failed)

    @property
    def missing(self) -> tuple[tuple[str, int], ...]:
        """(arm, seed) of every planned run that is neither finished nor failed: not started, running, or killed."""
        settled = {(run.arm, run.seed) for run in self.runs if run.finished or run.failed}
        return tuple(pair for pair in self.planned if pair not in settled)

    @cached_property
    def differing_settings(self) -> dict[str, list[str]]:
        """Setting beside the operator, `GEOMETRY` and seeds -> its values, where arms differ in it. Empty where they were trained alike."""
        configs = [upgrade_config(OmegaConf.to_container(run.config)) for run in {run.arm: run for run in self.finished}.values()]
        found = {text.partition(" ")[0]: None for config in configs[1:] for text in differences_beside_seeds(configs[0], config)}
        settings = [dict(flatten(config)) for config in configs]
        return {
            key: list(dict.fromkeys(str(one.get(key, "none")) for one in settings))
            for key in found
            if key not in GEOMETRY and not OF_THE_ARM.match(key)
        }

    @cached_property
    def differing_seeds(self) -> dict[str, str]:
        """Arm -> which of its finished runs differ in more than their seeds, and in what. Empty where none do."""
        first: dict[str, Run] = {}
        found = {}
        for run in self.finished:
            before, now = (upgrade_config(OmegaConf.to_container(one.config)) for one in (first.setdefault(run.arm, run), run))
            if differ := differences_beside_seeds(before, now):
                found.setdefault(run.arm, f"{shorten(differ)} (seed {first[run.arm].seed} and seed {run.seed})")
        return found

    @cached_property
    def changed_data(self) -> list[str]:
        """Splits that changed from one finished run to another with the same settings of the data. Earlier versions did not record them."""
        first: list[tuple[dict, dict[str, str]]] = []  # settings, and digests of the splits
        found: dict[str, None] = {}
        for run in self.finished:
            if (now := recorded_digest(run.folder)) is not None:
                settings = {"data": upgrade_config(OmegaConf.to_container(run.config))["data"]}
                before = next((digests for others, digests in first if not differences_beside_seeds(others, settings)), None)
                if before is None:
                    first.append((settings, now))
                else:
                    found |= dict.fromkeys(changed_splits(before, now))
        return list(found)

    def run(self, arm: str, seed: int) -> Run:
        """Return one run, or raise KeyError."""
        for run in self.runs:
            if (run.arm, run.seed) == (arm, seed):
                return run
        raise KeyError(f"{self.folder} has no run {arm}_seed{seed}")

    def values(self, metric: str) -> dict[str, dict[int, float]]:
        """Return arm -> seed -> metric (`AP`, `AP75`, `AP_small` ...) in percent of the finished runs, as `statistics` takes it."""
        values: dict[str, dict[int, float]] = {arm: {} for arm in self.arms}
        for run in self.finished:
            if metric not in run.metrics.stats:
                has = ", ".join(run.metrics.stats)
                raise InputError(f"{run.folder / 'metrics.json'} has no {metric}, only {has}. Restore it, or repeat the run.")
            values[run.arm][run.seed] = run.metrics.stats[metric]
        return {arm: dict(sorted(by_seed.items())) for arm, by_seed in values.items() if by_seed}

    @cached_property
    def annotations(self) -> COCO:
        """Annotations of exactly the images and classes that the finished runs were evaluated on.

        The images are those of metrics.json. Files of earlier versions lack them: there the configuration says which they are.
        A relative `data.root` is resolved against the working folder.

        Raises:
            ValueError: no run is finished, the runs were evaluated on different data, or images are not in the annotations any more.
        """
        if not self.finished:
            raise InputError(f"{self.folder} has no finished run")
        paths = [_annotations_path(run) for run in self.finished]
        classes = [run.config.data.get("classes") for run in self.finished]
        self._require_same(
            "classes", [None if names is None else sorted(names) for names in classes], [names or "all" for names in classes]
        )
        present = [path for path in dict.fromkeys(paths) if path.is_file()] or paths[:1]  # the data may have been moved between two runs
        contents = {path: choose_classes(read_instances(path, self.has_masks), classes[0]) for path in present}
        instances = contents[present[0]]
        self._require_same("annotations", [contents.get(path, instances) for path in paths], paths)
        evaluated = [_image_ids(run, instances) for run in self.finished]
        common = set.intersection(*map(set, evaluated))
        examples = [f", image {min(own)} among them" if (own := set(ids) - common) else "" for ids in evaluated]
        coverages = [run.metrics.coverage + example for run, example in zip(self.finished, examples, strict=True)]
        self._require_same("images", evaluated, coverages)
        if gone := common - {image["id"] for image in instances["images"]}:
            raise InputError(
                f"{present[0]} lacks {len(gone)} of the {len(common)} images that the runs of {self.folder} were evaluated on, the first "
                f"is image {min(gone)}. Restore these annotations, or repeat the runs."
            )
        return as_coco(restrict(instances, evaluated[0]))

    def _require_same(self, what: str, values: Sequence, words: Sequence) -> None:
        """Raise InputError with the words of two finished runs whose values differ."""
        for run, value, said in zip(self.finished, values, words, strict=True):
            if value != values[0]:
                both = f"{self.finished[0].folder.name}: {words[0]}; {run.folder.name}: {said}"
                raise InputError(
                    f"{self.folder}: the runs were evaluated on different {what} ({both}). Evaluate all runs on the same {what}."
                )

    @property
    def has_masks(self) -> bool:
        """Whether masks were evaluated in all finished runs."""
        return all(f"{SEGM}AP" in run.metrics.stats for run in self.finished)

    @property
    def partial(self) -> str:
        """`4 of 12 images, a partial evaluation` where the runs were evaluated on a part of their split, else empty."""
        return next((run.metrics.coverage for run in self.finished if run.metrics.is_partial), "")

    @cached_property
    def protocol(self) -> Protocol:
        """IoU thresholds, size ranges and number of detections that the runs were evaluated with.

        Raises:
            ValueError: the runs differ in them.
        """
        limits = sorted({run.metrics.max_detections for run in self.finished})
        if len(limits) > 1:
            raise InputError(
                f"{self.folder}: runs were evaluated with at most {limits} detections per image and category. Choose one limit."
            )
        first = self.finished[0]
        for run in self.finished:
            if run.metrics.protocol != first.metrics.protocol:
                both = "; ".join(f"{one.folder.name}: {one.metrics.protocol.describe()}" for one in (first, run))
                raise InputError(f"{self.folder}: the runs were evaluated differently ({both}). Evaluate all with the same coco_eval.")
        return first.metrics.protocol

    def scales(self, run: Run) -> dict[int, float] | None:
        """Return image id -> pixels of the run's network's input per pixel of the image, see `sizes`. None where images keep their size.

        Raises:
            InputError: the configuration does not say to what size images are resized.
        """
        return resize_scales(self.annotations, *resize_sides(run.config.data.get("eval_transform")))

    @cached_property
    def unknown_geometry(self) -> list[str]:
        """What the configurations of the finished runs do not say about their cells. Empty also of detectors with a pyramid of maps."""
        found = []
        for config in [run.config for run in self.finished if run.config.get("backbone") is not None]:
            keys = ("backbone.stride", "head.extractor.output_size")
            found += [f"{key} is not set" for key in keys if OmegaConf.select(config, key) is None]
            try:
                resize_sides(config.data.get("eval_transform"))
            except InputError as error:
                found.append(str(error))
        return list(dict.fromkeys(found))

    @cached_property
    def differing_geometry(self) -> dict[str, list[str]]:
        """Setting of `GEOMETRY` -> its values, where the finished runs differ in it. Empty where they have the same cells."""
        values = {key: dict.fromkeys(str(OmegaConf.select(run.config, key)) for run in self.finished) for key in GEOMETRY}
        return {key: list(of_key) for key, of_key in values.items() if len(of_key) > 1}


def read_sweep(folder: Path | str, planned: Sequence[tuple[str, int]] = ()) -> Sweep:
    """Read the `<arm>_seed<seed>` folders of a sweep. Other folders are ignored.

    Args:
        folder: of the sweep.
        planned: (arm, seed) of each planned run, from which `missing` follows. Where empty, they are taken from Hydra's multirun.yaml, or
            from the folders: each arm with each seed.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a file cannot be read. The message names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFileError(f"{folder} does not exist. Expected the folder of a sweep, with a folder <arm>_seed<seed> for each run.")
    runs = tuple(_read_run(path, *match.group("arm", "seed")) for path, match in _run_folders(folder))
    planned_arms, planned_seeds = zip(*planned, strict=True) if planned else _plan(folder / "multirun.yaml")
    arms = dict.fromkeys((*map(str, planned_arms), *sorted(run.arm for run in runs)))
    seeds = dict.fromkeys((*map(int, planned_seeds), *sorted(run.seed for run in runs)))
    pairs = [(str(arm), int(seed)) for arm, seed in planned] or [(arm, seed) for arm in arms for seed in seeds]
    return Sweep(folder, runs, tuple(arms), tuple(seeds), tuple(dict.fromkeys(pairs)))


def _run_folders(folder: Path) -> list[tuple[Path, re.Match]]:
    matches = [(path, _FOLDER.fullmatch(path.name)) for path in sorted(folder.iterdir()) if path.is_dir()]
    return [(path, match) for path, match in matches if match]


def _read_run(folder: Path, arm: str, seed: str) -> Run:
    metrics, failed = folder / "metrics.json", folder / "failed.txt"
    return Run(
        arm,
        int(seed),
        folder,
        _metrics(metrics, read_json(metrics, dict)) if metrics.is_file() else None,
        failed.read_text(errors="replace") if failed.is_file() else None,
    )


def _plan(path: Path) -> tuple[list[str], list[int]]:
    """Read the planned values of `roi` and `seed`. The command line takes precedence over the sweeper's parameters."""
    if not path.is_file():
        return [], []
    lines = sweep_lines(read_configuration(path))
    planned: dict[str, list] = {"roi": [], "seed": []}
    for override in OverridesParser.create().parse_overrides(lines):
        if override.key_or_group in planned:
            swept = override.is_sweep_override()
            planned[override.key_or_group] = list(override.sweep_iterator()) if swept else [override.value()]
    return [str(arm) for arm in planned["roi"]], [int(seed) for seed in planned["seed"]]


def _split(run: Run) -> DictConfig:
    """Return the settings of the split that a run is evaluated on."""
    return run.config.data[evaluated_split(run.config.data)]


def _annotations_path(run: Run) -> Path:
    root, annotations = path_setting(run.config.data.root, "data.root"), path_setting(_split(run).annotations, "annotations")
    return Path(root) / annotations


def _image_ids(run: Run, instances: dict) -> list[int]:
    """Return the images that a run was evaluated on, ascending."""
    if run.metrics.image_ids is not None:
        return list(run.metrics.image_ids)
    data, split = run.config.data, _split(run)
    subset, ids = split.get("subset", data.subset), split.get("ids", data.ids)
    return choose_images(instances, split.get("part"), subset=subset, ids=ids, seed=data.subset_seed)


def _metrics(path: Path, content: dict) -> Metrics:
    try:
        metrics = Metrics.from_json(content)
        if missing := {"AP", "AP50", "AP75"} - metrics.stats.keys():
            raise KeyError(min(missing))
        return metrics
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path} does not hold metrics ({error!r}): expected stats and per_class, as train.py writes them") from error
