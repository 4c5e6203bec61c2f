"""Detectors of torchvision with another operator. `tiny_rcnn` stands for the large ones; those themselves are slow tests."""

import copy

import pytest
import torch
from omegaconf import open_dict
from torch import nn
from torchvision.models import MobileNet_V3_Large_Weights, ResNet50_Weights, detection, get_model_builder
from torchvision.models._api import WeightsEnum
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.model.build import build_detector
from roi_quantization.detection.model.torchvision_detector import EPS_0, TorchvisionDetector, builders_with_heads
from roi_quantization.roi_heads import MultiScaleRoIExtractor
from tests.configuration import composed
from tests.detection.model.test_faster_rcnn import assert_coordinates_are_kept
from tests.detection.model.tiny_rcnn import NAMES, TinyWeights, tiny, tiny_rcnn  # noqa: F401 -- a fixture

BOTH = [{"id": 1, "name": "disc"}, {"id": 3, "name": "star"}]
ALL = [*BOTH, {"id": 4, "name": "square"}]


def configuration(*overrides, builder="tiny_rcnn"):
    return composed("train", "detector=torchvision", f"detector.builder={builder}", *overrides)


def images_and_targets():
    torch.manual_seed(1)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((70, 100), (120, 90))]
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    return images, [target | {"image_id": i, "original_size": tuple(image.shape[1:])} for i, image in enumerate(images)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch.hub's folder with weights of torchvision's names, as if they were downloaded: random ones."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()

    def save(entry, model):
        torch.save(model.state_dict(), tmp_path / "checkpoints" / entry.url.rpartition("/")[2])

    return save


def random_model(builder=tiny_rcnn, **options):
    """A detector as torchvision trains them: norms with statistics."""
    torch.manual_seed(0)
    model = builder(weights=None, weights_backbone=None, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
    return model


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("training", [True, False])
def test_mixed_precision_leaves_coordinates_in_float32(training):
    detector = build_detector(configuration("roi=align"), num_classes=3).train(training)
    assert_coordinates_are_kept(detector, *images_and_targets())


def assert_same_detections(found, expected):
    for mine, its in zip(found, expected, strict=True):
        assert len(its["boxes"]) > 3
        for name in ("boxes", "scores", "labels"):
            torch.testing.assert_close(mine[name], its[name], rtol=1e-4, atol=1e-4)


def test_align_without_half_pixels_finds_what_torchvision_finds():
    model = random_model(num_classes=5)
    images, targets = images_and_targets()
    with torch.no_grad():
        expected = copy.deepcopy(model)([image / 255 for image in images])
        operators = {name: torch_operator(name) for name in ("align_no_half_pixel", "align", "pool")}
        found = {name: TorchvisionDetector(copy.deepcopy(model), operator).eval()(images, targets) for name, operator in operators.items()}
    assert found["align_no_half_pixel"][1] == {}, "no losses"
    assert_same_detections(found["align_no_half_pixel"][0], expected)
    for name in ("align", "pool"):
        with pytest.raises(AssertionError):
            assert_same_detections(found[name][0], expected)


def torch_operator(name):
    from roi_quantization.detection.model.build import build_operator, read_operator

    return build_operator(read_operator(name))


@pytest.mark.slow
@pytest.mark.parametrize("builder", ["fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn"])
def test_torchvisions_own_builders(builder, cache):
    """As above, through the configuration, with weights by name."""
    plain = random_model(get_model_builder(builder), num_classes=91, box_score_thresh=0.0, min_size=128)
    nn.init.normal_(plain.roi_heads.box_predictor.cls_score.weight, std=1.0)
    entry = detection.__dict__[f"{type(plain).__name__}_ResNet50_FPN{'_V2' if builder.endswith('v2') else ''}_Weights"].COCO_V1
    cache(entry, plain)
    options = {"box_score_thresh": 0.0, "min_size": 128}
    own = get_model_builder(builder)(weights=entry, **options).eval()
    words = ["channels_last=false"]  # else sums have another order, by which the scores of a random network do
    words += [f"+detector.options.{name}={value}" for name, value in options.items()]
    detector = build_detector(configuration("detector.weights=COCO_V1", "roi=align_no_half_pixel", *words, builder=builder), None).eval()
    detector.match_categories([{"id": i, "name": name} for i, name in enumerate(entry.meta["categories"]) if i and name != "N/A"])
    images, targets = images_and_targets()
    with torch.no_grad():
        expected = own([image / 255 for image in images])
        found, _ = detector(images, targets)
    for mine, its in zip(found, expected, strict=True):
        known = [i for i, label in enumerate(its["labels"].tolist()) if entry.meta["categories"][label] != "N/A"]
        assert len(known) > 3
        torch.testing.assert_close(mine["boxes"], its["boxes"][known], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine["scores"], its["scores"][known], rtol=1e-4, atol=1e-4)
    if detector.roi_heads.has_mask():
        assert isinstance(detector.roi_heads.mask_roi_pool, MultiScaleRoIExtractor)


def eps_of(model):
    return {name: (type(module), module.eps) for name, module in model.named_modules() if isinstance(module, FrozenBatchNorm2d)}


@pytest.mark.parametrize("weights", ["COCO_V1", "OTHER"])
def test_what_a_checkpoint_is_loaded_into_is_what_was_trained(tiny, cache, weights):  # noqa: F811
    """Training replaces the last layers; afterwards nothing of torchvision's weights is needed."""
    cache(TinyWeights[weights], random_model(num_classes=5))
    cfg = configuration(f"detector.weights={weights}")
    trained, empty = build_detector(cfg, 3), build_detector(cfg, 3, pretrained=False)
    assert trained.roi_heads.box_predictor.cls_score.out_features == 3
    assert torch.equal(trained.roi_heads.box_head.fc6.weight, random_model(num_classes=5).roi_heads.box_head.fc6.weight)
    assert eps_of(trained) == eps_of(empty) and len(eps_of(empty)) == 4
    assert {eps for _, eps in eps_of(empty).values()} == {0.0 if weights == "COCO_V1" else 1e-5}
    empty.load_state_dict(trained.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("builder", ["fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_the_norms_are_torchvisions(builder, cache):
    """Those of the builders themselves, of which EPS_0 has a list."""
    entry = {
        "fasterrcnn_resnet50_fpn": detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
        "fasterrcnn_mobilenet_v3_large_320_fpn": detection.FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1,
    }[builder]
    cache(entry, get_model_builder(builder)(weights=None, weights_backbone=None, num_classes=91))
    cfg = configuration("detector.weights=COCO_V1", builder=builder)
    expected = eps_of(get_model_builder(builder)(weights=entry))
    assert eps_of(build_detector(cfg, 3)) == eps_of(build_detector(cfg, 3, pretrained=False)) == expected
    assert (builder in EPS_0) == ({eps for _, eps in expected.values()} == {0.0})


BACKBONES = {
    "fasterrcnn_resnet50_fpn": ResNet50_Weights.IMAGENET1K_V1,
    "fasterrcnn_resnet50_fpn_v2": ResNet50_Weights.IMAGENET1K_V1,
    "fasterrcnn_mobilenet_v3_large_320_fpn": MobileNet_V3_Large_Weights.IMAGENET1K_V1,
}


@pytest.mark.parametrize("option", [None, 0, 1, 5])
@pytest.mark.parametrize("builder", BACKBONES)
def test_what_is_started_from_a_checkpoint_has_the_frozen_layers_of_torchvision(builder, option, monkeypatch):
    """`init_from` builds without weights. On meta tensors, and what would be downloaded is not loaded."""
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
    weights = BACKBONES[builder]
    words = [] if option is None else [f"+detector.options.trainable_backbone_layers={option}"]
    with torch.device("meta"):
        expected = get_model_builder(builder)(weights=None, weights_backbone=weights, num_classes=3, trainable_backbone_layers=option)
        cfg = configuration(f"detector.weights_backbone={weights.name}", *words, builder=builder)
        detector = build_detector(cfg, 3, pretrained=False)
    assert trained(detector) == trained(expected)
    assert eps_of(detector) == eps_of(expected)
    assert not all(trained(expected.backbone.body).values()) or option == 5


def trained(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_layers_are_frozen_with_the_weights_of_init_from_alone_where_they_are_named(tiny):  # noqa: F811
    """Without weights of torchvision all layers are trained, unless the option says how many."""
    backbone = build_detector(configuration(), 3, pretrained=False).backbone
    assert all(trained(backbone).values())
    words = ["+detector.options.trainable_backbone_layers=1"]
    backbone = build_detector(configuration(*words), 3, pretrained=False).backbone
    frozen = {name.partition(".")[0] for name, is_trained in trained(backbone.body).items() if not is_trained}
    assert frozen == {"layer0", "layer1", "layer2"}
    assert all(trained(build_detector(configuration(), 3, pretrained=False)).values()), "torchvision's function is put back"


def test_training_gives_losses_that_reach_the_weights(tiny):  # noqa: F811
    detector = build_detector(configuration("roi=pool"), 3)
    detections, losses = detector.train()(*images_and_targets())
    assert detections == [] and set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in detector.backbone.body.parameters())


def labelled(detector, labels):
    """The detector with one detection of each label."""
    boxes = torch.tensor([[1.0, 2.0, 30.0, 40.0]]).expand(len(labels), 4)
    found = [{"boxes": boxes, "scores": torch.linspace(0.9, 0.5, len(labels)), "labels": torch.tensor(labels)}]
    detector.roi_heads.forward = lambda *_: (found, {})
    detector.transform.postprocess = lambda result, *_: result
    return detector


def test_detections_have_the_labels_of_the_data():
    """By the ids of its categories, which are not counted without a gap. Those of other classes are left out."""
    detector = labelled(TorchvisionDetector(random_model(num_classes=5), torch_operator("pool"), class_names=NAMES).eval(), [3, 4, 1, 3])
    images, targets = images_and_targets()
    targets[0]["original_size"] = (140, 200)
    for categories, labels, scores in [(BOTH, [2, 1, 2], [0.9, 0.6333, 0.5]), (ALL, [2, 3, 1, 2], [0.9, 0.7667, 0.6333, 0.5])]:
        detector.match_categories(categories)
        ((found,), _) = detector(images[:1], targets[:1])
        assert found["labels"].tolist() == labels
        torch.testing.assert_close(found["scores"], torch.tensor(scores), rtol=0, atol=1e-4)
        assert found["boxes"][0].tolist() == [2.0, 4.0, 60.0, 80.0], "in pixels of the original"


@pytest.mark.parametrize(
    ("category", "message"),
    [
        ({"id": 1, "name": "star"}, r"category 1 of the data is 'star', and that of the detector's weights is 'disc'"),
        ({"id": 3, "name": "disc"}, r"category 3 of the data is 'disc', and that of the detector's weights is 'star'"),
        ({"id": 5, "name": "heart"}, r"category 5 of the data is 'heart', .* is not there \(they have 4\)"),
        ({"id": 0, "name": "__background__"}, r"category 0 of the data is '__background__'"),
        ({"id": -1, "name": "square"}, r"category -1 of the data is 'square'"),
    ],
)
def test_categories_that_are_not_the_weights_are_an_error(category, message):
    detector = TorchvisionDetector(random_model(num_classes=5), torch_operator("pool"), class_names=NAMES)
    with pytest.raises(InputError, match=message):
        detector.match_categories([category])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["detector.builder=retinanet_resnet50_fpn"], r"it has no RoI heads, so no operator\. Choose one of fasterrcnn.*maskrcnn"),
        (["detector.builder=resnet50"], r"detector\.builder=resnet50: it is no detector of torchvision"),
        (["detector.builder=fasterrcnn"], r"detector\.builder=fasterrcnn: it is no detector of torchvision"),
        (
            ["detector.weights=COCO_V9"],
            r"detector\.weights=COCO_V9: no such file, and no name .* for tiny_rcnn \(COCO_V1, OTHER, DEFAULT\)",
        ),
        (["detector.weights_backbone=COCO_V1"], r"detector\.weights_backbone=COCO_V1: no name of .*IMAGENET1K_V1"),
        (["detector.weights=COCO_V1", "detector.weights_backbone=IMAGENET1K_V1"], r"Remove detector\.weights_backbone"),
        (["+detector.options.min_sise=600"], r"detector\.options\.min_sise: tiny_rcnn does not take it\. It takes .*min_size"),
        (["+detector.options.num_classes=3"], r"detector\.options\.num_classes: tiny_rcnn does not take it"),
        (["+detector.options.trainable_backbone_layers=2"], r"all layers are trained without pretrained weights"),
        (["detector.weights={folder}/tiny.pth"], r"training starts from a name of torchvision's, or from init_from="),
        (["detector.weights={folder}/tiny-01234567.pth"], r"are torchvision's\. Set detector\.weights=COCO_V1; the file may lie in"),
        (["+backbone=vgg16"], r"backbone: a detector of torchvision has its own, and would not use this one\. Set backbone=null"),
    ],
)
def test_errors_of_training(tiny, tmp_path, overrides, message):  # noqa: F811
    for name in ("tiny.pth", "tiny-01234567.pth"):
        (tmp_path / name).touch()
    cfg = configuration(*(text.format(folder=tmp_path) for text in overrides if not text.startswith("+backbone")))
    if overrides[0].startswith("+backbone"):
        with open_dict(cfg):
            cfg.backbone = composed("train").backbone
    with pytest.raises(InputError, match=message):
        build_detector(cfg, 3)


def test_keypoints_are_not_trained_and_masks_where_they_are_asked_for(monkeypatch):
    assert "keypointrcnn_resnet50_fpn" in builders_with_heads()
    model = random_model(num_classes=3)
    monkeypatch.setattr("roi_quantization.detection.model.torchvision_detector._build_for_training", lambda *_: model)
    model.roi_heads.mask_roi_pool = model.roi_heads.mask_head = model.roi_heads.mask_predictor = nn.Identity()
    with pytest.raises(InputError, match=r"learns masks\. Set detector\.masks=true, or train a fasterrcnn_\*"):
        build_detector(configuration(builder="maskrcnn_resnet50_fpn"), 3)
    model.roi_heads.keypoint_roi_pool = model.roi_heads.keypoint_head = model.roi_heads.keypoint_predictor = nn.Identity()
    with pytest.raises(InputError, match=r"learns keypoints, which the data do not give\. Train a fasterrcnn_\* or maskrcnn_\*"):
        build_detector(configuration(builder="keypointrcnn_resnet50_fpn"), 3)
    with pytest.raises(InputError, match=r"masks=true: fasterrcnn_resnet50_fpn has no branch for masks\. .*builder=maskrcnn_\*"):
        build_detector(configuration("detector.masks=true", builder="fasterrcnn_resnet50_fpn"), 3)


def model_with_masks():
    """A Mask R-CNN: the same network with torchvision's branch for masks."""
    model = random_model(num_classes=5)
    model.roi_heads.mask_roi_pool = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=14, sampling_ratio=2, canonical_scale=64)
    model.roi_heads.mask_head, model.roi_heads.mask_predictor = MaskRCNNHeads(8, [8], 1), MaskRCNNPredictor(8, 8, 5)
    return model


def test_masks_of_align_without_half_pixels_are_torchvisions():
    model = model_with_masks()
    images, targets = images_and_targets()
    with torch.no_grad():
        expected = copy.deepcopy(model)([image / 255 for image in images])
        found, _ = TorchvisionDetector(copy.deepcopy(model), torch_operator("align_no_half_pixel"), masks=True).eval()(images, targets)
        assert_same_detections(found, expected)
        for mine, its in zip(found, expected, strict=True):
            assert mine["masks"].dtype == torch.bool
            assert (mine["masks"] != (its["masks"][:, 0] > 0.5)).float().mean() < 1e-4
        targets[0]["original_size"] = (140, 200)
        larger = TorchvisionDetector(copy.deepcopy(model), torch_operator("pool"), masks=True).eval()(images, targets)[0][0]
        assert larger["masks"].shape == (len(larger["boxes"]), 140, 200)


def test_masks_are_learnt():
    images, targets = images_and_targets()
    masks = [torch.ones(1, *image.shape[1:], dtype=torch.uint8) for image in images]
    detector = TorchvisionDetector(model_with_masks(), torch_operator("pool"), masks=True).train()
    _, losses = detector(images, [target | {"masks": mask} for target, mask in zip(targets, masks, strict=True)])
    losses["loss_mask"].backward()
    assert detector.roi_heads.mask_predictor.conv5_mask.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ("state", [], r"a file does not name its classes\. Set detector\.categories=COCO_V1"),
        ("state", ["detector.categories=COCO_V9"], "detector.weights=COCO_V9"),
        ("state", ["detector.categories=[none,disc]"], r"has 5 classes, detector\.categories 2, each with the background"),
        ("other", ["detector.categories=COCO_V1"], r"not the state dict of a detector of torchvision"),
        ("damaged", ["detector.categories=COCO_V1"], r"not the state dict .* is not a readable file"),
        ("wider", ["detector.categories=COCO_V1"], r"does not fit tiny_rcnn: size mismatch for backbone"),
    ],
)
def test_errors_of_weights_from_a_file(tiny, tmp_path, content, overrides, message):  # noqa: F811
    state = random_model(num_classes=5).state_dict()
    path = tmp_path / "own.pth"
    first = "backbone.body.layer0.0.weight"
    torch.save({"state": state, "other": {"a": 1}, "damaged": state, "wider": state | {first: torch.zeros(16, 3, 3, 3)}}[content], path)
    if content == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=message):
        build_detector(configuration(f"detector.weights={path}", *overrides), None)


def test_weights_from_a_file(tiny, tmp_path):  # noqa: F811
    """Also as torchvision's training script saves them, with norms that were trained."""
    model = random_model(num_classes=5)
    torch.save({"model": model.state_dict()}, tmp_path / "own.pth")
    detector = build_detector(
        configuration("roi=align_no_half_pixel", f"detector.weights={tmp_path}/own.pth", f"detector.categories=[{','.join(NAMES)}]"), None
    ).eval()
    detector.match_categories([{"id": i, "name": name} for i, name in enumerate(NAMES[1:], 1)])
    images, targets = images_and_targets()
    with torch.no_grad():
        assert_same_detections(detector(images, targets)[0], model([image / 255 for image in images]))


def test_names_of_a_named_file_are_known(tiny, cache):  # noqa: F811
    cache(TinyWeights.COCO_V1, random_model(num_classes=5))
    with pytest.raises(InputError, match=r"detector\.categories: the names of detector\.weights=COCO_V1 are known"):
        build_detector(configuration("detector.weights=COCO_V1", "detector.categories=[a]"), None)
    assert build_detector(configuration("detector.weights=COCO_V1"), None).class_names == NAMES
