"""Feature maps of a frozen backbone from a file: the same numbers as from the pixels, and nothing else is ever read."""

import csv
import errno
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import v2

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.files import NotWrittenError
from roi_quantization.detection.data import feature_cache
from roi_quantization.detection.evaluation.protocol import COCO_PROTOCOL
from roi_quantization.detection.model.build import build_detector, instantiate
from roi_quantization.detection.model.fast_rcnn import FastRCNN
from roi_quantization.detection.model.torchvision_backbone import TorchvisionBackbone
from roi_quantization.detection.runs.cross_evaluation import complete
from roi_quantization.detection.runs.frozen_features import FrozenFeatures, layers_key
from roi_quantization.scripts.train import train
from tests.configuration import composed
from tests.trainings import TINY, run_eval, run_train

FROZEN = [*TINY, "backbone.frozen_blocks=5", "threads=1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("embedded")


def build(root, *overrides):
    """A detector, and the data that are set up for it."""
    cfg = composed("train", *FROZEN, f"data.root={root}", "run_dir=none", *overrides)
    torch.manual_seed(0)
    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup()
    return build_detector(cfg, len(data.categories) + 1), data


def test_an_item_has_the_map_and_the_boxes_of_its_pixels(root, tmp_path):
    detector, data = build(root)
    _, plain = build(root)
    FrozenFeatures(tmp_path).attach(detector, data)
    detector.eval()
    flips = set()
    for epoch in range(3):
        for split in ("train", "test"):
            cached, pixels = getattr(data, split), getattr(plain, split)
            cached.set_epoch(epoch), pixels.set_epoch(epoch)
            for index in range(len(pixels)):
                image, target = pixels[index]
                blank, found = cached[index]
                features = found.pop("features")
                assert blank.shape == image.shape and blank.dtype == image.dtype
                assert found.keys() == target.keys()
                assert all(torch.equal(torch.as_tensor(found[key]), torch.as_tensor(target[key])) for key in target)
                with torch.no_grad():
                    expected = detector.backbone(detector.batch([image]))[0]
                assert features.dtype == torch.float16
                torch.testing.assert_close(features.float(), expected, rtol=1e-3, atol=1e-3)
                flips.add((split, bool((target["boxes"] - cached.ground_truth(index)[0]).abs().max() > 0)))
    assert flips == {("train", True), ("train", False), ("test", False)}


@pytest.mark.parametrize("frozen", [0, 3, 4, 5])
@pytest.mark.parametrize("stride", [16, 32])
def test_an_average_of_weights_reads_the_same_maps(root, stride, frozen):
    detector, _ = build(root, f"backbone.frozen_blocks={frozen}", f"backbone.stride={stride}")
    averaged = AveragedModel(detector).requires_grad_(False).module
    ends = [[len(part) for part in backbone.split()] for backbone in (detector.backbone, averaged.backbone)]
    assert ends[0] == ends[1] and sum(ends[0]) == len(detector.backbone.features)
    first = [weight.requires_grad for weight in detector.backbone.split()[1].parameters()][:1]
    assert first == ([True] if frozen < 5 else [])
    assert not any(weight.requires_grad for weight in detector.backbone.split()[0].parameters())


@pytest.mark.parametrize(
    ("frozen", "more"),
    [(5, []), (4, ["average=ema", "average.multi_avg_fn.decay=0.5"]), pytest.param(3, [], marks=pytest.mark.slow)],
)
def test_a_training_has_the_numbers_of_one_on_pixels(tmp_path, frozen, more, monkeypatch):
    options = [f"backbone.frozen_blocks={frozen}", "threads=1", "trainer.max_epochs=2", "optim.groups.lr=5e-3", *more]
    (tmp_path / "pixels").mkdir()
    on_pixels = run_train(tmp_path / "pixels", *options)
    shutil.copytree(tmp_path / "pixels/data", tmp_path / "maps/data")
    cached = ["features=cached", f"features.cache_dir={tmp_path / 'cache'}"]
    on_maps = run_train(tmp_path / "maps", *options, *cached)
    for name, steps in (("train/loss", 4), ("val/loss", 2)):
        losses = []
        for folder in ("pixels", "maps"):
            with open(tmp_path / folder / "run/metrics.csv", newline="") as file:
                losses.append([float(row[name]) for row in csv.DictReader(file) if row[name]])
        assert len(losses[0]) == steps and losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert on_maps == pytest.approx(on_pixels, abs=1.0, nan_ok=True)
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    again = run_eval(tmp_path / "maps/run/best.ckpt", tmp_path / "eval", *cached)
    assert again["test/AP"] == pytest.approx(on_maps["test/AP"], abs=0.01)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == files, "nothing was computed again"
    monkeypatch.setattr(FastRCNN, "batch", lambda *_: pytest.fail("pixels were read"))
    run = SimpleNamespace(folder=tmp_path / "maps/run", cross=dict, metrics=SimpleNamespace(protocol=COCO_PROTOCOL))
    complete(run, ["warp"])
    assert "warp" in (run.folder / "cross.json").read_text()


@pytest.mark.parametrize("roi", ["align", "pool", "prroi", "warp"])
def test_maps_of_other_sizes_in_a_batch_change_nothing(root, roi):
    """A map is padded with zeros, which boxes inside of the image without its last half cell never read."""
    detector, _ = build(root, f"roi={roi}")
    pool = detector.roi_heads.box_roi_pool
    shapes = [(96, 96), (64, 80)]
    maps = [torch.rand(detector.backbone.out_channels, height // 16, width // 16).half() for height, width in shapes]
    boxes = [
        torch.tensor([[0.0, 0.0, width - 17, height - 17], [width / 2, height / 2, width - 18, height - 17], [3.0, 2.0, 40.0, 30.0]])
        for height, width in shapes
    ]
    together = pool(detector.batch_maps(maps), boxes, shapes)
    alone = [pool(detector.batch_maps([map_]), [of_image], [shape]) for map_, of_image, shape in zip(maps, boxes, shapes, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_a_killed_run_goes_on_where_its_last_index_was_written(root, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "PART", 4)
    detector, data = build(root)
    batch, computed = detector.batch, []

    def count(images, limit):
        computed.append(images)
        if len(computed) > limit:
            raise KeyboardInterrupt
        return batch(images)

    monkeypatch.setattr(detector, "batch", lambda images: count(images, 6))
    with pytest.raises(KeyboardInterrupt):
        FrozenFeatures(tmp_path).attach(detector, data)
    computed.clear()
    monkeypatch.setattr(detector, "batch", lambda images: count(images, 100))
    FrozenFeatures(tmp_path).attach(detector, data)
    assert len(computed) == 8 * 2 + 3 + 4 - 4, "four were in the index"
    fresh_detector, fresh = build(root)
    FrozenFeatures(tmp_path / "fresh").attach(fresh_detector, fresh)
    for index in range(8):
        assert torch.equal(data.train[index][1]["features"], fresh.train[index][1]["features"])


def test_a_backbone_of_somebody_else_is_frozen_as_a_whole_or_refused(root, tmp_path):
    detector, data = build(root)
    whole = detector.backbone

    class Own(torch.nn.Module):
        stride, out_channels, mean, std = whole.stride, whole.out_channels, whole.mean, whole.std

        def __init__(self):
            super().__init__()
            self.layers, self.scale = whole.features, 1

        def forward(self, images):
            return self.scale * self.layers(images)

    detector.backbone = Own()
    FrozenFeatures(tmp_path).attach(detector, data)
    image = build(root)[1].test[0][0]
    with torch.no_grad():
        expected = detector.backbone(detector.batch([image]))[0]
    torch.testing.assert_close(data.test[0][1]["features"].float(), expected, rtol=1e-3, atol=1e-3)
    detector.backbone.scale = 1.2
    with pytest.raises(InputError, match=r"features_\w+\.float16: its maps were computed by layers .* that gave other values"):
        FrozenFeatures(tmp_path).attach(detector, build(root)[1])
    detector.backbone.layers[-2].weight.requires_grad_(True)
    with pytest.raises(InputError, match=r"layers\.\d+\.weight is trained"):
        FrozenFeatures(tmp_path).attach(detector, build(root)[1])


def test_other_ends_of_a_traced_backbone_have_other_maps():
    """Before and after a relu a backbone has the same layers and weights."""
    ends = [TorchvisionBackbone("resnet18", f"layer1.1.{end}", 4) for end in ("add", "relu_1", "add")]
    for backbone in ends[1:]:
        backbone.load_state_dict(ends[0].state_dict())
    keys = [layers_key(backbone) for backbone in ends]
    assert keys[0] == keys[2] != keys[1]


def test_maps_of_an_earlier_version_are_read(root, tmp_path, monkeypatch):
    FrozenFeatures(tmp_path).attach(*build(root))
    (index,) = tmp_path.glob("*.json")
    content = json.loads(index.read_text())
    assert len(content.pop("sample")) > 8
    index.write_text(json.dumps(content))
    detector, data = build(root)
    monkeypatch.setattr(detector, "batch", lambda *_: pytest.fail("pixels were read"))
    FrozenFeatures(tmp_path).attach(detector, data)
    assert data.test[0][1]["features"].isfinite().all()


def test_other_weights_sizes_and_images_have_other_maps(root, tmp_path):
    files = []
    for overrides, change in (([], False), ([], True), (["data.eval_transform.short_side=64"], False)):
        detector, data = build(root, *overrides)
        if change:
            next(detector.backbone.parameters()).data[0] += 1
        data.train = data.val = None
        FrozenFeatures(tmp_path).attach(detector, data)
        files.append(data.test.features.path)
        map_ = data.test[0][1]["features"]
        assert map_.shape[1:] == {0: (6, 6), 1: (6, 6), 2: (4, 4)}[len(files) - 1]
    assert len(set(files)) == 3
    detector, data = build(root, "data.seed=1", "data.subset=2", "data.source.seed=7", f"data.root={tmp_path / 'other'}")
    FrozenFeatures(tmp_path).attach(detector, data)
    with torch.no_grad():
        detector.eval()
        image = build(root, "data.source.seed=7", "data.subset=2", f"data.root={tmp_path / 'other'}")[1].test[0][0]
        expected = detector.backbone(detector.batch([image]))[0]
    torch.testing.assert_close(data.test[0][1]["features"].float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("short_side", "shared"), [(96, True), (80, False)])  # 80 is padded to 96 at stride 32
def test_strides_that_pad_an_image_to_the_same_size_share_its_map(root, tmp_path, monkeypatch, short_side, shared):
    size = [f"data.{split}_transform.{side}={short_side}" for split in ("train", "eval") for side in ("short_side", "max_side")]
    FrozenFeatures(tmp_path).attach(*build(root, *size))
    before = next(tmp_path.glob("*.float16")).stat().st_size
    detector, data = build(root, *size, "backbone.stride=32")
    FrozenFeatures(tmp_path).attach(detector, data)
    (file,) = tmp_path.glob("*.float16")
    assert (file.stat().st_size == before) == shared
    image, target = build(root, *size, "backbone.stride=32")[1].test[0]
    target["features"] = data.test[0][1]["features"]
    detector.eval()
    with torch.no_grad():
        expected = detector.backbone(detector.batch([image]))
        _, pool5 = detector.backbone.split()
        torch.testing.assert_close(pool5(detector.batch_maps([target["features"]])), expected, rtol=1e-3, atol=1e-3)


def test_damaged_files_are_named_or_computed_anew(root, tmp_path):
    detector, data = build(root)
    FrozenFeatures(tmp_path).attach(detector, data)
    expected = data.test[0][1]["features"]
    path, index = data.test.features.path, data.test.features.index_path
    content = path.read_bytes()
    entry = json.loads(index.read_text())["maps"][data.test.features._name(data.test.records[0], False)]
    path.write_bytes(content[: entry[0]] + b"\x01\x02" + content[entry[0] + 2 :])
    with pytest.raises(InputError, match=rf"{path}.*checksum"):
        data.test[0]
    for damage in (lambda: path.write_bytes(content[: entry[0] + 2]), lambda: index.write_text("{"), lambda: index.unlink()):
        damage()
        _, again = build(root)
        FrozenFeatures(tmp_path).attach(detector, again)
        assert torch.equal(again.test[0][1]["features"], expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone.frozen_blocks=0"], r"all of its layers are trained.*backbone\.frozen_blocks=5"),
        (["data.train_transform.short_side=[64,96]"], r"the transform of train has RandomChoice"),
        ([], r"the transform of test has ColorJitter"),
    ],
)
def test_what_changes_the_maps_is_refused_before_anything_is_computed(root, tmp_path, overrides, message):
    detector, data = build(root, *overrides)
    if not overrides:
        data.test.transform = v2.Compose([v2.ColorJitter(0.1)])
    with pytest.raises(InputError, match=message):
        FrozenFeatures(tmp_path / "cache").attach(detector, data)
    assert not (tmp_path / "cache").exists()


def test_a_training_that_is_refused_computes_no_maps(root, tmp_path):
    """Lightning alone knows its precisions, and it says so late."""
    cached = ["features=cached", f"features.cache_dir={tmp_path / 'cache'}", "trainer.precision=half"]
    with pytest.raises(InputError, match=r"settings of trainer: .*half"):
        train(composed("train", *FROZEN, f"data.root={root}", f"run_dir={tmp_path / 'run'}", *cached))
    assert not (tmp_path / "cache").exists()


def test_a_training_that_goes_on_with_other_data_computes_no_maps(root, tmp_path):
    data = shutil.copytree(root, tmp_path / "data")
    options = [*FROZEN, f"data.root={data}", f"run_dir={tmp_path / 'run'}"]
    train(composed("train", *options, "trainer.max_epochs=1"))
    path = data / "annotations/instances_train.json"
    instances = json.loads(path.read_text())
    instances["annotations"][0]["bbox"][0] += 1
    path.write_text(json.dumps(instances))
    goes_on = [f"resume={tmp_path / 'run/last.ckpt'}", "trainer.max_epochs=2"]
    cached = ["features=cached", f"features.cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(InputError, match=r"the data are not those that this run began with: 1 images of train have other annotations"):
        train(composed("train", *options, *goes_on, *cached))
    assert not (tmp_path / "cache").exists()


def test_a_training_that_goes_on_computes_the_maps_of_its_weights(root, tmp_path):
    """Lightning loads them later, and those of a new detector are other ones: of another seed here, as with `init_from`."""
    caches = []
    for overrides in (["seed=0"], ["seed=1", f"resume={tmp_path / 'run/last.ckpt'}", "trainer.max_epochs=2"]):
        caches.append(tmp_path / f"cache{len(caches)}")
        cached = ["features=cached", f"features.cache_dir={caches[-1]}", "trainer.max_epochs=1"]
        train(composed("train", *FROZEN, f"data.root={root}", f"run_dir={tmp_path / 'run'}", *cached, *overrides))
    first, second = ([path.name for path in cache.glob("*.float16")] for cache in caches)
    assert first == second


def test_a_full_disk_leaves_no_half_map(root, tmp_path, monkeypatch):
    detector, data = build(root)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"need \d\.\d MB, and .* has 0\.0 MB free.*features\.cache_dir"):
        FrozenFeatures(tmp_path).attach(detector, data)
    monkeypatch.undo()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_cache.os, "fsync", full)
    with pytest.raises(NotWrittenError, match="Make room there"):
        FrozenFeatures(tmp_path).attach(detector, data)
    monkeypatch.undo()
    FrozenFeatures(tmp_path).attach(detector, data)
    assert data.train[0][1]["features"].isfinite().all()
