"""Shared parts of the independent implementations of detectron2's and mmdetection's RetinaNet; comparing detections.

Plain functions of torch, written from what those frameworks compute, which share no code with the package and can
therefore serve as its oracle. Random weights take the place of trained ones.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

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
"""Heights and widths of the test images: odd, both orientations, shrunk and enlarged, one limited by its long side."""


class PeerDetections(NamedTuple):
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    """Labels or category ids."""


def write_images(folder: Path) -> list[Path]:
    """Write an image of each of `SHAPES`: smooth noise, so that neighbouring pixels are similar."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    paths = []
    for i, (height, width) in enumerate(SHAPES):
        small = Image.fromarray(rng.integers(0, 256, (height // 7 + 2, width // 7 + 2, 3), dtype=np.uint8))
        path = folder / f"{i}_{height}x{width}.png"
        small.resize((width, height), Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


def detect_with_package(folder: Path, checkpoint: Path, paths: list[Path]) -> list[PeerDetections]:
    """Run tools/predict.py on image files; boxes are in pixels of the file, labels are category ids."""
    argv = ["--checkpoint", str(checkpoint), *map(str, paths), "--output-dir", str(folder), "--score-thresh", "0.05"]
    assert predict(argv) == 0
    records = json.loads((folder / "detections.json").read_text())
    detections = []
    for i in range(len(paths)):
        own = [r for r in records if r["image_id"] == i]
        xywh = torch.tensor([r["bbox"] for r in own]).reshape(-1, 4)
        boxes = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)
        scores, labels = (torch.tensor([r[key] for r in own]) for key in ("score", "category_id"))
        detections.append(PeerDetections(boxes, scores, labels))
    return detections


def unmatched(one: PeerDetections, other: PeerDetections, *, pixels: float = 1e-3, score: float = 1e-5) -> list[int]:
    """Indices of the detections in `one` without an equal detection in `other`."""
    if not len(other.scores):
        return list(range(len(one.scores)))
    near = (
        ((one.boxes[:, None] - other.boxes[None]).abs().amax(-1) <= pixels)
        & ((one.scores[:, None] - other.scores[None]).abs() <= score)
        & (one.labels[:, None] == other.labels[None])
    )
    return (~near.any(dim=1)).nonzero().flatten().tolist()


def unexplained(one: PeerDetections, other: PeerDetections, indices: list[int]) -> list[int]:
    """Those of the unmatched `indices` that no near-tie in NMS explains: `other` has no detection of the class with an
    IoU near or above the threshold."""
    remaining = []
    for i in indices:
        same_class = other.labels == one.labels[i]
        iou = box_iou(one.boxes[i : i + 1], other.boxes[same_class])
        if not bool((iou > 0.5 - 1e-3).any()):
            remaining.append(i)
    return remaining


def assert_same_detections(actual: PeerDetections, expected: PeerDetections) -> None:
    """Each detection has an equal one on the other side, except at most one in a hundred, where NMS was a near-tie."""
    for one, other in ((expected, actual), (actual, expected)):
        indices = unmatched(one, other)
        assert len(indices) <= 0.01 * len(one.scores), f"{len(indices)} of {len(one.scores)} are unmatched"
        assert unexplained(one, other, indices) == []


class Body(NamedTuple):
    """Sizes of a ResNet."""

    blocks: tuple[int, ...]
    bottleneck: bool = True
    groups: int = 1
    width: int = 64
    """Channels of the first 3x3 convolution."""


R18 = Body((2, 2, 2, 2), bottleneck=False)
R50 = Body((3, 4, 6, 3))
R101 = Body((3, 4, 23, 3))
X101_32 = Body((3, 4, 23, 3), groups=32, width=128)
X101_64 = Body((3, 4, 23, 3), groups=64, width=256)


GAINS = (0.7, 1.2, 2.5, 3.0, 3.0)
"""Factors on the weights of the convolutions that output P3..P7, so that every level yields detections."""


class RandomWeights:
    """Random tensors that keep activations bounded."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def conv(self, out: int, inputs: int, size: int, gain: float = 1.0) -> Tensor:
        weight = torch.randn(out, inputs, size, size, generator=self.random)
        return weight * gain * math.sqrt(2 / (inputs * size * size))

    def vector(self, length: int, low: float, high: float) -> Tensor:
        return torch.rand(length, generator=self.random) * (high - low) + low

    def norm(self, state: State, prefix: str, length: int, *, last: bool = False) -> None:
        largest = 0.4 if last else 1.0  # last: of the residual branch
        state[f"{prefix}.weight"] = self.vector(length, largest / 2, largest)
        state[f"{prefix}.bias"] = self.vector(length, -0.1, 0.1)
        state[f"{prefix}.running_mean"] = self.vector(length, -0.1, 0.1)
        state[f"{prefix}.running_var"] = self.vector(length, 0.7, 1.5)


def add_predictors(state: State, make: RandomWeights, cls: str, box: str, num_classes: int) -> None:
    """Add the weights and biases of the last convolutions."""
    state[f"{cls}.weight"] = make.conv(9 * num_classes, 256, 3, 0.8)
    state[f"{cls}.bias"] = make.vector(9 * num_classes, -0.3, 0.3)
    state[f"{box}.weight"] = make.conv(36, 256, 3, 0.05)
    state[f"{box}.bias"] = make.vector(36, -0.1, 0.1)
    state[f"{box}.bias"][0] = -6.0  # the first anchor's boxes are mostly outside the image
    state[f"{box}.bias"][6:8] = -5.0  # the second anchor's shrink more than mmdetection allows


def calibrate(state: State, bias: str, logits: list[Tensor], *, count: int = 500) -> None:
    """Shift the biases of the classes so that `count` of the logits have a score above 0.05."""
    best = torch.cat([x.flatten() for x in logits]).topk(count + 1).values[-2:]
    state[bias] += math.log(0.05 / 0.95) - best.mean()  # between two logits, so that the threshold is no near-tie


def frozen_batch_norm(x: Tensor, s: State, prefix: str) -> Tensor:
    scale = s[f"{prefix}.weight"] / torch.sqrt(s[f"{prefix}.running_var"] + 1e-5)
    shift = s[f"{prefix}.bias"] - s[f"{prefix}.running_mean"] * scale
    return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def conv(x: Tensor, s: State, prefix: str, *, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
    return F.conv2d(x, s[f"{prefix}.weight"], s.get(f"{prefix}.bias"), stride, padding, 1, groups)


def cell_shapes(level: int, order: str) -> list[tuple[float, float]]:
    """(width, height) of the nine anchors of a cell, ordered by scale or by ratio first."""
    base = 4 * 8 * 2**level
    sizes = [base * 2 ** (i / 3) for i in range(3)]
    shape = [[(size / math.sqrt(ratio), size * math.sqrt(ratio)) for ratio in (0.5, 1.0, 2.0)] for size in sizes]
    if order == "scale first":
        return [shape[scale][ratio] for scale in range(3) for ratio in range(3)]
    return [shape[scale][ratio] for ratio in range(3) for scale in range(3)]


def select_candidates(logits: list[Tensor], deltas: list[Tensor], *, order: str, clamp_below: bool) -> PeerDetections:
    """The 1000 best detections of each level with a score above 0.05, decoded, not clipped."""
    limit = math.log(1000 / 16)
    levels: list[PeerDetections] = []
    for level, (c, d) in enumerate(zip(logits, deltas, strict=True)):
        stride, (h, w) = 8 * 2**level, c.shape[-2:]
        scores = c.view(9, -1, h, w).permute(2, 3, 0, 1).reshape(-1).sigmoid()  # by cell, anchor, class
        num_classes = c.shape[0] // 9
        best = scores.topk(min(1000, int((scores > 0.05).sum())))
        label, anchor = best.indices % num_classes, best.indices // num_classes
        cell, shape = anchor // 9, anchor % 9
        shapes = torch.tensor(cell_shapes(level, order))[shape]
        cx, cy = (cell % w) * float(stride), (cell // w) * float(stride)
        delta = d.view(9, 4, h, w).permute(2, 3, 0, 1).reshape(-1, 4)[anchor]
        size = delta[:, 2:].clamp(max=limit)
        if clamp_below:
            size = size.clamp(min=-limit)
        x, y = cx + delta[:, 0] * shapes[:, 0], cy + delta[:, 1] * shapes[:, 1]
        bw, bh = shapes[:, 0] * size[:, 0].exp(), shapes[:, 1] * size[:, 1].exp()
        boxes = torch.stack([x - bw / 2, y - bh / 2, x + bw / 2, y + bh / 2], dim=1)
        levels.append(PeerDetections(boxes, best.values, label))
    return PeerDetections(*(torch.cat(parts) for parts in zip(*levels, strict=True)))


def suppress(detections: PeerDetections, limit: int = 10_000) -> PeerDetections:
    """NMS by class with a threshold of 0.5; best score first."""
    keep = []
    for label in sorted(set(detections.labels.tolist())):
        own = (detections.labels == label).nonzero().flatten()
        keep.append(own[nms(detections.boxes[own], detections.scores[own], 0.5)])
    kept = torch.cat(keep) if keep else torch.zeros(0, dtype=torch.int64)
    order = kept[detections.scores[kept].argsort(descending=True)][:limit]
    return PeerDetections(*(x[order] for x in detections))


def clip_to_image(detections: PeerDetections, height: int, width: int) -> PeerDetections:
    """Clip boxes to the image and drop those that become empty."""
    boxes = detections.boxes.clone()
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
    not_empty = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return PeerDetections(boxes[not_empty], detections.scores[not_empty], detections.labels[not_empty])


def pad_to_32(x: Tensor) -> Tensor:
    """(C, H, W) to (1, C, H', W'), zero-padded to multiples of 32."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % 32, 0, -height % 32))[None]
