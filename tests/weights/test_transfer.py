"""Weights of backbones and of other detectors: what is loaded, what is left, and what fine-tuning keeps."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor
from torchvision.models import Weights, WeightsEnum

from detector.config import ModelConfig, Norm
from detector.errors import WeightsError
from detector.models import RetinaNet, build_model
from detector.models.backbone import ResNet
from detector.models.heads import prior_bias
from detector.structures import Categories
from detector.weights.safe_load import read_tensors
from detector.weights.transfer import TransferRow, canonical_name, load_backbone_weights, transfer
from tests.weights.test_safe_load import Malicious, some_tensors

PARTIAL = "weights/resnet18_imagenet_stem_to_layer3.npz"


def resnet18(norm: Norm = "bn", trainable: int = 5) -> ResNet:
    torch.manual_seed(0)
    return ResNet("resnet18", norm=norm, norm_eps=1e-5, num_trainable_layers=trainable)


def imagenet_like(seed: int = 1) -> dict[str, Tensor]:
    """The state of a whole torchvision ResNet-18, classifier included."""
    torch.manual_seed(seed)
    state: dict[str, Tensor] = torchvision.models.resnet18(weights=None).state_dict()
    return state


@pytest.mark.parametrize("norm", ["bn", "frozen_bn", "sync_bn"])
@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.body.", "module."])
def test_a_whole_file_fills_every_layer(norm: Norm, prefix: str, tmp_path: Path) -> None:
    state = imagenet_like()
    torch.save({prefix + k: v for k, v in state.items()}, tmp_path / "w.pth")
    backbone = resnet18(norm, trainable=3)
    report = load_backbone_weights(backbone, "resnet18", str(tmp_path / "w.pth"))
    assert report is not None
    assert (report.missing, report.unused, report.misshapen) == ([], [], [])
    assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())


def test_no_weights_are_loaded_where_none_are_wanted() -> None:
    assert load_backbone_weights(resnet18(), "resnet18", "none") is None


def test_a_real_partial_file_fills_what_it_has_and_reports_the_rest(shared: Path) -> None:
    backbone = resnet18("bn")
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    report = load_backbone_weights(backbone, "resnet18", str(shared / PARTIAL))
    assert report is not None
    weights = read_tensors(shared / PARTIAL)
    after = backbone.state_dict()
    assert set(report.loaded) == set(weights)
    assert all(torch.equal(after[k], v) for k, v in weights.items())
    assert report.missing
    assert all(k.startswith("layer4") for k in report.missing)
    assert all(torch.equal(after[k], before[k]) for k in report.missing)
    assert f"{len(report.missing)} not in the file, left at their initial values: layer4.0" in str(report)


def test_a_real_partial_file_is_refused_where_batch_norm_is_frozen(shared: Path) -> None:
    with pytest.raises(WeightsError, match=r"must not be frozen_bn .* no statistics for layer4.*set model\.norm=bn"):
        load_backbone_weights(resnet18("frozen_bn"), "resnet18", str(shared / PARTIAL))


@pytest.mark.parametrize("trainable", range(6))
def test_layers_without_weights_must_be_trained(trainable: int, tmp_path: Path) -> None:
    state = imagenet_like()
    torch.save({k: v for k, v in state.items() if not k.startswith("layer1")}, tmp_path / "w.pth")
    backbone = resnet18("bn", trainable)
    if trainable >= 4:  # layer1 is trained
        assert load_backbone_weights(backbone, "resnet18", str(tmp_path / "w.pth")) is not None
        return
    with pytest.raises(WeightsError, match=r"trainable_layers must be higher: .* has nothing for layer1"):
        load_backbone_weights(backbone, "resnet18", str(tmp_path / "w.pth"))


def test_weights_of_another_architecture_are_reported_or_refused(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "w.pth")
    report = load_backbone_weights(resnet18(), "resnet18", str(tmp_path / "w.pth"))
    assert report is not None
    assert "layer1.0.conv1.weight" in report.misshapen
    assert "layer1.0.conv3.weight" in report.unused
    assert "of another shape" in str(report)
    torch.save(some_tensors() | {"conv1.weight": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"must hold weights of resnet18 under torchvision's names"):
        load_backbone_weights(resnet18(), "resnet18", str(tmp_path / "w.pth"))


def test_group_norm_does_not_take_batch_norms_numbers(tmp_path: Path) -> None:
    state = imagenet_like()
    for key in state:
        if ".bn" in key or key.startswith("bn"):
            state[key].fill_(7)
    torch.save(state, tmp_path / "w.pth")
    backbone = resnet18("gn")
    report = load_backbone_weights(backbone, "resnet18", str(tmp_path / "w.pth"))
    assert report is not None
    assert "bn1.weight" in report.missing
    assert (backbone.get_parameter("bn1.weight") == 1).all()
    assert torch.equal(backbone.get_parameter("conv1.weight"), state["conv1.weight"])


class Download:
    """A server on this machine that stands for download.pytorch.org."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.path = folder / "unwritten"

    def offer(self, content: Any, monkeypatch: pytest.MonkeyPatch, digest: str | None = None) -> None:
        """Have torchvision's ResNet-18 weights come from here."""
        torch.save(content, self.folder / "new")
        digest = digest or hashlib.sha256((self.folder / "new").read_bytes()).hexdigest()[:8]
        self.path = (self.folder / "new").rename(self.folder / f"resnet18-{digest}.pth")
        url = f"http://127.0.0.1:{self.port}/{self.path.name}"
        weights: Any = Weights(url=url, transforms=lambda: None, meta={})
        enum: Any = WeightsEnum("Offered", {"IMAGENET1K_V1": weights})
        monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: enum)


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Download]:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    torch_hub_dir = torch.hub._hub_dir
    torch.hub._hub_dir = None
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Download(folder, server.server_address[1])
    server.shutdown()
    server.server_close()
    torch.hub._hub_dir = torch_hub_dir


def test_imagenet_weights_are_downloaded_once(download: Download, monkeypatch: pytest.MonkeyPatch) -> None:
    state = imagenet_like()
    download.offer(state, monkeypatch)
    backbone = resnet18("frozen_bn", trainable=3)
    report = load_backbone_weights(backbone, "resnet18", "imagenet")
    assert report is not None
    assert not report.missing
    assert torch.equal(backbone.get_parameter("conv1.weight"), state["conv1.weight"])
    download.path.unlink()
    assert load_backbone_weights(resnet18(), "resnet18", "imagenet") is not None


def test_a_failing_download_says_where_to_put_the_file(
    download: Download, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    download.offer(imagenet_like(), monkeypatch)
    download.path.unlink()
    with pytest.raises(WeightsError, match="downloading the ImageNet weights of resnet18 failed") as caught:
        load_backbone_weights(resnet18(), "resnet18", "imagenet")
    target = tmp_path / "home" / "hub" / "checkpoints" / download.path.name
    assert f"put it at {target}" in str(caught.value)
    assert "404" in str(caught.value)
    torch.save(imagenet_like(), target)  # as told
    assert load_backbone_weights(resnet18(), "resnet18", "imagenet") is not None


def test_a_backbone_that_torchvision_has_no_weights_of_is_told() -> None:
    with torch.device("meta"):
        backbone = ResNet("resnext101_32x4d", norm="bn", norm_eps=1e-5, num_trainable_layers=5)
    with pytest.raises(WeightsError, match=r"no ImageNet weights of resnext101_32x4d; set model\.backbone_weights"):
        load_backbone_weights(backbone, "resnext101_32x4d", "imagenet")


def test_a_download_of_other_content_than_promised_is_refused(
    download: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    download.offer(imagenet_like(), monkeypatch, digest="00000000")
    with pytest.raises(WeightsError, match="invalid hash value"):
        load_backbone_weights(resnet18(), "resnet18", "imagenet")


def test_code_in_a_download_is_not_run(download: Download, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    download.offer({"conv1.weight": Malicious(tmp_path / "ran")}, monkeypatch)
    with pytest.raises(WeightsError, match=r"failed \(Trying to load unsupported GLOBAL posix\.mkdir"):
        load_backbone_weights(resnet18(), "resnet18", "imagenet")
    assert not (tmp_path / "ran").exists()


def model(classes: list[str], **settings: Any) -> tuple[RetinaNet, Categories]:
    values = {"backbone": "resnet18", "backbone_weights": "none", "norm": "bn", "fpn_channels": 8, **settings}
    config = ModelConfig.model_validate({"head": {"depth": 1}, **values}, strict=False)
    return build_model(config, len(classes)), Categories(tuple(range(1, len(classes) + 1)), tuple(classes))


def move(source: tuple[RetinaNet, Categories], target: tuple[RetinaNet, Categories]) -> dict[str, TransferRow]:
    rows = transfer(
        target[0],
        source[0].state_dict(),
        classes=target[1],
        source_classes=source[1],
        source_anchors=source[0].anchors,
    )
    return {row.part: row for row in rows}


def filled(classes: list[str], **settings: Any) -> tuple[RetinaNet, Categories]:
    """A model as after training: no number is at its initial value."""
    torch.manual_seed(5)
    made = model(classes, **settings)
    for parameter in made[0].parameters():
        torch.nn.init.normal_(parameter)
    return made


def rows_of(model: RetinaNet, subnet: str, kind: str) -> Tensor:
    """(anchors of a cell, classes or coordinates, ...)."""
    rows: Tensor = torch.unflatten(
        model.state_dict()[f"{subnet}.predictor.{kind}"], 0, (model.anchors.num_per_cell, -1)
    )
    return rows


@pytest.mark.parametrize("names", [["cat", "dog", "car"], ["people", "person", "pedestrian"], ["bike", "bicycle"]])
def test_same_classes_take_everything(names: list[str]) -> None:
    source, target = filled(names), model(names)
    table = move(source, target)
    own = target[0].state_dict()
    for key, value in source[0].state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(own[key], value), key
    assert all(row.copied == row.total > 0 for row in table.values())


def test_classes_of_other_order_and_spelling_are_moved_anchor_by_anchor() -> None:
    source = filled(["Traffic Light", "motorbike", "cat"])
    target = model(["cat", "dog", "traffic_light", "motorcycle"])
    table = move(source, target)
    for kind in ("weight", "bias"):
        old, new = rows_of(source[0], "cls_subnet", kind), rows_of(target[0], "cls_subnet", kind)
        for label, source_label in {0: 2, 2: 0, 3: 1}.items():
            assert torch.equal(new[:, label], old[:, source_label])
        assert torch.equal(rows_of(target[0], "box_subnet", kind), rows_of(source[0], "box_subnet", kind))
    assert (rows_of(target[0], "cls_subnet", "bias")[:, 1] == prior_bias(0.01)).all()
    assert rows_of(target[0], "cls_subnet", "weight")[:, 1].std() == pytest.approx(0.01, rel=0.2)
    row = table["classes"]
    assert (row.copied, row.total) == (3, 4)
    for expected in ("traffic_light <- Traffic Light", "motorcycle <- motorbike", "new, start from the prior: dog"):
        assert expected in row.note


def test_anchors_of_the_same_shape_are_kept_and_the_others_start_fresh() -> None:
    source = filled(["cat"])
    target = model(["cat"], anchors={"ratios": [0.5, 1.0, 3.0, 2.0]})
    fresh = {kind: rows_of(target[0], "box_subnet", kind).clone() for kind in ("weight", "bias")}
    table = move(source, target)
    for kind in ("weight", "bias"):
        for subnet in ("cls_subnet", "box_subnet"):
            old, new = rows_of(source[0], subnet, kind), rows_of(target[0], subnet, kind)
            assert torch.equal(new[:6], old[:6])
            assert torch.equal(new[9:], old[6:])  # ratio 2 stands elsewhere now
        assert torch.equal(rows_of(target[0], "box_subnet", kind)[6:9], fresh[kind][6:9])
    assert (table["anchors of a cell"].copied, table["anchors of a cell"].total) == (9, 12)
    assert "start fresh" in table["anchors of a cell"].note


@pytest.mark.parametrize("anchors", [{"center_offset": 0.0}, {"strides": "grid"}, {"sizes": [20, 40, 80, 160, 320]}])
def test_anchors_laid_out_otherwise_take_no_rows(anchors: dict[str, Any]) -> None:
    source, target = filled(["cat"]), model(["cat"], anchors=anchors)
    table = move(source, target)
    assert (rows_of(target[0], "cls_subnet", "bias") == prior_bias(0.01)).all()
    assert table["anchors of a cell"].copied == table["classes"].copied == 0
    assert table["backbone"].copied == table["backbone"].total


def test_another_width_keeps_the_backbone_and_says_what_it_leaves() -> None:
    source, target = filled(["cat", "dog"]), model(["cat", "dog"], fpn_channels=16)
    table = move(source, target)
    assert table["backbone"].copied == table["backbone"].total
    assert table["pyramid"].copied == 0 < table["pyramid"].total
    assert "other shape" in table["pyramid"].note
    assert (rows_of(target[0], "cls_subnet", "bias") == prior_bias(0.01)).all()  # no bias without its weights
    assert table["anchors of a cell"].copied == table["classes"].copied == 0
    assert "another width" in table["anchors of a cell"].note


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"backbone_weights": "imagenet", "norm": "frozen_bn"}, "set model.norm=bn"),
        ({"backbone_weights": "imagenet", "trainable_layers": 3}, "set model.trainable_layers=5"),
    ],
    ids=["frozen statistics", "frozen layers"],
)
def test_layers_that_would_stay_empty_for_ever_are_refused(settings: dict[str, Any], remedy: str) -> None:
    source = filled(["cat"])
    weights = {k: v for k, v in source[0].state_dict().items() if not k.startswith("backbone.layer1")}
    target, classes = model(["cat"], **settings)
    with pytest.raises(WeightsError, match=remedy):
        transfer(target, weights, classes=classes, source_classes=classes, source_anchors=target.anchors)


def test_weights_that_share_nothing_are_refused() -> None:
    target, classes = model(["cat"])
    with pytest.raises(WeightsError, match="nothing of the source fits"):
        transfer(target, some_tensors(), classes=classes, source_classes=classes, source_anchors=target.anchors)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Traffic Light", "traffic_light"),
        ("motorbike", "Motorcycle"),
        ("TV-Monitor", "tv"),
        ("cell phone", "cellphone"),
    ],
)
def test_spellings_of_one_class_have_one_canonical_name(one: str, other: str) -> None:
    assert canonical_name(one) == canonical_name(other)


def test_names_without_letters_stay_apart() -> None:
    assert canonical_name("+") != canonical_name("-")
