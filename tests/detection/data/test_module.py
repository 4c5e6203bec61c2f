"""The data module: splits, batches, and an order that depends on (seed, epoch) alone."""

import json
import logging
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.utils.data import BatchSampler

from roi_quantization.detection.data.embedded import EmbeddedSet
from roi_quantization.detection.data.module import DetectionData, EpochSampler, WholeBatchSampler, describe
from roi_quantization.detection.data.proposals.file import write_proposals
from roi_quantization.detection.data.proposals.grid import Grid
from roi_quantization.detection.data.transforms import resize_and_flip
from tests.configuration import composed

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SPLITS = {name: {"images": name, "annotations": f"annotations/instances_{name}.json"} for name in ("train", "val", "test")}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "embedded"
    EmbeddedSet(train=10, val=4, test=3)(root)
    return root


def data(root, **options):
    made = DetectionData(root, **SPLITS | {"proposals": Grid([0.5])} | options)
    made.prepare_data()
    made.setup()
    return made


def test_batches_are_lists_of_images_and_targets(root):
    images, targets = next(iter(data(root, batch_size=4, num_workers=0).train_dataloader()))
    assert len(images) == len(targets) == 4 and images[0].shape == (3, 256, 256)


def test_setup_reads_the_splits_of_its_stage_once(root):
    made = DetectionData(root, **SPLITS, proposals=Grid([0.5]))
    with pytest.raises(RuntimeError, match=r"categories are not known yet: call prepare_data\(\)"):
        _ = made.categories
    made.setup("test")
    assert made.train is None and len(made.test) == 3
    assert [category["name"] for category in made.categories] == ["disc", "ring", "square", "triangle", "star"]
    test = made.test
    made.setup("fit")
    made.setup("test")
    assert (len(made.train), len(made.val)) == (10, 4) and made.test is test


def test_subset_is_for_evaluation_and_train_subset_for_training(root):
    made = data(root, subset=2, train_subset=5)
    assert (len(made.train), len(made.val), len(made.test)) == (5, 2, 2)
    assert data(root, subset=2, seed=9).test.image_ids == made.test.image_ids  # whatever the seed of the run


def test_a_split_may_have_a_choice_of_its_own(root):
    ids = data(root).test.image_ids
    made = data(root, subset=2, test=SPLITS["test"] | {"subset": None, "ids": ids[:1]})
    assert (len(made.val), made.test.image_ids) == (2, ids[:1])
    with pytest.raises(ValueError, match=r"the val split: ids: 1 of 1 image ids .* \+data\.test\.ids="):
        data(root, ids=ids[:1])
    with pytest.raises(ValueError, match=r"the test split: subset=4 of 3 images"):
        data(root, subset=4)


def test_a_validation_set_can_be_held_out_of_the_training_images(root):
    held_out = data(root, train=SPLITS["train"] | {"part": [0.0, 0.7]}, val=SPLITS["train"] | {"part": [0.7, 1.0]})
    assert (len(held_out.train), len(held_out.val)) == (7, 3)
    assert sorted(held_out.train.image_ids + held_out.val.image_ids) == data(root).train.image_ids
    again = data(root, train=SPLITS["train"] | {"part": (0.0, 0.7)}, seed=9)
    assert again.train.image_ids == held_out.train.image_ids, "whatever the seed of the run"
    with pytest.raises(ValueError, match=r"part=\[0.7, 0.1\]: expected two shares of the images, 0 <= low < high <= 1"):
        data(root, train=SPLITS["train"] | {"part": [0.7, 0.1]})


def test_there_need_be_no_validation_set(root):
    assert data(root, val=None).val_dataloader() == []


def test_each_split_may_have_its_own_proposals(root):
    made = data(root, proposals={"train": Grid([0.5]), "val": Grid([1.0]), "test": Grid([1.0])})
    assert len(made.val[0][1]["proposals"]) == 1 < len(made.train[0][1]["proposals"])


def test_no_root_and_a_missing_root_show_the_layout(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)data\.root=<folder>.*train2017\.zip"):
        DetectionData(None, **SPLITS, proposals=Grid([0.5]))
    with pytest.raises(FileNotFoundError, match=r"(?s)no folder .*nowhere.*train2017\.zip"):
        DetectionData(tmp_path / "nowhere", **SPLITS, proposals=Grid([0.5])).prepare_data()


def test_some_of_the_classes_can_be_chosen(root):
    whole, some = data(root), data(root, classes=["star", "ring"], keep_empty=False)
    assert [category["name"] for category in some.categories] == ["ring", "star"], "in the order of their ids"
    names = {label: category["name"] for label, category in enumerate(whole.categories, 1)}
    for index, record in enumerate(whole.test.records):
        boxes, labels, _ = whole.test.ground_truth(index)
        chosen = torch.tensor([names[label] in ("ring", "star") for label in labels.tolist()], dtype=torch.bool)
        mine, ours, _ = some.test.ground_truth(some.test.image_ids.index(record.id))
        assert torch.equal(mine, boxes[chosen])
        assert [("ring", "star")[label - 1] for label in ours.tolist()] == [names[label] for label in labels[chosen].tolist()]
    assert {some.test.coco.cats[a["category_id"]]["name"] for a in some.test.coco.anns.values()} <= {"ring", "star"}
    assert all(len(some.train.ground_truth(index)[0]) for index in range(len(some.train))), "images of other objects alone are empty"
    with pytest.raises(
        ValueError, match=r"the train split: classes: there is no category cat. Choose from disc, ring, square, triangle, star"
    ):
        data(root, classes=["cat"])
    with pytest.raises(ValueError, match=r"classes=ring: expected a list of names, such as \[disc, ring\]"):
        data(root, classes="ring")


def test_the_training_images_can_be_tested(root):
    made = DetectionData(root, **SPLITS, proposals={"train": Grid([0.5]), "val": Grid([1.0]), "test": Grid([1.0])}, train_subset=5)
    made.test_on_train()
    made.setup("test")
    assert len(made.test) == 5 and len(made.test[0][1]["proposals"]) > 1
    assert made.test.image_ids == data(root, train_subset=5).train.image_ids
    few = DetectionData(root, **SPLITS, proposals=Grid([0.5]), subset=2)
    few.test_on_train()
    few.setup("test")
    assert len(few.test) == 2 and set(few.test.image_ids) < set(data(root).train.image_ids)
    of_splits = SPLITS | {"train": SPLITS["train"] | {"subset": 6}}
    for settings, images in (({}, 6), ({"subset": 2}, 2), ({"ids": [1]}, 1), ({"test": SPLITS["test"] | {"subset": 3}}, 3)):
        own = DetectionData(root, **of_splits | settings, proposals=Grid([0.5]))
        own.test_on_train()
        own.setup("test")
        assert len(own.test) == images and set(own.test.image_ids) < set(data(root).train.image_ids)


def test_splits_must_agree_in_their_categories(root, small_set):
    other = {"images": str(small_set.images), "annotations": str(small_set.annotations)}  # absolute paths stand alone
    known = rf"{root}/annotations/instances_train\.json"
    names = r"id 2 is missing in the first and 'disc' in the second; id 3 is .*; id 4 is 'plane' in the first and missing in .*; and 5 more"
    with pytest.raises(ValueError, match=rf"{small_set.annotations} has other categories than {known}: {names}\. Give all splits the same"):
        data(root, test=other)
    instances = json.loads((root / "annotations/instances_val.json").read_text())
    instances["categories"][1]["name"] = "Ring"
    small_set.annotations.write_text(json.dumps(instances))
    with pytest.raises(ValueError, match=rf"than {known}: id 3 is 'Ring' in the first and 'ring' in the second\. Give"):
        data(root, val={"images": "val", "annotations": str(small_set.annotations)})


def test_a_batch_that_training_cannot_fill_is_an_error(root):
    with pytest.raises(ValueError, match="10 training images do not fill a batch of 16"):
        data(root, batch_size=16).train_dataloader()


def test_the_description_counts_objects_windows_and_recall(root):
    text = describe(data(root, proposals=Grid([1.0])).test)
    objects = sum(len(data(root).test[index][1]["boxes"]) for index in range(3))
    assert text.startswith(f"3 images, {objects} objects of 5 categories; 1 proposals an image, recall ")
    assert text.endswith("0.000 at IoU 0.5, 0.000 at IoU 0.75")  # the image itself covers nothing that is half its side at most


def test_a_low_recall_of_the_training_proposals_is_warned_of_once(root, caplog):
    data(root, proposals=Grid([1.0]))
    (warning,) = (record.getMessage() for record in caplog.records if "Proposals" in record.getMessage())
    assert warning.startswith("Proposals reach 0 % of the training objects at IoU 0.5.") and "proposals=grid_photos" in warning
    caplog.clear()
    data(root, proposals=instantiate(composed("train", "data=embedded").proposals))
    data(root, proposals=None)
    assert "Proposals" not in caplog.text, "the default on drawn shapes, and a detector with proposals of its own"


class Recorder(pl.LightningModule):
    """Trains nothing; keeps which image came in which epoch, and whether it was flipped."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, _):
        images, targets = batch
        checks = [(self.current_epoch, t["image_id"], int(i[0, :, :128].sum())) for i, t in zip(images, targets, strict=True)]
        self.seen += checks
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(root, tmp_path, num_workers, epochs=3, resume=None, **options):
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    made = DetectionData(
        root, **SPLITS | {"val": None}, proposals=Grid([1.0]), train_transform=resize_and_flip(flip=0.5), num_workers=num_workers, **options
    )
    recorder = Recorder()
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path
    )
    trainer.fit(recorder, made, ckpt_path=resume)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return recorder.seen


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestOrder:
    def test_order_and_flips_depend_on_seed_and_epoch_not_on_workers(self, root, tmp_path):
        alone = trained(root, tmp_path, num_workers=0)
        assert alone == trained(root, tmp_path, num_workers=2)
        assert alone != trained(root, tmp_path, num_workers=0, seed=1)
        epochs = [[entry[1:] for entry in alone if entry[0] == epoch] for epoch in range(3)]
        assert all(len({image_id for image_id, _ in epoch}) == 10 for epoch in epochs)
        orders = {tuple(image_id for image_id, _ in epoch) for epoch in epochs}
        flips = {tuple(pixels for _, pixels in sorted(epoch)) for epoch in epochs}
        assert len(orders) == len(flips) == 3

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_a_resumed_run_sees_what_it_would_have_seen(self, root, tmp_path, num_workers):
        whole = trained(root, tmp_path, num_workers)
        trained(root, tmp_path, num_workers, epochs=2)
        rest = trained(root, tmp_path, num_workers, resume=tmp_path / "last.ckpt")
        assert rest == [entry for entry in whole if entry[0] == 2]


@pytest.mark.parametrize(("state", "left"), [({"images": 2}, [8, 8, 8]), ({"batches": 2}, [8, 6, 0])])
def test_a_resumed_epoch_goes_on_at_the_same_image_with_another_batch_size(root, state, left):
    """Earlier versions counted batches, which are of the size that they were in the same run."""
    for batch_size, images in zip((1, 2, 4), left, strict=True):
        made = data(root, batch_size=batch_size, num_workers=0)
        made.load_state_dict({"epoch": 0, **state})
        assert sum(len(batch) for batch, _ in made.train_dataloader()) == images


class TestProcesses:
    """What each of several processes gets, without starting any."""

    @pytest.mark.parametrize(("images", "processes", "batch_size"), [(12, 2, 3), (11, 2, 2), (13, 4, 1), (13, 3, 2)])
    def test_they_train_on_the_images_of_one_process_with_a_larger_batch_at_each_step(self, images, processes, batch_size):
        def steps(processes, batch_size, epoch, done=0):
            batches = []
            for rank in range(processes):
                sampler = EpochSampler(Numbers(images), processes, rank, seed=3)
                sampler.resume(epoch, skip=done * batch_size)
                batches.append(list(BatchSampler(sampler, batch_size, drop_last=True)))
            return [sorted(chain(*step)) for step in zip(*batches, strict=True)]

        for epoch in range(3):
            whole = steps(1, processes * batch_size, epoch)
            assert steps(processes, batch_size, epoch) == whole and len(whole) > 1
            assert steps(processes, batch_size, epoch, done=1) == whole[1:], "and a run may go on with another number of them"

    def test_no_seed_sees_the_orders_of_another(self):
        orders = set()
        for seed in (0, 1, 2, 100, 2**32 - 1):
            sampler = EpochSampler(Numbers(50), num_replicas=1, rank=0, seed=seed)
            for epoch in range(5):
                sampler.set_epoch(epoch)
                orders.add(tuple(sampler))
        assert len(orders) == 25

    @pytest.mark.parametrize(("images", "processes", "batch_size"), [(12, 2, 3), (10, 2, 4), (3, 2, 4), (5, 4, 4), (7, 3, 1), (9, 4, 2)])
    def test_they_evaluate_the_very_batches_of_one_process(self, images, processes, batch_size):
        dealt = []
        for rank in range(processes):
            sampler = WholeBatchSampler(Numbers(images), batch_size, processes, rank)
            assert len(list(sampler)) == len(sampler)
            dealt.append([tuple(batch) for batch in BatchSampler(sampler, batch_size, drop_last=False)])
        whole = [tuple(range(start, min(start + batch_size, images))) for start in range(0, images, batch_size)]
        assert set(chain(*dealt)) == set(whole)
        assert len({len(batches) for batches in dealt}) == 1, "Lightning wants the same number from each"
        assert sum(map(len, dealt)) - len(whole) < processes, "no more is done twice than that takes"

    def test_too_few_images_for_all_of_them_are_an_error(self, root):
        made = data(root, batch_size=4)
        made.trainer = SimpleNamespace(world_size=3, global_rank=0)
        with pytest.raises(ValueError, match="10 training images do not fill a batch of 4 in each of 3 processes"):
            made.train_dataloader()


class Numbers(list):
    """So many items, which pay no heed to the epoch."""

    def __init__(self, count):
        super().__init__(range(count))

    def set_epoch(self, epoch):
        pass


class TestConfigs:
    """The shipped configurations build what they say."""

    def config(self, *overrides):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose(overrides=["+seed=0", *overrides])

    def test_embedded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ROI_CACHE", str(tmp_path))
        sizes = ["data.source.train=4", "data.source.val=1", "data.source.test=1"]
        made = instantiate(self.config("+data=embedded", "+proposals=grid", *sizes).data)
        made.prepare_data()
        made.setup()
        assert (len(made.train), len(made.test)) == (4, 1) and (tmp_path / "embedded/complete.json").is_file()
        assert len(made.test[0][1]["proposals"]) == 658

    def test_the_embedded_set_is_the_one_that_its_class_describes(self):
        source = instantiate(self.config("+data=embedded", "+proposals=grid").data.source)
        assert source._stamp() == EmbeddedSet()._stamp()

    def test_a_custom_set_is_taken_whole(self, root):
        made = instantiate(self.config("+data=custom", "+proposals=grid", f"data.root={root}").data)
        made.setup()
        assert (len(made.train), len(made.val), made.test) == (10, 4, None)

    def test_coco_says_what_is_missing(self):
        with pytest.raises(Exception, match=r"data\.root=<folder>"):
            instantiate(self.config("+data=coco", "+proposals=grid").data)

    @pytest.mark.parametrize(("name", "train", "val", "test"), [("coco", 125, 3, 50), ("voc_animals", 1020, 180, 300)])
    def test_real_data(self, real_data, name, train, val, test):
        made = instantiate(self.config(f"+data={name}", "+proposals=grid_photos", f"data.root={real_data / name}").data)
        made.setup()
        assert (len(made.train), len(made.val), len(made.test)) == (train, val, test)
        image, target = made.train[0]
        assert max(image.shape) <= 1000 and target["proposals"].shape[1] == 4

    def test_file_and_selective_search(self, root, tmp_path):
        for choice in ("file", "selective_search"):
            made = instantiate(self.config("+data=embedded", f"+proposals={choice}", f"data.root={root}", "data.source=null").data)
            assert made.proposals.keys() == {"train", "val", "test"}
        with pytest.raises(ValueError, match="This split has no proposal file"):
            instantiate(self.config("+data=embedded", "+proposals=file", f"data.root={root}").data).setup("test")

    def test_the_test_split_takes_the_proposal_file_of_val_for_the_same_images_only(self, root, tmp_path):
        """Where ids begin anew in each split a file of val has all ids of test."""
        images = {split: getattr(data(root), split).records for split in ("train", "val", "test")}
        for split, records, width in (
            ("train", images["train"], 100),
            ("val", images["val"] + images["test"], 40),
            ("test", images["test"], 30),
        ):
            write_proposals(tmp_path / f"{split}.npz", records, [[[0, 0, width, 10]]] * len(records))
        overrides = [f"proposals.{split}.path={tmp_path / split}.npz" for split in ("train", "val")]
        overrides += ["+data=custom", "+proposals=file", f"data.root={root}"]

        def make(*more):
            made = instantiate(self.config(*overrides, *more).data)
            made.setup()
            return made

        def windows(test):
            return test.proposals(test.records[0]).tolist()

        assert make().test is None, "so it needs no file"
        with pytest.raises(ValueError, match=r"the test split: This split has no proposal file: set proposals.<split>.path"):
            make("data.test={images: test, annotations: annotations/instances_test.json}")
        same = "data.test=${data.val}"
        assert windows(make(same).test) == [[0, 0, 40, 10]]
        assert windows(make(same, "proposals.test.max_proposals=0").test) == [], "its other settings are its own"
        own = [f"proposals.test.path={tmp_path}/test.npz", "data.test={images: test, annotations: annotations/instances_test.json}"]
        assert windows(make(*own).test) == [[0, 0, 30, 10]]
