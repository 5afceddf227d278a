"""Import from and export to torchvision, through files and commands: the detections of torchvision's own code."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection import (
    RetinaNet_ResNet50_FPN_Weights,
    retinanet_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
)
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detector.checkpoint import load_checkpoint
from detector.datasets.images import decode_image
from detector.datasets.loader import Sample, collate, to_device
from detector.datasets.objects import NO_OBJECTS
from detector.datasets.sampling import SampleKey
from detector.datasets.transforms import padded_size, resized_size
from detector.inference.postprocess import postprocess
from detector.inference.predictor import load_predictor
from detector.weights.coco_classes import COCO
from detector.weights.foreign import import_detector
from detector.weights.from_torchvision import PUBLISHED_WITHOUT_EPS
from detector.weights.import_facts import ImportOptions
from tests.weights.peer_models import (
    MAX_SIZE,
    MIN_SIZE,
    PeerDetections,
    assert_same_detections,
    detect_with_package,
    write_images,
)
from tools.convert_weights import main as convert

PUBLISHED = PUBLISHED_WITHOUT_EPS  # before a test replaces it


def frozen(num_classes: int = 91, *, eps: float = 0.0) -> TorchvisionRetinaNet:
    """Build the network of `retinanet_resnet50_fpn(weights=COCO_V1)`, whose weights cannot be downloaded here."""
    body = torchvision.models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    extra = LastLevelP6P7(256, 256)
    backbone = _resnet_fpn_extractor(body, 3, returned_layers=[2, 3, 4], extra_blocks=extra)
    model = TorchvisionRetinaNet(backbone, num_classes, min_size=MIN_SIZE, max_size=MAX_SIZE)
    overwrite_eps(model, eps)
    return model


def v1(num_classes: int = 91) -> TorchvisionRetinaNet:
    return retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=num_classes, min_size=MIN_SIZE, max_size=MAX_SIZE
    )


def v2(num_classes: int = 91) -> TorchvisionRetinaNet:
    return retinanet_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=num_classes, min_size=MIN_SIZE, max_size=MAX_SIZE
    )


BUILDS: dict[str, Callable[..., TorchvisionRetinaNet]] = {"frozen": frozen, "v1": v1, "v2": v2}


def scrambled(model: TorchvisionRetinaNet, *, seed: int = 0) -> TorchvisionRetinaNet:
    """Set weights that yield a few hundred detections, and statistics other than the initial ones."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d):
            with torch.no_grad():
                module.get_buffer("running_mean").uniform_(-0.1, 0.1)
                module.get_buffer("running_var").uniform_(0.8, 1.5)
                module.weight.uniform_(0.5, 1.0)
                module.bias.uniform_(-0.1, 0.1)
    head = model.head
    with torch.no_grad():
        for conv in [m for m in head.modules() if isinstance(m, nn.Conv2d)]:
            conv.weight.normal_(0, 1.2 * (2 / (9 * conv.in_channels)) ** 0.5)
            if conv.bias is not None:
                conv.bias.uniform_(-0.05, 0.05)
        head.regression_head.bbox_reg.weight.mul_(0.05)
    return model.eval()


@torch.no_grad()
def spread_scores(model: TorchvisionRetinaNet, images: list[Tensor], share: float = 1.5e-4) -> None:
    """Scale and shift the class scores so that all classes have equal distributions and a `share` of all scores exceeds
    the threshold."""
    head = model.head.classification_head
    last = head.cls_logits
    inputs, _ = model.transform([image.clone() for image in images])
    features = list(model.backbone(inputs.tensors).values())
    maps = [last(head.conv(x)).transpose(0, 1).flatten(1) for x in features]
    logits = torch.cat(maps, dim=1)  # (anchors per cell * classes, all positions)
    last.bias.sub_(logits.mean(dim=1))
    logits = logits - logits.mean(dim=1, keepdim=True)
    factor = 1 / logits.std(dim=1)
    last.weight.mul_(factor[:, None, None, None])
    last.bias.mul_(factor)
    logits = (logits * factor[:, None]).flatten()
    # between two logits, so that the threshold is no near-tie
    limit = torch.topk(logits, int(share * len(logits)) + 1).values[-2:].mean()
    last.bias.sub_(limit - float(torch.logit(torch.tensor(0.05))))


def read_for_torchvision(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255


@torch.no_grad()
def detect_with_torchvision(model: TorchvisionRetinaNet, image: Tensor, categories: tuple[int, ...]) -> PeerDetections:
    model.detections_per_img = 10_000
    (output,) = model([image])
    used = torch.isin(output["labels"], torch.tensor(categories))
    return PeerDetections(output["boxes"][used], output["scores"][used], output["labels"][used])


def converted(model: nn.Module, folder: Path, *options: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "source.pth")
    destination = folder / "converted.pt"
    argv = [str(folder / "source.pth"), str(destination), *options]
    assert convert([*argv, f"data.min_size={MIN_SIZE}", f"data.max_size={MAX_SIZE}"]) == 0
    return destination


@pytest.mark.parametrize(
    "name", [name if name == "v2" else pytest.param(name, marks=pytest.mark.slow) for name in BUILDS]
)
def test_converted_networks_have_the_detections_of_torchvision(name: str, tmp_path: Path) -> None:
    paths = write_images(tmp_path / "in")
    model = scrambled(BUILDS[name]())
    images = [read_for_torchvision(path) for path in paths]
    spread_scores(model, images)
    checkpoint = converted(model, tmp_path, "postprocess.detections_per_img=10000")
    total = 0
    for image, detections in zip(images, detect_with_package(tmp_path / "out", checkpoint, paths), strict=True):
        expected = detect_with_torchvision(model, image, COCO.ids)
        total += len(expected.scores)
        assert_same_detections(detections, expected)
    assert total >= 300, "too few detections for a meaningful test"


def test_real_photos_give_the_same_detections(shared: Path, tmp_path: Path) -> None:
    paths = sorted((shared / "datasets" / "coco_permissive").rglob("*.jpg"))[:3]
    assert len(paths) == 3
    model = scrambled(v2())
    images = [read_for_torchvision(path) for path in paths]
    spread_scores(model, images)
    checkpoint = converted(model, tmp_path, "postprocess.detections_per_img=10000")
    for image, detections in zip(images, detect_with_package(tmp_path / "out", checkpoint, paths), strict=True):
        expected = detect_with_torchvision(model, image, COCO.ids)
        assert len(expected.scores) > 30
        assert_same_detections(detections, expected)


@torch.no_grad()
def test_a_batch_of_images_of_several_sizes_gives_the_same_detections(tmp_path: Path) -> None:
    """torchvision pads all images to the largest; so does a training step."""
    paths = write_images(tmp_path / "in")[:4]
    images = [read_for_torchvision(path) for path in paths]
    model = scrambled(frozen())
    spread_scores(model, images)
    predictor = load_predictor(converted(model, tmp_path), device=torch.device("cpu"))
    samples = []
    for path in paths:
        image = decode_image(path, apply_exif=True)
        original = (image.shape[0], image.shape[1])
        size = resized_size(original, min_size=MIN_SIZE, max_size=MAX_SIZE, resize="float_bilinear")
        samples.append(Sample(image, size, NO_OBJECTS, 0, original, SampleKey(0, 0, MIN_SIZE, (0, 0))))
    largest = (max(s.size[0] for s in samples), max(s.size[1] for s in samples))
    canvas = padded_size(largest, predictor.config.model.pad)
    loaded = collate([s._replace(key=s.key._replace(canvas=canvas)) for s in samples])
    batch = to_device(loaded, torch.device("cpu"))
    settings = predictor.detector.settings | {"detections_per_img": 10_000}
    outputs = postprocess(
        predictor.detector.outputs(batch.images, batch.image_sizes),
        batch.image_sizes,
        original_sizes=batch.original_sizes,
        **settings,
    )
    model.detections_per_img = 10_000
    total = 0
    for output, expected in zip(outputs, model(images), strict=True):
        used = torch.isin(expected["labels"], torch.tensor(COCO.ids))
        total += int(used.sum())
        assert_same_detections(
            PeerDetections(output.boxes, output.scores, torch.tensor(COCO.ids)[output.labels]),
            PeerDetections(expected["boxes"][used], expected["scores"][used], expected["labels"][used]),
        )
    assert total >= 200


def export_after_import(model: nn.Module, folder: Path, *options: str) -> dict[str, Tensor]:
    checkpoint = converted(model, folder, *options)
    assert convert([str(checkpoint), str(folder / "exported.pth"), "--to", "torchvision"]) == 0
    state: dict[str, Tensor] = torch.load(folder / "exported.pth", weights_only=True)
    return state


@pytest.mark.parametrize("name", BUILDS)
def test_export_after_import_is_bit_identical_except_for_unused_outputs(name: str, tmp_path: Path) -> None:
    model = scrambled(BUILDS[name]())
    before = model.state_dict()
    exported = export_after_import(model, tmp_path)
    BUILDS[name]().load_state_dict(exported, strict=True)
    assert exported.keys() == before.keys()
    unused = [i for i in range(91) if i not in COCO.ids]
    for key, value in before.items():
        if "cls_logits" not in key:
            assert torch.equal(exported[key], value), key
            continue
        actual, expected = (torch.unflatten(x, 0, (9, 91)) for x in (exported[key], value))
        assert torch.equal(actual[:, list(COCO.ids)], expected[:, list(COCO.ids)])
        assert (actual[:, unused] == (0 if key.endswith("weight") else -100)).all()
    assert torch.sigmoid(torch.tensor(-100.0)) < 1e-40


def test_tensor_names_of_old_files_are_recognised(tmp_path: Path) -> None:
    """Before 0.12, towers were plain sequences and the names of the pyramid's convolutions had one level less."""
    model = scrambled(frozen())
    new = converted(model, tmp_path / "new")
    old = {}
    for key, value in model.state_dict().items():
        name = re.sub(r"\.conv\.(\d)\.0\.", lambda m: f".conv.{2 * int(m[1])}.", key)
        old[re.sub(r"(inner|layer)_blocks\.(\d)\.0\.", r"\1_blocks.\2.", name)] = value
    assert old.keys() != model.state_dict().keys()
    content = {"model": old, "args": argparse.Namespace(lr=0.01)}  # the format of torchvision's reference script
    torch.save(content, tmp_path / "old.pth")
    assert convert([str(tmp_path / "old.pth"), str(tmp_path / "old.pt")]) == 0
    one, other = (load_checkpoint(p).model for p in (new, tmp_path / "old.pt"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("build", "options", "norm", "eps", "note"),
    [
        (frozen, [], "frozen_bn", 0.0, True),
        (partial(frozen, 7), ["--categories", "a,b,c,d,e,f"], "frozen_bn", 1e-5, True),
        (partial(frozen, 7), ["--categories", "a,b,c,d,e,f", "--norm-eps", "0"], "frozen_bn", 0.0, False),
        (frozen, ["--norm-eps", "1e-5"], "frozen_bn", 1e-5, False),
        (v1, [], "bn", 1e-5, False),
        (v2, [], "bn", 1e-5, False),
    ],
)
def test_the_epsilon_is_recognised_or_assumed_with_a_note(
    build: Callable[[], nn.Module],
    options: list[str],
    norm: str,
    eps: float,
    note: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = load_checkpoint(converted(build(), tmp_path, *options)).config
    assert (config.model.norm, config.model.compat.norm_eps) == (norm, eps)
    assert ("norm_eps" in capsys.readouterr().out) == note


def test_the_published_file_is_recognised_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(frozen(7).state_dict(), tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    monkeypatch.setattr("detector.weights.from_torchvision.PUBLISHED_WITHOUT_EPS", digest[:8])
    imported = import_detector(tmp_path / "w.pth", options=ImportOptions(categories="a,b,c,d,e,f,g"))
    assert imported.model.compat.norm_eps == 0
    assert not any("norm_eps" in note for note in imported.notes)
    name = str(RetinaNet_ResNet50_FPN_Weights.COCO_V1.url)
    assert name.endswith(f"-{PUBLISHED}.pth"), "torchvision's file names end with the start of the hash"


@pytest.mark.parametrize(
    ("classes", "rows"),
    [("a,b,c", [1, 2, 3]), ("a,b,c,d", [0, 1, 2, 3])],
    ids=["the first output is the background", "every output is a class"],
)
def test_class_names_are_assigned_to_outputs_in_order(classes: str, rows: list[int], tmp_path: Path) -> None:
    model = scrambled(frozen(4))
    state = load_checkpoint(converted(model, tmp_path, "--categories", classes))
    assert state.categories.names == tuple(classes.split(","))
    assert state.categories.ids == tuple(range(1, len(rows) + 1))
    for kind in ("weight", "bias"):
        expected = torch.unflatten(model.state_dict()[f"head.classification_head.cls_logits.{kind}"], 0, (9, 4))
        actual = torch.unflatten(state.model[f"cls_subnet.predictor.{kind}"], 0, (9, -1))
        assert torch.equal(actual, expected[:, rows])


def test_ids_of_a_coco_file_select_the_outputs(tmp_path: Path) -> None:
    categories = [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}]
    (tmp_path / "c.json").write_text(json.dumps({"categories": categories}))
    model = scrambled(frozen(6))
    state = load_checkpoint(converted(model, tmp_path, "--categories", str(tmp_path / "c.json")))
    assert (state.categories.ids, state.categories.names) == ((2, 5), ("dog", "cat"))
    expected = torch.unflatten(model.state_dict()["head.classification_head.cls_logits.bias"], 0, (9, 6))
    actual = torch.unflatten(state.model["cls_subnet.predictor.bias"], 0, (9, -1))
    assert torch.equal(actual, expected[:, [2, 5]])


def test_the_error_for_a_file_without_class_names_names_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(frozen(4).state_dict(), tmp_path / "w.pth")
    assert convert([str(tmp_path / "w.pth"), str(tmp_path / "converted.pt")]) == 2
    printed = capsys.readouterr().err
    assert "4 outputs" in printed
    assert "--categories FILE.json" in printed
    assert convert([str(tmp_path / "w.pth"), str(tmp_path / "converted.pt"), "--categories", "a,b"]) == 2
    assert "must name 4 classes" in capsys.readouterr().err
    assert not (tmp_path / "converted.pt").exists()


def test_networks_that_torchvision_cannot_build_are_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = converted(
        scrambled(frozen()), tmp_path, "model.compat.anchor_center_offset=0.5", "model.compat.channel_order=bgr"
    )
    assert convert([str(checkpoint), str(tmp_path / "exported.pth"), "--to", "torchvision"]) == 2
    printed = capsys.readouterr().err
    assert "model.compat.anchor_center_offset must be 0.0, got 0.5" in printed
    assert "model.compat.channel_order must be rgb, got bgr" in printed
    assert not (tmp_path / "exported.pth").exists()


@pytest.mark.parametrize(
    "setting",
    [
        "model.anchors.sizes=[[16,20,25],[32,40,50],[64,80,101],[128,161,203],[256,322,406]]",
        "model.anchors.ratios=[0.5,1.0,3.0]",
        "model.pixel_mean=[1,2,3]", "model.pixel_std=[1,1,1]", "model.compat.relu_before_p7=false",
    ],
)  # fmt: skip
def test_settings_that_torchvision_lacks_are_not_exported(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = converted(frozen(4), tmp_path, "--categories", "a,b,c", setting)
    assert convert([str(checkpoint), str(tmp_path / "exported.pth"), "--to", "torchvision"]) == 2
    assert setting.partition("=")[0].rpartition(".sizes")[0] or setting.partition("=")[0] in capsys.readouterr().err


def test_other_classes_are_exported_after_the_background(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = export_after_import(scrambled(v2(4)), tmp_path, "--categories", "a,b,c")
    printed = capsys.readouterr().out
    assert "retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=4)" in printed
    assert "labels: 0 the background, then a, b, c" in printed
    assert "overwrite_eps" not in printed
    v2(4).load_state_dict(exported, strict=True)
    assert (torch.unflatten(exported["head.classification_head.cls_logits.bias"], 0, (9, 4))[:, 0] == -100).all()


def test_a_file_is_loaded_directly_as_after_conversion(tmp_path: Path) -> None:
    model = scrambled(frozen())
    torch.save(model.state_dict(), tmp_path / "source.pth")
    direct = load_checkpoint(tmp_path / "source.pth")
    assert convert([str(tmp_path / "source.pth"), str(tmp_path / "converted.pt")]) == 0
    stored = load_checkpoint(tmp_path / "converted.pt")
    assert direct.config == stored.config
    assert direct.categories == stored.categories == COCO
    assert direct.origin == stored.origin
    assert all(torch.equal(direct.model[k], v) for k, v in stored.model.items())
