"""Every shipped configuration is composed, and what it draws is built."""

import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from torchvision.models.resnet import ResNet

from roi_quantization.detection.common.config_security import check_targets_allowed
from roi_quantization.detection.common.configuration import ADDED_SETTINGS, differences, differences_beside_seeds, flatten
from roi_quantization.detection.common.renamed_targets import upgrade_config
from roi_quantization.detection.data.transforms import seeded_rng
from roi_quantization.detection.evaluation.protocol import Protocol
from roi_quantization.detection.model.build import build_detector, instantiate
from roi_quantization.detection.runs.setup import check_accelerator

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMALL = ["head.box_head.hidden=8", "backbone.width=0.0625", "backbone.weights=null"]  # the layout, not the size


@pytest.fixture(autouse=True)
def hydra_config_as_before(monkeypatch):
    """`composed` sets what is one for the whole process."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", HydraConfig.instance().cfg)


def choices(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def composed(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides=["run_dir=unused", *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)  # for ${hydra:...}
    return cfg


@pytest.mark.parametrize("roi", choices("roi"))
def test_roi(roi):
    """Every operator trains a detector: RoI features have the size asked for, and a gradient for the backbone."""
    detector = build_detector(composed(f"roi={roi}", *SMALL), num_classes=3)
    features = torch.rand(1, 32, 4, 4, requires_grad=True)
    pooled = detector.roi_heads.box_roi_pool(features, [torch.tensor([[0.0, 0.0, 60.0, 40.0], [10.0, 10.0, 20.0, 50.0]])])
    assert pooled.shape == (2, 32, 7, 7)
    pooled.sum().backward()
    assert features.grad.abs().sum() > 0


@pytest.mark.parametrize("head", choices("head"))
@pytest.mark.parametrize("backbone", [name for name in choices("backbone") if name.startswith("vgg16")])
@pytest.mark.parametrize("stride", [16, 32])
def test_backbone_and_head(backbone, head, stride):
    cfg = composed(f"backbone={backbone}", f"head={head}", f"backbone.stride={stride}", *SMALL)
    detector = build_detector(cfg, num_classes=6)
    assert detector.roi_heads.box_roi_pool.spatial_scale == 1 / stride
    assert detector.roi_heads.box_predictor.cls_score.out_features == 6


@pytest.mark.parametrize("mask_head", choices("mask_head"))
@pytest.mark.parametrize("detector", ["fast_rcnn", "faster_rcnn"])
def test_mask_head(mask_head, detector):
    """Masks of each class have 28 pixels a side, and the data read them."""
    cfg = composed(f"mask_head={mask_head}", f"detector={detector}", "roi=pool", *SMALL)
    detector = build_detector(cfg, num_classes=6).eval()
    assert cfg.data.masks and not composed(*SMALL).data.masks
    logits = detector.roi_heads.predict_masks(torch.rand(1, 32, 4, 4), [torch.tensor([[0.0, 0.0, 60.0, 40.0]])], [(64, 64)])
    assert logits.shape == (1, 6, 28, 28)
    assert str(detector.roi_heads.mask_roi_pool.operator) == str(detector.roi_heads.box_roi_pool.operator)


@pytest.mark.parametrize(("backbone", "stride", "channels"), [("resnet50_c4", 16, 1024), ("resnet50_c5", 32, 2048)])
def test_resnet(backbone, stride, channels, monkeypatch):
    """Mask R-CNN's tables 2c and 2d. The head's weights are not VGG16's."""
    monkeypatch.setattr("torchvision.models.resnet.ResNet._make_layer", one_block_a_stage)
    cfg = composed(f"backbone={backbone}", "head.box_head.hidden=8")
    assert (cfg.head.box_head.weights, cfg.head.box_head.norm) == (None, "none")
    detector = build_detector(cfg, num_classes=3)
    assert (detector.backbone.stride, detector.backbone.out_channels) == (stride, channels)
    assert detector.roi_heads.box_roi_pool.spatial_scale == 1 / stride


def one_block_a_stage(network, block, planes, _, stride=1, dilate=False, make=ResNet._make_layer):
    return make(network, block, planes, 1, stride, dilate)


def test_a_head_needs_no_settings_of_the_backbone_that_are_vgg16s():
    cfg = composed("head=two_fc", "head.box_head.hidden=8", "backbone.width=0.0625")
    with open_dict(cfg.backbone):
        del cfg.backbone["weights"], cfg.backbone["norm"]
    assert (cfg.head.box_head.weights, cfg.head.box_head.norm) == (None, "none")
    build_detector(cfg, num_classes=3)
    check_targets_allowed(OmegaConf.to_container(cfg.head), "a checkpoint")
    assert composed("head=two_fc", "backbone.weights=x.pth", "backbone.norm=batch").head.box_head.weights == "x.pth", (
        "it follows those that are there"
    )
    earlier, now = ({"head": {"box_head": {"weights": text}}} for text in ("${backbone.weights}", "${oc.select:backbone.weights,null}"))
    assert not differences(upgrade_config(earlier), upgrade_config(now)), "a run of an earlier version goes on"


def test_runs_of_one_arm_may_differ_in_seeds_of_a_training_alone():
    before = {"seed": 0, "head": {"seed": 0}, "data": {"seed": 0, "subset_seed": 0, "source": {"seed": 0}}}
    now = {"seed": 1, "head": {"seed": 1}, "data": {"seed": 1, "subset_seed": 1, "source": {"seed": 1}}}
    assert differences_beside_seeds(before, now) == ["data.subset_seed was 0 and is 1", "data.source.seed was 0 and is 1"]


def test_a_proposal_file_of_val_is_not_that_of_test_in_runs_of_earlier_versions_either():
    earlier = {"proposals": {"val": {"path": "val.npz"}, "test": {"path": "${..val.path}"}}}
    assert upgrade_config(earlier)["proposals"] == {"val": {"path": "val.npz"}, "test": {"path": None}}


@pytest.mark.parametrize("data", choices("data"))
@pytest.mark.parametrize("proposals", choices("proposals"))
def test_data_and_proposals(data, proposals, tmp_path):
    (tmp_path / "some.npz").touch()
    overrides = [f"data={data}", f"proposals={proposals}", f"data.root={tmp_path}"]
    if proposals == "file":
        overrides += [f"proposals.{split}.path={tmp_path / 'some.npz'}" for split in ("train", "val")]
    assert isinstance(instantiate(composed(*overrides).data), pl.LightningDataModule)


def test_several_short_sides():
    """short_side: [a, b, c] draws one for each image; the longer side follows, up to max_side."""
    overrides = ["data.train_transform.short_side=[20,30,40]", "data.train_transform.max_side=50"]
    transform = instantiate(composed(*overrides).data.train_transform)
    image, sizes = torch.zeros(3, 40, 60, dtype=torch.uint8), set()
    for epoch in range(30):
        with seeded_rng(0, epoch):
            sizes.add(tuple(transform(image).shape[1:]))
    assert sizes == {(20, 30), (30, 45), (33, 50)}


def test_an_error_in_what_is_built_comes_as_it_is():
    with pytest.raises(ValueError, match=r"^weights=missing.pth: no such file"):
        build_detector(composed("backbone.weights=missing.pth"), num_classes=3)
    with pytest.raises(ValueError, match=r"data\.root=<folder>"):
        instantiate(composed("data=coco").data)


@pytest.mark.parametrize(
    ("experiment", "reference"),
    [
        ("quantization_core", "align"),
        ("half_pixel", "align_half_pixel_True"),
        ("length", None),
        ("quantization_core,voc_animals_rates", None),
    ],
)
def test_the_report_of_a_sweep_compares_with_an_arm_that_there_is(experiment, reference):
    callback = instantiate(composed(f"experiment=[{experiment}]").hydra.callbacks.sweep)
    assert callback.reference == reference and pickle.loads(pickle.dumps(callback)).reference == reference


def test_the_folder_of_a_sweep_is_that_of_an_experiment_on_some_data():
    experiments = ["quantization", "half_pixel", "conventions", "learning_rate", "length", "masks"]
    settings = {"": "embedded", ",voc_animals_small": "voc_animals"}
    settings |= {f",{name}": name for name in ("voc_animals_frozen", "voc_animals_conv5")}
    for experiment in experiments:
        for setting, name in settings.items():
            cfg = composed(f"experiment=[{experiment}{setting}]", "backbone.stride=32")
            assert cfg.hydra.sweep.dir == f"runs/{experiment}_{name}_stride32"
    rates = composed("experiment=[quantization_core,voc_animals_frozen,voc_animals_rates]", "backbone.stride=16")
    assert rates.hydra.sweep.dir == "runs/learning_rate_voc_animals_frozen_stride16"


@pytest.mark.parametrize("optim", choices("optim"))
def test_optim(optim):
    parts = instantiate(composed(f"optim={optim}").optim)
    model = torch.nn.Sequential(OrderedDict(backbone=torch.nn.Linear(2, 2)))
    optimizer = parts["optimizer"](parts["groups"](model))
    parts["schedule"](optimizer, total_steps=100)
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("trainer", choices("trainer"))
def test_trainer(trainer, tmp_path):
    cfg = composed(f"trainer={trainer}", f"run_dir={tmp_path}")
    if trainer in ("gpu", "ddp") and not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"needs a CUDA device, and PyTorch sees 0 here. Choose trainer=cpu"):
            check_accelerator(cfg.trainer)
    else:
        check_accelerator(cfg.trainer)
        assert isinstance(instantiate(cfg.trainer), pl.Trainer)


@pytest.mark.parametrize("logger", choices("logger"))
def test_logger(logger, tmp_path):
    cfg = composed(f"logger={logger}", f"run_dir={tmp_path}")
    if logger == "tensorboard":
        pytest.importorskip("tensorboard", reason="needs tensorboard, which is not required")
    assert all(isinstance(one, pl.loggers.Logger) for one in instantiate(cfg.logger).values())


@pytest.mark.parametrize("average", choices("average"))
def test_average(average):
    assert composed().get("average") is None, "off, unless it is asked for"
    averaged = instantiate(composed(f"average={average}").average)(torch.nn.Linear(2, 2))
    averaged.update_parameters(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("coco_eval", choices("coco_eval"))
def test_coco_eval(coco_eval):
    if coco_eval == "faster":
        pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval, which is not required")
    evaluation = instantiate(composed(f"coco_eval={coco_eval}").coco_eval)
    evaluation.library(None, None, "bbox")
    assert evaluation.protocol == Protocol(), "COCO's own"


def test_settings_that_earlier_versions_did_not_have_are_there_with_the_value_that_does_the_same():
    settings = dict(flatten(OmegaConf.to_container(composed("proposals=file", "proposals.train.path=x", "proposals.val.path=x"))))
    for end, value in ADDED_SETTINGS.items():
        found = [settings[key] for key in settings if key == end or key.endswith(f".{end}")]
        assert found and all(one == value for one in found), end


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_experiment(experiment, tmp_path):
    cfg = composed(f"experiment={experiment}", f"data.root={tmp_path}", *SMALL)
    build_detector(cfg, num_classes=81)
    instantiate(cfg.data)
    instantiate(cfg.optim)


def test_a_sweep_over_photographs_is_two_experiments_together():
    cfg = composed("experiment=[quantization_core,voc_animals_small]", "roi=pool", "rates.pool=7e-5", "data.root=unused", *SMALL)
    assert cfg.hydra.sweeper.params.roi == "align,pool,warp" and cfg.arm == "pool"
    assert (cfg.trainer.max_steps, cfg.trainer.max_epochs, cfg.data.val) == (1000, -1, None)
    assert cfg.optim.groups.lr == 7e-5, "the operator's own"
    assert composed("experiment=voc_animals_small", "roi=prroi", *SMALL).optim.groups.lr == 2e-4, "for operators that have none"


@pytest.mark.parametrize("experiment", ["learning_rate", "length"])
def test_settings_are_chosen_on_val(experiment):
    data = composed(f"experiment={experiment}").data
    assert data.test is None and data.val.images == "val"


def test_a_narrow_head_starts_random_whatever_the_weights_of_the_backbone():
    assert composed("backbone=vgg16", "backbone.weights=IMAGENET1K_V1").head.box_head.weights is None, "VGG16's fc6 has 4096 units"
    assert composed("backbone=vgg16", "backbone.weights=IMAGENET1K_V1", "head=two_fc").head.box_head.weights == "IMAGENET1K_V1"


@pytest.mark.parametrize(
    "protocol, short_side, frozen", [("voc_animals_small", 240, 2), ("voc_animals_frozen", 600, 5), ("voc_animals_conv5", 600, 4)]
)
def test_rates_are_chosen_on_images_held_out_with_the_protocol_that_comes_before(protocol, short_side, frozen):
    cfg = composed(
        f"experiment=[quantization_core,{protocol},voc_animals_rates]", "data.root=unused", "backbone.weights=null", "optim.groups.lr=1e-4"
    )
    assert (cfg.data.train.part, cfg.data.test.part, cfg.data.test.images) == ([0.0, 0.85], [0.85, 1.0], "train")
    assert (cfg.data.train_transform.short_side, cfg.trainer.max_steps, cfg.cross) == (short_side, 250, [])
    assert cfg.backbone.frozen_blocks == frozen
    assert cfg.hydra.sweeper.params.seed == "100" and cfg.arm == "align_lr0.0001"


def test_the_papers_recipe_is_the_papers():
    """Girshick 2015, sections 2.3 and 4: two images of 64 RoIs, SGD, conv1 and conv2 frozen; 240k iterations on COCO."""
    cfg = composed("experiment=fast_rcnn_coco", "data.root=unused")
    assert (cfg.data.batch_size, cfg.head.rois_per_image, cfg.head.foreground_fraction) == (2, 64, 0.25)
    assert list(cfg.head.background_iou) == [0.1, 0.5]
    assert (cfg.optim.groups.lr, cfg.optim.optimizer.momentum, cfg.optim.groups.weight_decay) == (0.001, 0.9, 0.0005)
    assert (cfg.trainer.max_steps, cfg.backbone.frozen_blocks, cfg.head.box_head.dropout) == (240_000, 2, 0.5)
    assert (cfg.data.train_transform.short_side, cfg.data.train_transform.max_side) == (600, 1000)
    assert "IMAGENET1K_V1" == cfg.backbone.weights == cfg.head.box_head.weights


def test_a_checkpoint_needs_no_file_of_the_weights_that_training_began_with():
    cfg = composed(*SMALL, "backbone=vgg16", "head=two_fc", "backbone.weights=gone.pth", "head.box_head.weights=gone_too.pth")
    with pytest.raises(ValueError, match=r"gone\.pth: no such file"):
        build_detector(cfg, num_classes=3)
    build_detector(cfg, num_classes=3, pretrained=False)
    assert cfg.backbone.weights == "gone.pth", "the configuration itself is left as it is"
