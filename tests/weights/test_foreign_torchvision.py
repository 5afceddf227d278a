"""torchvision's RetinaNets, by way of our files and commands: the same detections as from torchvision's own code."""

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
from detector.datasets.loader import EMPTY, Sample, collate, to_device
from detector.datasets.sampling import SampleKey
from detector.datasets.transforms import padded_size, resized_size
from detector.inference.postprocess import postprocess
from detector.inference.predictor import load_predictor
from detector.weights.coco_classes import COCO
from detector.weights.foreign import import_detector
from detector.weights.from_torchvision import PUBLISHED_WITHOUT_EPS
from detector.weights.name_maps import Said
from tests.weights.peer_models import MAX_SIZE, MIN_SIZE, Objects, assert_same, by_us, pictures
from tools.convert_weights import main as convert

PUBLISHED = PUBLISHED_WITHOUT_EPS  # before a test replaces it


def frozen(num_classes: int = 91, *, eps: float = 0.0) -> TorchvisionRetinaNet:
    """As `retinanet_resnet50_fpn(weights=COCO_V1)`, which cannot be downloaded here, is built."""
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
    """Weights that make a few hundred detections, and statistics that are not at their initial values."""
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
    """Scale and shift the class scores so that every class has its share and so many of all are above the threshold."""
    head = model.head.classification_head
    last = head.cls_logits
    inputs, _ = model.transform([image.clone() for image in images])
    features = list(model.backbone(inputs.tensors).values())
    maps = [last(head.conv(x)).transpose(0, 1).flatten(1) for x in features]
    logits = torch.cat(maps, dim=1)  # (anchors of a cell * classes, all positions)
    last.bias.sub_(logits.mean(dim=1))
    logits = logits - logits.mean(dim=1, keepdim=True)
    factor = 1 / logits.std(dim=1)
    last.weight.mul_(factor[:, None, None, None])
    last.bias.mul_(factor)
    logits = (logits * factor[:, None]).flatten()
    at = (
        torch.topk(logits, int(share * len(logits)) + 1).values[-2:].mean()
    )  # between two: the threshold is no near-tie
    last.bias.sub_(at - float(torch.logit(torch.tensor(0.05))))


def as_torchvision_reads(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255


@torch.no_grad()
def by_torchvision(model: TorchvisionRetinaNet, image: Tensor, categories: tuple[int, ...]) -> Objects:
    model.detections_per_img = 10_000
    (found,) = model([image])
    real = torch.isin(found["labels"], torch.tensor(categories))
    return Objects(found["boxes"][real], found["scores"][real], found["labels"][real])


def converted(model: nn.Module, folder: Path, *options: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "theirs.pth")
    destination = folder / "ours.pt"
    argv = [str(folder / "theirs.pth"), str(destination), *options]
    assert convert([*argv, f"data.min_size={MIN_SIZE}", f"data.max_size={MAX_SIZE}"]) == 0
    return destination


@pytest.mark.parametrize(
    "name", [name if name == "v2" else pytest.param(name, marks=pytest.mark.slow) for name in BUILDS]
)
def test_converted_networks_find_what_torchvision_finds(name: str, tmp_path: Path) -> None:
    paths = pictures(tmp_path / "in")
    model = scrambled(BUILDS[name]())
    images = [as_torchvision_reads(path) for path in paths]
    spread_scores(model, images)
    checkpoint = converted(model, tmp_path, "postprocess.detections_per_img=10000")
    total = 0
    for image, ours in zip(images, by_us(tmp_path / "out", checkpoint, paths), strict=True):
        theirs = by_torchvision(model, image, COCO.ids)
        total += len(theirs.scores)
        assert_same(ours, theirs)
    assert total >= 300, "weights that find nothing prove nothing"


def test_real_photographs_give_the_same_detections(shared: Path, tmp_path: Path) -> None:
    paths = sorted((shared / "datasets" / "coco_permissive").rglob("*.jpg"))[:3]
    assert len(paths) == 3
    model = scrambled(v2())
    images = [as_torchvision_reads(path) for path in paths]
    spread_scores(model, images)
    checkpoint = converted(model, tmp_path, "postprocess.detections_per_img=10000")
    for image, ours in zip(images, by_us(tmp_path / "out", checkpoint, paths), strict=True):
        theirs = by_torchvision(model, image, COCO.ids)
        assert len(theirs.scores) > 30
        assert_same(ours, theirs)


@torch.no_grad()
def test_a_batch_of_pictures_of_several_sizes_gives_the_same(tmp_path: Path) -> None:
    """torchvision pads all to the largest; so does a training step of ours."""
    paths = pictures(tmp_path / "in")[:4]
    images = [as_torchvision_reads(path) for path in paths]
    model = scrambled(frozen())
    spread_scores(model, images)
    predictor = load_predictor(converted(model, tmp_path), device=torch.device("cpu"))
    samples = []
    for path in paths:
        image = decode_image(path, apply_exif=True)
        original = (image.shape[0], image.shape[1])
        size = resized_size(original, min_size=MIN_SIZE, max_size=MAX_SIZE, resize="float_bilinear")
        samples.append(Sample(image, size, EMPTY, 0, original, SampleKey(0, 0, MIN_SIZE, (0, 0))))
    largest = (max(s.size[0] for s in samples), max(s.size[1] for s in samples))
    canvas = padded_size(largest, predictor.config.model.pad)
    loaded = collate([s._replace(key=s.key._replace(canvas=canvas)) for s in samples])
    batch = to_device(loaded, torch.device("cpu"))
    settings = predictor.detector.settings | {"detections_per_img": 10_000}
    found = postprocess(
        predictor.detector.outputs(batch.images, batch.image_sizes),
        batch.image_sizes,
        original_sizes=batch.original_sizes,
        **settings,
    )
    model.detections_per_img = 10_000
    total = 0
    for ours, theirs in zip(found, model(images), strict=True):
        real = torch.isin(theirs["labels"], torch.tensor(COCO.ids))
        total += int(real.sum())
        assert_same(
            Objects(ours.boxes, ours.scores, torch.tensor(COCO.ids)[ours.labels]),
            Objects(theirs["boxes"][real], theirs["scores"][real], theirs["labels"][real]),
        )
    assert total >= 200


def to_torchvision_and_back(model: nn.Module, folder: Path, *options: str) -> dict[str, Tensor]:
    checkpoint = converted(model, folder, *options)
    assert convert([str(checkpoint), str(folder / "back.pth"), "--to", "torchvision"]) == 0
    state: dict[str, Tensor] = torch.load(folder / "back.pth", weights_only=True)
    return state


@pytest.mark.parametrize("name", BUILDS)
def test_there_and_back_every_tensor_is_the_same_but_for_outputs_that_stand_for_nothing(
    name: str, tmp_path: Path
) -> None:
    model = scrambled(BUILDS[name]())
    before = model.state_dict()
    back = to_torchvision_and_back(model, tmp_path)
    BUILDS[name]().load_state_dict(back, strict=True)
    assert back.keys() == before.keys()
    unused = [i for i in range(91) if i not in COCO.ids]
    for key, value in before.items():
        if "cls_logits" not in key:
            assert torch.equal(back[key], value), key
            continue
        ours, theirs = (torch.unflatten(x, 0, (9, 91)) for x in (back[key], value))
        assert torch.equal(ours[:, list(COCO.ids)], theirs[:, list(COCO.ids)])
        assert (ours[:, unused] == (0 if key.endswith("weight") else -100)).all()
    assert torch.sigmoid(torch.tensor(-100.0)) < 1e-40


def test_names_of_old_files_are_understood(tmp_path: Path) -> None:
    """Before 0.12, towers were plain sequences and the pyramid's convolutions lay one level higher."""
    model = scrambled(frozen())
    new = converted(model, tmp_path / "new")
    old = {}
    for key, value in model.state_dict().items():
        name = re.sub(r"\.conv\.(\d)\.0\.", lambda m: f".conv.{2 * int(m[1])}.", key)
        old[re.sub(r"(inner|layer)_blocks\.(\d)\.0\.", r"\1_blocks.\2.", name)] = value
    assert old.keys() != model.state_dict().keys()
    torch.save(
        {"model": old, "args": argparse.Namespace(lr=0.01)}, tmp_path / "old.pth"
    )  # as its reference script does
    assert convert([str(tmp_path / "old.pth"), str(tmp_path / "old.pt")]) == 0
    one, other = (load_checkpoint(p).model for p in (new, tmp_path / "old.pt"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("build", "options", "norm", "eps", "said"),
    [
        (frozen, [], "frozen_bn", 0.0, True),
        (partial(frozen, 7), ["--categories", "a,b,c,d,e,f"], "frozen_bn", 1e-5, True),
        (partial(frozen, 7), ["--categories", "a,b,c,d,e,f", "--norm-eps", "0"], "frozen_bn", 0.0, False),
        (frozen, ["--norm-eps", "1e-5"], "frozen_bn", 1e-5, False),
        (v1, [], "bn", 1e-5, False),
        (v2, [], "bn", 1e-5, False),
    ],
)
def test_the_epsilon_is_recognised_or_assumed_aloud(
    build: Callable[[], nn.Module],
    options: list[str],
    norm: str,
    eps: float,
    said: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = load_checkpoint(converted(build(), tmp_path, *options)).config
    assert (config.model.norm, config.model.norm_eps) == (norm, eps)
    assert ("norm_eps" in capsys.readouterr().out) == said


def test_the_published_file_is_known_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(frozen(7).state_dict(), tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    monkeypatch.setattr("detector.weights.from_torchvision.PUBLISHED_WITHOUT_EPS", digest[:8])
    imported = import_detector(tmp_path / "w.pth", said=Said(categories="a,b,c,d,e,f,g"))
    assert imported.model.norm_eps == 0
    assert not any("norm_eps" in note for note in imported.notes)
    name = str(RetinaNet_ResNet50_FPN_Weights.COCO_V1.url)
    assert name.endswith(f"-{PUBLISHED}.pth"), "torchvision names its files by the start of their hash"


@pytest.mark.parametrize(
    ("classes", "rows"),
    [("a,b,c", [1, 2, 3]), ("a,b,c,d", [0, 1, 2, 3])],
    ids=["the first output is the background", "every output is a class"],
)
def test_outputs_of_other_models_are_named_in_order(classes: str, rows: list[int], tmp_path: Path) -> None:
    model = scrambled(frozen(4))
    state = load_checkpoint(converted(model, tmp_path, "--categories", classes))
    assert state.categories.names == tuple(classes.split(","))
    assert state.categories.ids == tuple(range(1, len(rows) + 1))
    for kind in ("weight", "bias"):
        theirs = torch.unflatten(model.state_dict()[f"head.classification_head.cls_logits.{kind}"], 0, (9, 4))
        ours = torch.unflatten(state.model[f"cls_subnet.predictor.{kind}"], 0, (9, -1))
        assert torch.equal(ours, theirs[:, rows])


def test_a_coco_file_names_outputs_by_its_ids(tmp_path: Path) -> None:
    categories = [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}]
    (tmp_path / "c.json").write_text(json.dumps({"categories": categories}))
    model = scrambled(frozen(6))
    state = load_checkpoint(converted(model, tmp_path, "--categories", str(tmp_path / "c.json")))
    assert (state.categories.ids, state.categories.names) == ((2, 5), ("dog", "cat"))
    theirs = torch.unflatten(model.state_dict()["head.classification_head.cls_logits.bias"], 0, (9, 6))
    ours = torch.unflatten(state.model["cls_subnet.predictor.bias"], 0, (9, -1))
    assert torch.equal(ours, theirs[:, [2, 5]])


def test_a_file_without_class_names_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(frozen(4).state_dict(), tmp_path / "w.pth")
    assert convert([str(tmp_path / "w.pth"), str(tmp_path / "ours.pt")]) == 2
    told = capsys.readouterr().err
    assert "4 outputs" in told
    assert "--categories FILE.json" in told
    assert convert([str(tmp_path / "w.pth"), str(tmp_path / "ours.pt"), "--categories", "a,b"]) == 2
    assert "must name 4 classes" in capsys.readouterr().err
    assert not (tmp_path / "ours.pt").exists()


def test_networks_that_torchvision_cannot_build_are_not_written_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = converted(scrambled(frozen()), tmp_path, "model.anchors.center_offset=0.5", "model.channel_order=bgr")
    assert convert([str(checkpoint), str(tmp_path / "back.pth"), "--to", "torchvision"]) == 2
    told = capsys.readouterr().err
    assert "model.anchors.center_offset is 0.5, there it is always 0" in told
    assert "model.channel_order is bgr" in told
    assert not (tmp_path / "back.pth").exists()


@pytest.mark.parametrize(
    "setting",
    [
        "model.anchors.sizes=[[16,20,25],[32,40,50],[64,80,101],[128,161,203],[256,322,406]]", "model.anchors.ratios=[0.5,1.0,3.0]",
        "model.pixel_mean=[1,2,3]", "model.pixel_std=[1,1,1]", "model.relu_before_p7=false",
    ],
)  # fmt: skip
def test_what_torchvision_would_do_otherwise_is_not_written_for_it(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = converted(frozen(4), tmp_path, "--categories", "a,b,c", setting)
    assert convert([str(checkpoint), str(tmp_path / "back.pth"), "--to", "torchvision"]) == 2
    assert setting.partition("=")[0].rpartition(".sizes")[0] or setting.partition("=")[0] in capsys.readouterr().err


def test_own_classes_are_written_after_the_background(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    back = to_torchvision_and_back(scrambled(v2(4)), tmp_path, "--categories", "a,b,c")
    told = capsys.readouterr().out
    assert "retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=4)" in told
    assert "labels: 0 the background, then a, b, c" in told
    assert "overwrite_eps" not in told
    v2(4).load_state_dict(back, strict=True)
    assert (torch.unflatten(back["head.classification_head.cls_logits.bias"], 0, (9, 4))[:, 0] == -100).all()


def test_a_foreign_file_serves_without_conversion(tmp_path: Path) -> None:
    model = scrambled(frozen())
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    direct = load_checkpoint(tmp_path / "theirs.pth")
    assert convert([str(tmp_path / "theirs.pth"), str(tmp_path / "ours.pt")]) == 0
    stored = load_checkpoint(tmp_path / "ours.pt")
    assert direct.config == stored.config
    assert direct.categories == stored.categories == COCO
    assert direct.origin == stored.origin
    assert all(torch.equal(direct.model[k], v) for k, v in stored.model.items())
