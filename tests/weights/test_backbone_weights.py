"""ImageNet weights: what is loaded into a backbone, what is reported, and what is rejected."""

from __future__ import annotations

import hashlib
import re
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

from detector.config import Norm
from detector.errors import WeightsError
from detector.models.resnet import ResNet
from detector.weights.backbone_weights import load_backbone_weights
from detector.weights.load_report import LoadedPart, LoadReport
from detector.weights.safe_load import read_tensors
from tests.weights.test_safe_load import Malicious, some_tensors

PARTIAL = "weights/resnet18_imagenet_stem_to_layer3.npz"


def resnet18(norm: Norm = "bn", trainable: int = 5) -> ResNet:
    torch.manual_seed(0)
    return ResNet("resnet18", norm=norm, norm_eps=1e-5, num_trainable_layers=trainable)


def imagenet_like(seed: int = 1) -> dict[str, Tensor]:
    """The state dict of a complete torchvision ResNet-18, classifier included."""
    torch.manual_seed(seed)
    state: dict[str, Tensor] = torchvision.models.resnet18(weights=None).state_dict()
    return state


@pytest.mark.parametrize("norm", ["bn", "frozen_bn", "sync_bn"])
@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.body.", "module."])
def test_a_complete_file_fills_every_layer(norm: Norm, prefix: str, tmp_path: Path) -> None:
    state = imagenet_like()
    torch.save({prefix + k: v for k, v in state.items()}, tmp_path / "w.pth")
    backbone = resnet18(norm, trainable=3)
    report = load_backbone_weights(backbone, "resnet18", str(tmp_path / "w.pth"))
    total = sum(not k.endswith("num_batches_tracked") for k in backbone.state_dict())
    assert report == LoadReport(str(tmp_path / "w.pth"), [LoadedPart("backbone", total, total, "")])
    assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())


def test_none_loads_no_weights() -> None:
    assert load_backbone_weights(resnet18(), "resnet18", "none") is None


def test_a_real_partial_file_fills_the_layers_it_has_and_reports_the_rest(shared: Path) -> None:
    backbone = resnet18("bn")
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    report = load_backbone_weights(backbone, "resnet18", str(shared / PARTIAL))
    assert report is not None
    weights = read_tensors(shared / PARTIAL)
    after = backbone.state_dict()
    assert all(torch.equal(after[k], v) for k, v in weights.items())
    missing = [k for k in after if k not in weights and not k.endswith("num_batches_tracked")]
    assert missing
    assert all(k.startswith("layer4") for k in missing)
    assert all(torch.equal(after[k], before[k]) for k in missing)
    (row,) = report.parts
    loaded = sum(not k.endswith("num_batches_tracked") for k in weights)
    assert (row.loaded, row.total) == (loaded, loaded + len(missing))
    assert row.note.startswith("not in the source: layer4.0")
    assert row.note.endswith(f" and {len(missing) - 6} more")


def test_a_real_partial_file_is_rejected_with_frozen_batch_norm(shared: Path) -> None:
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
    with pytest.raises(WeightsError, match=r"trainable_layers must be higher: .* has no weights for layer1"):
        load_backbone_weights(backbone, "resnet18", str(tmp_path / "w.pth"))


def test_weights_of_another_architecture_are_reported_or_rejected(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "w.pth")
    report = load_backbone_weights(resnet18(), "resnet18", str(tmp_path / "w.pth"))
    assert report is not None
    note = report.parts[0].note
    assert re.search(r"other shape: layer1\.0\.conv1\.weight, .*; .*not used: layer1\.0\.conv3\.weight", note)
    torch.save(some_tensors() | {"conv1.weight": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"must hold weights of resnet18 under torchvision's names"):
        load_backbone_weights(resnet18(), "resnet18", str(tmp_path / "w.pth"))


def test_group_norm_does_not_load_parameters_of_batch_norm(tmp_path: Path) -> None:
    state = imagenet_like()
    for key in state:
        if ".bn" in key or key.startswith("bn"):
            state[key].fill_(7)
    torch.save(state, tmp_path / "w.pth")
    backbone = resnet18("gn")
    report = load_backbone_weights(backbone, "resnet18", str(tmp_path / "w.pth"))
    assert report is not None
    assert "not in the source: bn1.weight" in report.parts[0].note
    assert (backbone.get_parameter("bn1.weight") == 1).all()
    assert torch.equal(backbone.get_parameter("conv1.weight"), state["conv1.weight"])


class Download:
    """A local server in place of download.pytorch.org."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.path = folder / "unwritten"

    def offer(self, content: Any, monkeypatch: pytest.MonkeyPatch, digest: str | None = None) -> None:
        """Make torchvision download its ResNet-18 weights from here."""
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
    assert report.parts[0].note == ""
    assert torch.equal(backbone.get_parameter("conv1.weight"), state["conv1.weight"])
    download.path.unlink()
    assert load_backbone_weights(resnet18(), "resnet18", "imagenet") is not None


def test_the_error_of_a_failed_download_names_where_to_put_the_file(
    download: Download, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    download.offer(imagenet_like(), monkeypatch)
    download.path.unlink()
    with pytest.raises(WeightsError, match="downloading the ImageNet weights of resnet18 failed") as caught:
        load_backbone_weights(resnet18(), "resnet18", "imagenet")
    target = tmp_path / "home" / "hub" / "checkpoints" / download.path.name
    assert f"put it at {target}" in str(caught.value)
    assert "404" in str(caught.value)
    torch.save(imagenet_like(), target)  # as the message advises
    assert load_backbone_weights(resnet18(), "resnet18", "imagenet") is not None


def test_a_backbone_without_torchvision_weights_is_an_error() -> None:
    with torch.device("meta"):
        backbone = ResNet("resnext101_32x4d", norm="bn", norm_eps=1e-5, num_trainable_layers=5)
    with pytest.raises(WeightsError, match=r"no ImageNet weights of resnext101_32x4d; set model\.backbone_weights"):
        load_backbone_weights(backbone, "resnext101_32x4d", "imagenet")


def test_a_download_with_the_wrong_hash_is_rejected(download: Download, monkeypatch: pytest.MonkeyPatch) -> None:
    download.offer(imagenet_like(), monkeypatch, digest="00000000")
    with pytest.raises(WeightsError, match="invalid hash value"):
        load_backbone_weights(resnet18(), "resnet18", "imagenet")


def test_code_in_a_download_is_not_run(download: Download, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    download.offer({"conv1.weight": Malicious(tmp_path / "ran")}, monkeypatch)
    with pytest.raises(WeightsError, match=r"failed \(Trying to load unsupported GLOBAL posix\.mkdir"):
        load_backbone_weights(resnet18(), "resnet18", "imagenet")
    assert not (tmp_path / "ran").exists()
