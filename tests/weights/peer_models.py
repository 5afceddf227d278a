"""detectron2's and mmdetection's RetinaNet, restated: their tensors by their names, their forward pass, their detections.

Plain functions of torch, written from what those programs compute and sharing nothing with the package, so that they can
say whether the package computes the same. Random weights stand for trained ones.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, nms

from tools.predict import main as predict

State = dict[str, Tensor]

MIN_SIZE, MAX_SIZE = 160, 256
SHAPES = [(240, 320), (333, 251), (97, 641), (400, 300), (257, 383), (181, 120)]
"""Height and width: odd, both orientations, shrunk and enlarged, one limited by its long side."""


class Objects(NamedTuple):
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    """Or category ids."""


# ---- comparing --------------------------------------------------------------------------------------------------


def pictures(folder: Path) -> list[Path]:
    """Files of every shape: smooth noise, so that neighbouring pixels are alike."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    paths = []
    for i, (height, width) in enumerate(SHAPES):
        small = Image.fromarray(rng.integers(0, 256, (height // 7 + 2, width // 7 + 2, 3), dtype=np.uint8))
        path = folder / f"{i}_{height}x{width}.png"
        small.resize((width, height), Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


def by_us(folder: Path, checkpoint: Path, paths: list[Path]) -> list[Objects]:
    argv = ["--checkpoint", str(checkpoint), *map(str, paths), "--output-dir", str(folder), "--score-thresh", "0.05"]
    assert predict(argv) == 0
    records = json.loads((folder / "detections.json").read_text())
    found = []
    for i in range(len(paths)):
        own = [r for r in records if r["image_id"] == i]
        xywh = torch.tensor([r["bbox"] for r in own]).reshape(-1, 4)
        boxes = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)
        found.append(
            Objects(boxes, torch.tensor([r["score"] for r in own]), torch.tensor([r["category_id"] for r in own]))
        )
    return found


def without_twin(one: Objects, other: Objects, *, pixels: float = 1e-3, score: float = 1e-5) -> list[int]:
    """Positions in `one` of what `other` has not found likewise."""
    if not len(other.scores):
        return list(range(len(one.scores)))
    near = (
        ((one.boxes[:, None] - other.boxes[None]).abs().amax(-1) <= pixels)
        & ((one.scores[:, None] - other.scores[None]).abs() <= score)
        & (one.labels[:, None] == other.labels[None])
    )
    return (~near.any(dim=1)).nonzero().flatten().tolist()


def unexplained(one: Objects, other: Objects, lost: list[int]) -> list[int]:
    """Those of `lost` that no near-tie in the suppression explains: `other` kept nothing of the class that overlaps it by
    about the threshold or more."""
    left = []
    for i in lost:
        same = other.labels == one.labels[i]
        overlap = box_iou(one.boxes[i : i + 1], other.boxes[same])
        if not bool((overlap > 0.5 - 1e-3).any()):
            left.append(i)
    return left


def assert_same(ours: Objects, theirs: Objects) -> None:
    """Each object of either has a twin in the other, but for at most one in a hundred, where suppression was a near-tie."""
    for one, other in ((theirs, ours), (ours, theirs)):
        lost = without_twin(one, other)
        assert len(lost) <= 0.01 * len(one.scores), f"{len(lost)} of {len(one.scores)} have no twin"
        assert unexplained(one, other, lost) == []


# ---- making weights ---------------------------------------------------------------------------------------------


class Body(NamedTuple):
    """A residual network's sizes."""

    blocks: tuple[int, ...]
    bottleneck: bool = True
    groups: int = 1
    width: int = 64
    """Of the first 3x3 convolution."""


R18 = Body((2, 2, 2, 2), bottleneck=False)
R50 = Body((3, 4, 6, 3))
R101 = Body((3, 4, 23, 3))
X101_32 = Body((3, 4, 23, 3), groups=32, width=128)
X101_64 = Body((3, 4, 23, 3), groups=64, width=256)


GAINS = (0.7, 1.2, 2.5, 3.0, 3.0)
"""Of the convolutions that give P3..P7: objects are to be found on all of them."""


class Maker:
    """Random tensors that keep activations in bounds."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def conv(self, out: int, inputs: int, size: int, gain: float = 1.0) -> Tensor:
        weight = torch.randn(out, inputs, size, size, generator=self.random)
        return weight * gain * math.sqrt(2 / (inputs * size * size))

    def vector(self, length: int, low: float, high: float) -> Tensor:
        return torch.rand(length, generator=self.random) * (high - low) + low

    def norm(self, state: State, prefix: str, length: int, *, last: bool = False) -> None:
        top = 0.4 if last else 1.0  # of the branch that is added
        state[f"{prefix}.weight"] = self.vector(length, top / 2, top)
        state[f"{prefix}.bias"] = self.vector(length, -0.1, 0.1)
        state[f"{prefix}.running_mean"] = self.vector(length, -0.1, 0.1)
        state[f"{prefix}.running_var"] = self.vector(length, 0.7, 1.5)


def _last(state: State, make: Maker, cls: str, box: str, num_classes: int) -> None:
    """Weights and biases of the last convolutions."""
    state[f"{cls}.weight"] = make.conv(9 * num_classes, 256, 3, 0.8)
    state[f"{cls}.bias"] = make.vector(9 * num_classes, -0.3, 0.3)
    state[f"{box}.weight"] = make.conv(36, 256, 3, 0.05)
    state[f"{box}.bias"] = make.vector(36, -0.1, 0.1)
    state[f"{box}.bias"][0] = -6.0  # the first anchor's boxes lie out of the picture, most of them
    state[f"{box}.bias"][6:8] = -5.0  # the second anchor's shrink more than mmdetection lets them


def calibrate(state: State, bias: str, logits: list[Tensor], *, count: int = 500) -> None:
    """Shift the classes' biases so that so many of these logits score above 0.05."""
    best = torch.cat([x.flatten() for x in logits]).topk(count + 1).values[-2:]
    state[bias] += math.log(0.05 / 0.95) - best.mean()  # between two of them, so that the threshold is no near-tie


# ---- detectron2 -------------------------------------------------------------------------------------------------


def detectron2_state(body: Body = R50, *, group_norm: bool = False, num_classes: int = 80, seed: int = 0) -> State:
    make, s = Maker(seed), State()
    s["backbone.bottom_up.stem.conv1.weight"] = make.conv(64, 3, 7) / 60  # pixels are 0..255 here
    make.norm(s, "backbone.bottom_up.stem.conv1.norm", 64)
    inputs = 64
    for stage, count in enumerate(body.blocks):
        width, out = body.width * 2**stage, 256 * 2**stage
        for i in range(count):
            p = f"backbone.bottom_up.res{stage + 2}.{i}"
            if i == 0:
                s[f"{p}.shortcut.weight"] = make.conv(out, inputs, 1)
                make.norm(s, f"{p}.shortcut.norm", out)
            shapes = ((width, inputs, 1), (width, width // body.groups, 3), (out, width, 1))
            for j, shape in enumerate(shapes, start=1):
                s[f"{p}.conv{j}.weight"] = make.conv(*shape)
                make.norm(s, f"{p}.conv{j}.norm", shape[0], last=j == 3)
            inputs = out
    for level, c, gain in zip((3, 4, 5), (512, 1024, 2048), GAINS[:3], strict=True):
        s[f"backbone.fpn_lateral{level}.weight"] = make.conv(256, c, 1, 0.5)
        s[f"backbone.fpn_lateral{level}.bias"] = make.vector(256, -0.1, 0.1)
        s[f"backbone.fpn_output{level}.weight"] = make.conv(256, 256, 3, gain)
        s[f"backbone.fpn_output{level}.bias"] = make.vector(256, -0.1, 0.1)
    for name, c, gain in zip(("p6", "p7"), (2048, 256), GAINS[3:], strict=True):
        s[f"backbone.top_block.{name}.weight"] = make.conv(256, c, 3, gain)
        s[f"backbone.top_block.{name}.bias"] = make.vector(256, -0.1, 0.1)
    for subnet in ("cls_subnet", "bbox_subnet"):
        for i in range(4):
            place = 3 * i if group_norm else 2 * i
            s[f"head.{subnet}.{place}.weight"] = make.conv(256, 256, 3)
            s[f"head.{subnet}.{place}.bias"] = make.vector(256, -0.1, 0.1)
            if group_norm:
                s[f"head.{subnet}.{place + 1}.weight"] = make.vector(256, 0.5, 1.2)
                s[f"head.{subnet}.{place + 1}.bias"] = make.vector(256, -0.2, 0.2)
    _last(s, make, "head.cls_score", "head.bbox_pred", num_classes)
    return s


def _frozen(x: Tensor, s: State, prefix: str) -> Tensor:
    scale = s[f"{prefix}.weight"] / torch.sqrt(s[f"{prefix}.running_var"] + 1e-5)
    shift = s[f"{prefix}.bias"] - s[f"{prefix}.running_mean"] * scale
    return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def _conv(x: Tensor, s: State, prefix: str, *, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
    return F.conv2d(x, s[f"{prefix}.weight"], s.get(f"{prefix}.bias"), stride, padding, 1, groups)


def detectron2_forward(s: State, x: Tensor, body: Body = R50) -> tuple[list[Tensor], list[Tensor]]:
    """Per level (9 * K, H, W) and (36, H, W)."""
    p = "backbone.bottom_up"
    x = F.relu(_frozen(_conv(x, s, f"{p}.stem.conv1", stride=2, padding=3), s, f"{p}.stem.conv1.norm"))
    x = F.max_pool2d(x, 3, 2, 1)
    features = []
    for stage, count in enumerate(body.blocks):
        for i in range(count):
            b = f"{p}.res{stage + 2}.{i}"
            stride = 2 if i == 0 and stage > 0 else 1
            y = F.relu(_frozen(_conv(x, s, f"{b}.conv1", stride=stride), s, f"{b}.conv1.norm"))
            y = F.relu(_frozen(_conv(y, s, f"{b}.conv2", padding=1, groups=body.groups), s, f"{b}.conv2.norm"))
            y = _frozen(_conv(y, s, f"{b}.conv3"), s, f"{b}.conv3.norm")
            if i == 0:
                x = _frozen(_conv(x, s, f"{b}.shortcut", stride=stride), s, f"{b}.shortcut.norm")
            x = F.relu(x + y)
        features.append(x)
    _, c3, c4, c5 = features
    top = _conv(c5, s, "backbone.fpn_lateral5")
    middle = _conv(c4, s, "backbone.fpn_lateral4") + F.interpolate(top, scale_factor=2.0, mode="nearest")
    bottom = _conv(c3, s, "backbone.fpn_lateral3") + F.interpolate(middle, scale_factor=2.0, mode="nearest")
    levels = [_conv(t, s, f"backbone.fpn_output{n}", padding=1) for n, t in ((3, bottom), (4, middle), (5, top))]
    p6 = _conv(c5, s, "backbone.top_block.p6", stride=2, padding=1)
    levels += [p6, _conv(F.relu(p6), s, "backbone.top_block.p7", stride=2, padding=1)]

    def subnet(name: str, last: str) -> list[Tensor]:
        out = []
        for x in levels:
            for place in range(11):
                weight = s.get(f"head.{name}.{place}.weight")
                if weight is None:
                    continue
                if weight.dim() == 4:
                    x = _conv(x, s, f"head.{name}.{place}", padding=1)
                    if s.get(f"head.{name}.{place + 1}.weight") is None:
                        x = F.relu(x)
                else:
                    x = F.relu(F.group_norm(x, 32, weight, s[f"head.{name}.{place}.bias"]))
            out.append(_conv(x, s, f"head.{last}", padding=1)[0])
        return out

    return subnet("cls_subnet", "cls_score"), subnet("bbox_subnet", "bbox_pred")


def _cell(level: int, order: str) -> list[tuple[float, float]]:
    """(width, height) of the nine anchors of a cell."""
    base = 4 * 8 * 2**level
    sizes = [base * 2 ** (i / 3) for i in range(3)]
    shape = [[(size / math.sqrt(ratio), size * math.sqrt(ratio)) for ratio in (0.5, 1.0, 2.0)] for size in sizes]
    if order == "scale first":
        return [shape[scale][ratio] for scale in range(3) for ratio in range(3)]
    return [shape[scale][ratio] for ratio in range(3) for scale in range(3)]


def _candidates(logits: list[Tensor], deltas: list[Tensor], *, order: str, clamp_below: bool) -> Objects:
    """The 1000 best of each level that score above 0.05, decoded, not clipped."""
    limit = math.log(1000 / 16)
    found: list[Objects] = []
    for level, (c, d) in enumerate(zip(logits, deltas, strict=True)):
        stride, (h, w) = 8 * 2**level, c.shape[-2:]
        scores = c.view(9, -1, h, w).permute(2, 3, 0, 1).reshape(-1).sigmoid()  # by cell, anchor, class
        num_classes = c.shape[0] // 9
        best = scores.topk(min(1000, int((scores > 0.05).sum())))
        entry = best.indices
        label, anchor = entry % num_classes, entry // num_classes
        cell, kind = anchor // 9, anchor % 9
        shapes = torch.tensor(_cell(level, order))[kind]
        cx, cy = (cell % w) * float(stride), (cell // w) * float(stride)
        delta = d.view(9, 4, h, w).permute(2, 3, 0, 1).reshape(-1, 4)[anchor]
        size = delta[:, 2:].clamp(max=limit)
        if clamp_below:
            size = size.clamp(min=-limit)
        x, y = cx + delta[:, 0] * shapes[:, 0], cy + delta[:, 1] * shapes[:, 1]
        bw, bh = shapes[:, 0] * size[:, 0].exp(), shapes[:, 1] * size[:, 1].exp()
        boxes = torch.stack([x - bw / 2, y - bh / 2, x + bw / 2, y + bh / 2], dim=1)
        found.append(Objects(boxes, best.values, label))
    return Objects(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _suppress(found: Objects, limit: int = 10_000) -> Objects:
    keep = []
    for label in sorted(set(found.labels.tolist())):
        own = (found.labels == label).nonzero().flatten()
        keep.append(own[nms(found.boxes[own], found.scores[own], 0.5)])
    kept = torch.cat(keep) if keep else torch.zeros(0, dtype=torch.int64)
    order = kept[found.scores[kept].argsort(descending=True)][:limit]
    return Objects(*(x[order] for x in found))


def _inside(found: Objects, height: int, width: int) -> Objects:
    boxes = found.boxes.clone()
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
    whole = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return Objects(boxes[whole], found.scores[whole], found.labels[whole])


def _padded(x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % 32, 0, -height % 32))[None]


@torch.no_grad()
def detectron2_detect(
    s: State, picture: Path, *, min_size: int, max_size: int, body: Body = R50
) -> tuple[Objects, list[Tensor]]:
    """Boxes in pixels of the file, and the logits."""
    image = np.asarray(Image.open(picture).convert("RGB"))[:, :, ::-1]
    height, width = image.shape[:2]
    scale = min_size / min(height, width)
    new_h, new_w = (min_size, scale * width) if height < width else (scale * height, min_size)
    if max(new_h, new_w) > max_size:
        again = max_size / max(new_h, new_w)
        new_h, new_w = new_h * again, new_w * again
    h, w = int(new_h + 0.5), int(new_w + 0.5)
    resized = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))
    x = torch.from_numpy(resized.astype(np.float32)).permute(2, 0, 1)
    x = x - torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
    logits, deltas = detectron2_forward(s, _padded(x), body)
    found = _suppress(_candidates(logits, deltas, order="scale first", clamp_below=False))
    found = found._replace(boxes=found.boxes * torch.tensor([width / w, height / h] * 2))
    return _inside(found, height, width), logits


# ---- mmdetection ------------------------------------------------------------------------------------------------


def mmdet_state(body: Body = R50, *, caffe: bool = False, num_classes: int = 80, seed: int = 0) -> State:
    make, s = Maker(seed), State()
    s["backbone.conv1.weight"] = make.conv(64, 3, 7) / (60 if caffe else 1)
    make.norm(s, "backbone.bn1", 64)
    inputs, expansion = 64, 4 if body.bottleneck else 1
    for stage, count in enumerate(body.blocks):
        width, out = body.width * 2**stage, 64 * expansion * 2**stage
        for i in range(count):
            p = f"backbone.layer{stage + 1}.{i}"
            shapes = [(width, inputs, 3), (out, width, 3)]
            if body.bottleneck:
                shapes = [(width, inputs, 1), (width, width // body.groups, 3), (out, width, 1)]
            for j, shape in enumerate(shapes, start=1):
                s[f"{p}.conv{j}.weight"] = make.conv(*shape)
                make.norm(s, f"{p}.bn{j}", shape[0], last=j == len(shapes))
            if i == 0 and inputs != out:
                s[f"{p}.downsample.0.weight"] = make.conv(out, inputs, 1)
                make.norm(s, f"{p}.downsample.1", out)
            inputs = out
    for name in [k for k in s if k.endswith("running_var")]:
        s[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    for i in range(3):
        s[f"neck.lateral_convs.{i}.conv.weight"] = make.conv(256, 128 * expansion * 2**i, 1, 0.5)
        s[f"neck.lateral_convs.{i}.conv.bias"] = make.vector(256, -0.1, 0.1)
    for i, gain in enumerate(GAINS):
        s[f"neck.fpn_convs.{i}.conv.weight"] = make.conv(256, 512 * expansion if i == 3 else 256, 3, gain)
        s[f"neck.fpn_convs.{i}.conv.bias"] = make.vector(256, -0.1, 0.1)
    for subnet in ("cls_convs", "reg_convs"):
        for i in range(4):
            s[f"bbox_head.{subnet}.{i}.conv.weight"] = make.conv(256, 256, 3)
            s[f"bbox_head.{subnet}.{i}.conv.bias"] = make.vector(256, -0.1, 0.1)
    _last(s, make, "bbox_head.retina_cls", "bbox_head.retina_reg", num_classes)
    return s


def mmdet_forward(s: State, x: Tensor, body: Body = R50, *, caffe: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Per level (9 * K, H, W) and (36, H, W)."""
    x = F.relu(_frozen(_conv(x, s, "backbone.conv1", stride=2, padding=3), s, "backbone.bn1"))
    x = F.max_pool2d(x, 3, 2, 1)
    features = []
    for stage, count in enumerate(body.blocks):
        for i in range(count):
            b = f"backbone.layer{stage + 1}.{i}"
            stride = 2 if i == 0 and stage > 0 else 1
            if body.bottleneck:
                first, second = (stride, 1) if caffe else (1, stride)
                y = F.relu(_frozen(_conv(x, s, f"{b}.conv1", stride=first), s, f"{b}.bn1"))
                y = _conv(y, s, f"{b}.conv2", stride=second, padding=1, groups=body.groups)
                y = F.relu(_frozen(y, s, f"{b}.bn2"))
                y = _frozen(_conv(y, s, f"{b}.conv3"), s, f"{b}.bn3")
            else:
                y = F.relu(_frozen(_conv(x, s, f"{b}.conv1", stride=stride, padding=1), s, f"{b}.bn1"))
                y = _frozen(_conv(y, s, f"{b}.conv2", padding=1), s, f"{b}.bn2")
            if f"{b}.downsample.0.weight" in s:
                x = _frozen(_conv(x, s, f"{b}.downsample.0", stride=stride), s, f"{b}.downsample.1")
            x = F.relu(x + y)
        features.append(x)
    laterals = [_conv(c, s, f"neck.lateral_convs.{i}.conv") for i, c in enumerate(features[1:])]
    for i in (1, 0):
        laterals[i] = laterals[i] + F.interpolate(laterals[i + 1], size=laterals[i].shape[2:], mode="nearest")
    levels = [_conv(t, s, f"neck.fpn_convs.{i}.conv", padding=1) for i, t in enumerate(laterals)]
    levels.append(_conv(features[3], s, "neck.fpn_convs.3.conv", stride=2, padding=1))
    levels.append(_conv(levels[3], s, "neck.fpn_convs.4.conv", stride=2, padding=1))  # no ReLU before it

    def subnet(name: str, last: str) -> list[Tensor]:
        out = []
        for x in levels:
            for i in range(4):
                x = F.relu(_conv(x, s, f"bbox_head.{name}.{i}.conv", padding=1))
            out.append(_conv(x, s, f"bbox_head.{last}", padding=1)[0])
        return out

    return subnet("cls_convs", "retina_cls"), subnet("reg_convs", "retina_reg")


@torch.no_grad()
def mmdet_detect(
    s: State, picture: Path, *, min_size: int, max_size: int, body: Body = R50, caffe: bool = False
) -> tuple[Objects, list[Tensor]]:
    """Boxes in pixels of the file, and the logits."""
    image = cv2.imread(str(picture))  # BGR
    assert image is not None
    height, width = image.shape[:2]
    scale = min(max_size / max(height, width), min_size / min(height, width))
    h, w = int(height * scale + 0.5), int(width * scale + 0.5)
    resized = cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)
    x = torch.from_numpy(resized.astype(np.float32)).permute(2, 0, 1)
    if caffe:
        x = x - torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
    else:
        x = x.flip(0) - torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
        x = x / torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    logits, deltas = mmdet_forward(s, _padded(x), body, caffe=caffe)
    found = _inside(_candidates(logits, deltas, order="ratio first", clamp_below=True), h, w)
    found = found._replace(boxes=found.boxes * torch.tensor([width / w, height / h] * 2))
    return _suppress(found), logits
