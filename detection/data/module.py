"""The Lightning data module: splits, data loaders, and the order of the images."""

import inspect
import logging
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from roi_quantization.detection.common.configuration import check_count, path_setting, shorten
from roi_quantization.detection.common.errors import InputError, MissingFileError
from roi_quantization.detection.data import plausibility
from roi_quantization.detection.data.annotations import LAYOUT
from roi_quantization.detection.data.coco import CocoDetection, collate
from roi_quantization.detection.data.loading_time import TimedDataLoader
from roi_quantization.detection.data.proposals.file import ProposalFile
from roi_quantization.detection.data.proposals.provider import NoProposals, ProposalProvider
from roi_quantization.detection.data.proposals.recall import recall

log = logging.getLogger(__name__)

RECALL_IMAGES = 1000  # the log line gives the recall on at most this many images of a split
LOW_RECALL = 0.7  # at IoU 0.5; below it there is a warning


class EpochSampler(DistributedSampler):
    """Shuffles the training images by (seed, epoch), and passes the epoch on to the data set.

    With several ranks a step takes the same images as one process with the batch size of all ranks together. Lightning calls `set_epoch`
    before each epoch, and does not replace a DistributedSampler.
    """

    def __init__(self, dataset: Dataset, num_replicas: int, rank: int, seed: int):
        # it shuffles by seed + epoch; the factor keeps consecutive seeds from seeing the same orders one epoch apart
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed * 2_654_435_761 % 2**32, drop_last=True)

    skip = 0  # images at the start of this epoch, on this rank, that a resumed run has already seen

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.skip = 0
        super().set_epoch(epoch)
        self.dataset.set_epoch(epoch)

    def resume(self, epoch: int, skip: int) -> None:
        """Let the next pass be that of `epoch` without its first `skip` images."""
        self.set_epoch(epoch)
        self.skip = skip

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.skip, None)


class WholeBatchSampler(DistributedSampler):
    """Distributes whole batches in the order of the data set: batch k goes to rank k modulo the number of ranks.

    The detections in an image depend, in their last digits, on the other images of its batch, so the batches are those of a single
    process. Lightning needs the same number of batches on each rank: where the batches do not divide evenly some are evaluated twice,
    and `DetectionModule` counts them once.
    """

    def __init__(self, dataset: Dataset, batch_size: int, num_replicas: int, rank: int):
        super().__init__(dataset, num_replicas, rank, shuffle=False)
        indices = range(len(dataset))
        self.batches = [indices[start : start + batch_size] for start in range(0, len(dataset), batch_size)]

    def __iter__(self) -> Iterator[int]:
        rounds = math.ceil(len(self.batches) / self.num_replicas)
        for batch in range(self.rank, rounds * self.num_replicas, self.num_replicas):
            yield from self.batches[batch % len(self.batches)]

    def __len__(self) -> int:
        return sum(1 for _ in self)


class DetectionData(pl.LightningDataModule):
    """Train, val and test splits of a data set in COCO's layout.

    After `setup` the splits are `train`, `val` and `test` (`CocoDetection`; None before). Batches are `(images, targets)`, described there.

    Args:
        root: the folder that the splits' paths are relative to.
        train, val, test: each `{"images": folder, "annotations": json}`, or None for no such split. `"part": [low, high]` selects a part
            of the images (see `CocoDetection`), so that a validation set can be held out of the training images. `"subset"` and `"ids"`
            override those below for one split.
        proposals: one provider for all splits, or one for each: `{"train": ..., "val": ..., "test": ...}`. None: there are none. A
            `ProposalFile` of test without a path reads that of val where both splits have the same images and annotations.
        train_transform, eval_transform: see `roi_quantization.detection.data.transforms`.
        batch_size, eval_batch_size: images in a batch of each rank.
        num_workers: data-loader workers; 0 loads in the main process.
        seed: seeds the order of the images and the random transforms.
        subset: number of images of val and of test to use, drawn at random.
        ids: images of val and test to use: a list of ids, or a text file of them.
        train_subset: number of images of train to use, drawn at random.
        subset_seed: seeds these draws; apart from `seed`, so that every run has the same images.
        keep_empty: keep training images without objects.
        source: called with `root` before anything is read; may write the data there.
        classes: names of the categories to use, in all splits; objects of others are background. None: all.
        masks: targets have the masks of their objects.
    """

    def __init__(
        self,
        root: Path | str | None,
        train: Mapping[str, Any] | None,
        val: Mapping[str, Any] | None,
        test: Mapping[str, Any] | None,
        proposals: ProposalProvider | Mapping[str, ProposalProvider] | None,
        train_transform: Callable | None = None,
        eval_transform: Callable | None = None,
        batch_size: int = 2,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
        subset: int | None = None,
        ids: Sequence[int] | Path | str | None = None,
        train_subset: int | None = None,
        subset_seed: int = 0,
        keep_empty: bool = True,
        source: Callable[[Path], None] | None = None,
        classes: Sequence[str] | None = None,
        masks: bool = False,
    ):
        super().__init__()
        if root is None:
            raise InputError(f"data.root is not set: give the folder of the data set with data.root=<folder>.\n{LAYOUT}")
        self.root = Path(path_setting(root, "data.root"))
        for name, value, least in (("batch_size", batch_size, 1), ("eval_batch_size", eval_batch_size, 1), ("num_workers", num_workers, 0)):
            check_count(value, f"data.{name}", least)
        if source is not None and not callable(source):
            raise InputError(f"data.source={source}: expected a function of the root. Name one by data.source._target_, or set null")
        self.paths = {"train": train, "val": val, "test": test}
        for split, settings in self.paths.items():
            _check_split(split, settings)
        proposals = NoProposals() if proposals is None else proposals
        self.proposals = proposals if isinstance(proposals, Mapping) else dict.fromkeys(self.paths, proposals)
        of_test, of_val = self.proposals.get("test"), self.proposals.get("val")
        if isinstance(of_test, ProposalFile) and isinstance(of_val, ProposalFile) and of_test.path is None and _are_same_images(val, test):
            of_test.path = of_val.path
        self.options = {
            "train": {"transform": train_transform, "subset": train_subset, "keep_empty": keep_empty, "seed": seed},
            "val": {"transform": eval_transform, "subset": subset, "ids": ids},
            "test": {"transform": eval_transform, "subset": subset, "ids": ids},
        }
        for options in self.options.values():
            options["classes"], options["masks"] = classes, masks
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.seed, self.subset_seed, self.source, self.masks = seed, subset_seed, source, masks
        self.train: CocoDetection | None = None
        self.val: CocoDetection | None = None
        self.test: CocoDetection | None = None
        self.start = {"epoch": 0, "images": 0}  # where training starts; a checkpoint sets it

    def test_on_train(self) -> None:
        """Let the test split be the training images, with the transform of evaluation.

        They are those that training takes (`train_subset`, `keep_empty`), or as many or those that `subset` or `ids` say.
        """
        chosen = ("subset", "ids")
        own = self.options["test"] | {name: value for name, value in (self.paths["test"] or {}).items() if name in chosen}
        given = {name: own[name] for name in chosen} if any(own[name] is not None for name in chosen) else {}
        self.options["test"] = self.options["train"] | {"transform": own["transform"]} | given
        self.paths["test"] = {name: value for name, value in self.paths["train"].items() if name not in given}
        self.proposals = {**self.proposals, "test": self.proposals["train"]}

    def prepare_data(self) -> None:
        if self.source is not None:
            self.source(self.root)
        elif not self.root.is_dir():
            raise MissingFileError(f"There is no folder {self.root}.\n{LAYOUT}")

    def setup(self, stage: str | None = None) -> None:
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",), None: ("train", "val", "test")}[
            stage
        ]
        for split in splits:
            if getattr(self, split) is None and self.paths[split] is not None:
                setattr(self, split, self._open(split))
                self._judge(split)

    def _open(self, split: str) -> CocoDetection:
        paths = {name: self._path(split, name) for name in ("images", "annotations")}
        overrides = {name: value for name, value in self.paths[split].items() if name not in paths}
        options = self.options[split] | overrides
        try:
            dataset = CocoDetection(**paths, proposals=self.proposals[split], **options, subset_seed=self.subset_seed)
        except ValueError as error:
            raise InputError(f"the {split} split: {error}") from error
        for name in ("train", "val", "test"):
            other = getattr(self, name)
            if other is not None and other.categories != dataset.categories:
                raise InputError(
                    f"{paths['annotations']} has other categories than {self._path(name, 'annotations')}: "
                    f"{_difference(dataset.categories, other.categories)}. Give all splits the same ids and names, also of categories that "
                    "a split has no objects of"
                )
        coverage = measure_proposals(dataset)
        log.info("%s: %s", split, describe(dataset, coverage))
        if split == "train" and coverage is not None and coverage.recall[0.5] < LOW_RECALL:
            log.warning(
                "Proposals reach %.0f %% of the training objects at IoU 0.5. The others are hardly learnt or found. proposals=grid is made "
                "for drawn shapes: for photographs choose proposals=grid_photos or selective_search (docs/proposals.md)",
                100 * coverage.recall[0.5],
            )
        return dataset

    def _path(self, split: str, name: str) -> Path:
        return self.root / path_setting(self.paths[split].get(name), f"data.{split}.{name}")

    def _judge(self, split: str) -> None:
        """Refuse a train split without objects. Log categories without any, and what is implausible beside the splits that are open."""
        dataset = getattr(self, split)
        if dataset.num_objects == 0:
            text = f"the {split} split has no objects in {len(dataset)} images; crowd regions (iscrowd, VOC's difficult) are not objects"
            if split == "train":
                raise InputError(f"{text}. There is nothing to learn: annotate objects, or choose other images with data.train")
            log.warning("%s. Its AP is undefined.", text)
        elif split == "train" and (missing := dataset.categories_without_objects):
            log.warning(
                "%d of %d categories %s no training objects: %s. None of them will be found, and where val or test have some "
                "their AP of 0 lowers the mean. Annotate some, take more images for training, or choose others with data.classes",
                len(missing), len(dataset.categories), "has" if len(missing) == 1 else "have", shorten(missing),
            )  # fmt: skip
        splits = {name: getattr(self, name) for name in ("train", "val", "test")}
        files = {name: [record.path for record in one.records] for name, one in splits.items() if one is not None}
        for pair in combinations(files, 2):
            if split in pair:
                plausibility.report(plausibility.judge_splits({name: files[name] for name in pair}), self.root)

    @property
    def categories(self) -> list[dict]:
        """`[{"id": ..., "name": ...}]` in ascending order of id; label `i` is entry `i - 1`. Available after `setup`."""
        dataset = next((split for split in (self.train, self.val, self.test) if split is not None), None)
        if dataset is None:
            raise RuntimeError("The categories are not known yet: call prepare_data() and setup() first.")
        return dataset.categories

    def train_dataloader(self) -> DataLoader:
        world_size, rank = self._world_size_and_rank()
        if len(self.train) < self.batch_size * world_size:
            wanted = f"a batch of {self.batch_size}" + (f" in each of {world_size} processes" if world_size > 1 else "")
            raise InputError(f"{len(self.train)} training images do not fill {wanted}; lower data.batch_size.")
        sampler = EpochSampler(self.train, world_size, rank, self.seed)
        seen = self.start.get("images", self.start.get("batches", 0) * self.batch_size * world_size)  # earlier versions counted batches
        sampler.resume(self.start["epoch"], skip=seen // world_size)
        return self._loader(self.train, batch_size=self.batch_size, sampler=sampler, drop_last=True)

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning stores in a checkpoint: the epoch, and how many of its images all processes together have seen."""
        loop = self.trainer.fit_loop
        epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
        done = batches.completed if epochs.ready > epochs.processed else 0
        return {"epoch": epochs.processed, "images": done * self.batch_size * self.trainer.world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set where training starts.

        Lightning calls it before `train_dataloader`, and calls that (for the number of steps) before it restores its own epoch.
        """
        self.start = dict(state)

    def val_dataloader(self) -> DataLoader | list:
        """Return the loader of the val split. Lightning skips the empty list of a data set without one."""
        return [] if self.val is None else self._eval_loader(self.val)

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader(self.test)

    def _world_size_and_rank(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _eval_loader(self, dataset: CocoDetection) -> DataLoader:
        sampler = WholeBatchSampler(dataset, self.eval_batch_size, *self._world_size_and_rank())
        return self._loader(dataset, batch_size=self.eval_batch_size, sampler=sampler)

    def _loader(self, dataset: CocoDetection, **options) -> DataLoader:
        return TimedDataLoader(
            dataset,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_sigint,
            **options,
        )


def _difference(here: Sequence[Mapping], there: Sequence[Mapping]) -> str:
    """Describe the first categories, by their ids, in which two splits differ."""
    names = [{category["id"]: repr(category["name"]) for category in one} for one in (here, there)]
    differing = [i for i in sorted({**names[0], **names[1]}) if names[0].get(i) != names[1].get(i)]
    return shorten(
        [f"id {i} is {names[0].get(i, 'missing')} in the first and {names[1].get(i, 'missing')} in the second" for i in differing], 3
    )


def _check_split(split: str, settings: Any) -> None:
    """Check that the settings of a split are its folder, its file, and settings of `CocoDetection` that it overrides.

    Raises:
        InputError: they are not; the message has the key.
    """
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise InputError(f"data.{split}={settings}: expected {{images: <folder>, annotations: <json>}}, or null for no such split")
    known = [name for name in inspect.signature(CocoDetection).parameters if name not in ("proposals", "subset_seed")]
    for name in settings:
        if name not in known:
            raise InputError(f"data.{split}.{name}: a split has no such setting. It has {', '.join(known)}")


def _are_same_images(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two splits, or parts of them, are of one file of annotations and one folder: an id is the same picture in both."""
    return one is not None and other is not None and all(one[name] == other[name] for name in ("images", "annotations"))


def _ignore_sigint(_: int) -> None:
    """Keep a worker alive at Ctrl-C, which a terminal sends to all processes: the main process still needs it to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Coverage(NamedTuple):
    """How proposals cover the objects of the first `images` images."""

    images: int
    windows: float  # of an image, mean
    recall: dict[float, float]  # IoU threshold -> share of the objects, NaN without objects


def measure_proposals(dataset: CocoDetection) -> Coverage | None:
    """Measure how proposals cover the objects of a split, on `RECALL_IMAGES` images at most; None where there are no proposals."""
    if isinstance(dataset.proposals, NoProposals):
        return None
    sample = range(min(len(dataset), RECALL_IMAGES))
    windows = [dataset.proposals(dataset.records[index]) for index in sample]
    shares = recall(windows, [dataset.ground_truth(index)[0] for index in sample])
    return Coverage(len(sample), sum(map(len, windows)) / len(windows), shares)


def describe(dataset: CocoDetection, coverage: Coverage | None = None) -> str:
    """Describe a split in one line: numbers of images, objects, categories and, where there are any, proposals with their recall.

    Args:
        dataset: the split.
        coverage: of its proposals, which is measured where it is None.
    """
    objects = sum(len(dataset.ground_truth(index)[0]) for index in range(len(dataset)))
    content = f"{len(dataset)} images, {objects} objects of {len(dataset.categories)} categories"
    coverage = measure_proposals(dataset) if coverage is None else coverage
    if coverage is None:
        return content
    covered = ", ".join(f"{share:.3f} at IoU {threshold}" for threshold, share in coverage.recall.items())
    return f"{content}; {coverage.windows:.0f} proposals an image, recall {covered}" + (
        f" (on the first {coverage.images} images)" if coverage.images < len(dataset) else ""
    )
