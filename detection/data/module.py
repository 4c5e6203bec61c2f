"""Everything that training and evaluation read, as one Lightning data module."""

import logging
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from roi_quantization.detection.data.annotations import LAYOUT
from roi_quantization.detection.data.coco import CocoDetection, collate
from roi_quantization.detection.data.loading_time import TimedDataLoader
from roi_quantization.detection.data.proposals.provider import ProposalProvider
from roi_quantization.detection.data.proposals.recall import recall

log = logging.getLogger(__name__)

RECALL_IMAGES = 1000  # proposals are judged on the first so many images of a split; a recall needs no more


class EpochSampler(DistributedSampler):
    """The order of training images depends on (seed, epoch) alone, and the data set is told the epoch in time.

    With several processes each step takes the images that one process would take with a batch so many times as large.
    Lightning calls `set_epoch` before each epoch, and leaves a DistributedSampler in its place.
    """

    seen = 0  # images of this epoch, in this process, that a run which goes on has seen already

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.seen = 0
        super().set_epoch(epoch)
        self.dataset.set_epoch(epoch)

    def go_on(self, epoch: int, seen: int) -> None:
        """The next pass is the rest of `epoch`, without its first images."""
        self.set_epoch(epoch)
        self.seen = seen

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.seen, None)


class WholeBatchSampler(DistributedSampler):
    """Deals out whole batches in the order of the data set: batch k goes to process k modulo their number.

    What is found in an image depends, in its last digits, on the images beside it: so batches are those of a process alone. Where they do
    not come out even some are evaluated twice, since Lightning wants the same number from each process; `DetectionModule` counts them once.
    """

    def __init__(self, dataset: Dataset, batch_size: int, num_replicas: int, rank: int):
        super().__init__(dataset, num_replicas, rank, shuffle=False)
        whole = range(len(dataset))
        self.batches = [whole[start : start + batch_size] for start in range(0, len(dataset), batch_size)]

    def __iter__(self) -> Iterator[int]:
        rounds = math.ceil(len(self.batches) / self.num_replicas)
        for batch in range(self.rank, rounds * self.num_replicas, self.num_replicas):
            yield from self.batches[batch % len(self.batches)]

    def __len__(self) -> int:
        return sum(1 for _ in self)


class DetectionData(pl.LightningDataModule):
    """Train, val and test splits of a data set in COCO's layout.

    Args:
        root: the folder that the splits' paths are relative to.
        train, val, test: each `{"images": folder, "annotations": json}`, or None where there is no such split. With `"part": [low, high]`
            it is that part of their images (see `CocoDetection`): a validation set can be held out of the training images. `"subset"` and
            `"ids"` are those of this split alone.
        proposals: one provider for all splits, or one for each: `{"train": ..., "val": ..., "test": ...}`.
        train_transform, eval_transform: see `roi_quantization.detection.data.transforms`.
        batch_size, eval_batch_size: images in a batch of each process.
        num_workers: processes that load; 0 loads in the training process.
        seed: of the order of images and of random transforms.
        subset, ids: restrict val and test to so many images, or to these (a list, or a text file of ids).
        train_subset: restrict train to so many images.
        subset_seed: of those draws; apart from `seed`, so that every run sees the same images.
        keep_empty: keep training images without objects.
        source: called with `root` before anything is read; may write the data there.

    After `setup` the splits are `train`, `val` and `test` (`CocoDetection`; None before). Batches are `(images, targets)`, described there.
    """

    def __init__(
        self,
        root: Path | str | None,
        train: Mapping[str, Any] | None,
        val: Mapping[str, Any] | None,
        test: Mapping[str, Any] | None,
        proposals: ProposalProvider | Mapping[str, ProposalProvider],
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
    ):
        super().__init__()
        if root is None:
            raise ValueError(f"Where is the data? Say it with data.root=<folder>.\n{LAYOUT}")
        self.root = Path(root)
        self.paths = {"train": train, "val": val, "test": test}
        self.proposals = proposals if isinstance(proposals, Mapping) else dict.fromkeys(self.paths, proposals)
        self.options = {
            "train": {"transform": train_transform, "subset": train_subset, "keep_empty": keep_empty, "seed": seed},
            "val": {"transform": eval_transform, "subset": subset, "ids": ids},
            "test": {"transform": eval_transform, "subset": subset, "ids": ids},
        }
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.seed, self.subset_seed, self.source = seed, subset_seed, source
        self.train: CocoDetection | None = None
        self.val: CocoDetection | None = None
        self.test: CocoDetection | None = None
        self.place = {"epoch": 0, "batches": 0}  # where training begins

    def prepare_data(self) -> None:
        if self.source is not None:
            self.source(self.root)
        elif not self.root.is_dir():
            raise FileNotFoundError(f"There is no folder {self.root}.\n{LAYOUT}")

    def setup(self, stage: str | None = None) -> None:
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",), None: ("train", "val", "test")}[
            stage
        ]
        for split in splits:
            if getattr(self, split) is None and self.paths[split] is not None:
                setattr(self, split, self._read(split))

    def _read(self, split: str) -> CocoDetection:
        paths = {name: self.root / self.paths[split][name] for name in ("images", "annotations")}
        own = {name: value for name, value in self.paths[split].items() if name not in paths}
        try:
            dataset = CocoDetection(**paths, proposals=self.proposals[split], **self.options[split] | own, subset_seed=self.subset_seed)
        except ValueError as error:
            raise ValueError(f"the {split} split: {error}") from error
        for other in (self.train, self.val, self.test):
            if other is not None and other.categories != dataset.categories:
                raise ValueError(f"{paths['annotations']} has other categories than the other splits of {self.root}.")
        log.info("%s: %s", split, describe(dataset))
        return dataset

    @property
    def categories(self) -> list[dict]:
        """`[{"id": ..., "name": ...}]` in ascending order of id; label `i` is entry `i - 1`. After `setup`."""
        dataset = next((split for split in (self.train, self.val, self.test) if split is not None), None)
        if dataset is None:
            raise RuntimeError("Categories are known after prepare_data() and setup().")
        return dataset.categories

    def train_dataloader(self) -> DataLoader:
        world_size, rank = self._processes()
        if len(self.train) < self.batch_size * world_size:
            wanted = f"a batch of {self.batch_size}" + (f" in each of {world_size} processes" if world_size > 1 else "")
            raise ValueError(f"{len(self.train)} training images do not fill {wanted}; lower data.batch_size.")
        sampler = EpochSampler(self.train, num_replicas=world_size, rank=rank, shuffle=True, seed=self.seed, drop_last=True)
        sampler.go_on(self.place["epoch"], seen=self.place["batches"] * self.batch_size)
        return self._loader(self.train, batch_size=self.batch_size, sampler=sampler, drop_last=True)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's hook for checkpoints: which epoch it is, and how many of its batches are done."""
        loop = self.trainer.fit_loop
        epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
        return {"epoch": epochs.processed, "batches": batches.completed if epochs.ready > epochs.processed else 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before `train_dataloader`, which Lightning may call, for the number of steps, before it knows the epoch itself."""
        self.place = dict(state)

    def val_dataloader(self) -> DataLoader | list:
        """Nothing, for Lightning to pass over, where there is no val split."""
        return [] if self.val is None else self._eval_loader(self.val)

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader(self.test)

    def _processes(self) -> tuple[int, int]:
        """How many there are, and which of them this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _eval_loader(self, dataset: CocoDetection) -> DataLoader:
        return self._loader(
            dataset, batch_size=self.eval_batch_size, sampler=WholeBatchSampler(dataset, self.eval_batch_size, *self._processes())
        )

    def _loader(self, dataset: CocoDetection, **options) -> DataLoader:
        return TimedDataLoader(
            dataset,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_interrupts_to_the_main_process,
            **options,
        )


def _leave_interrupts_to_the_main_process(_: int) -> None:
    """Ctrl-C in a terminal reaches workers as well; the main process, which may want to end its step first, needs them for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def describe(dataset: CocoDetection) -> str:
    """One line: how much there is, and how well the proposals cover it."""
    some = range(min(len(dataset), RECALL_IMAGES))
    windows = [dataset.proposals(dataset.records[index]) for index in some]
    shares = recall(windows, [dataset.annotated(index)[0] for index in some])
    objects = sum(len(dataset.annotated(index)[0]) for index in range(len(dataset)))
    covered = ", ".join(f"{share:.3f} at IoU {threshold}" for threshold, share in shares.items())
    return (
        f"{len(dataset)} images, {objects} objects of {len(dataset.categories)} categories; "
        f"{sum(map(len, windows)) / len(windows):.0f} proposals an image, recall {covered}"
        + (f" (on the first {len(some)} images)" if len(some) < len(dataset) else "")
    )
