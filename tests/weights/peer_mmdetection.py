"""mmdetection's RetinaNet as an independent implementation: tensors under its names, forward pass, detections."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.weights.peer_models import (
    GAINS,
    R50,
    Body,
    PeerDetections,
    RandomWeights,
    State,
    add_predictors,
    clip_to_image,
    conv,
    frozen_batch_norm,
    pad_to_32,
    select_candidates,
    suppress,
)


def mmdet_state(body: Body = R50, *, caffe: bool = False, num_classes: int = 80, seed: int = 0) -> State:
    """Random weights under mmdetection\'s names."""
    make, s = RandomWeights(seed), State()
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
    add_predictors(s, make, "bbox_head.retina_cls", "bbox_head.retina_reg", num_classes)
    return s


def mmdet_forward(s: State, x: Tensor, body: Body = R50, *, caffe: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Logits (9 * K, H, W) and deltas (36, H, W) of every level."""
    x = F.relu(frozen_batch_norm(conv(x, s, "backbone.conv1", stride=2, padding=3), s, "backbone.bn1"))
    x = F.max_pool2d(x, 3, 2, 1)
    features = []
    for stage, count in enumerate(body.blocks):
        for i in range(count):
            b = f"backbone.layer{stage + 1}.{i}"
            stride = 2 if i == 0 and stage > 0 else 1
            if body.bottleneck:
                first, second = (stride, 1) if caffe else (1, stride)
                y = F.relu(frozen_batch_norm(conv(x, s, f"{b}.conv1", stride=first), s, f"{b}.bn1"))
                y = conv(y, s, f"{b}.conv2", stride=second, padding=1, groups=body.groups)
                y = F.relu(frozen_batch_norm(y, s, f"{b}.bn2"))
                y = frozen_batch_norm(conv(y, s, f"{b}.conv3"), s, f"{b}.bn3")
            else:
                y = F.relu(frozen_batch_norm(conv(x, s, f"{b}.conv1", stride=stride, padding=1), s, f"{b}.bn1"))
                y = frozen_batch_norm(conv(y, s, f"{b}.conv2", padding=1), s, f"{b}.bn2")
            if f"{b}.downsample.0.weight" in s:
                x = frozen_batch_norm(conv(x, s, f"{b}.downsample.0", stride=stride), s, f"{b}.downsample.1")
            x = F.relu(x + y)
        features.append(x)
    laterals = [conv(c, s, f"neck.lateral_convs.{i}.conv") for i, c in enumerate(features[1:])]
    for i in (1, 0):
        laterals[i] = laterals[i] + F.interpolate(laterals[i + 1], size=laterals[i].shape[2:], mode="nearest")
    levels = [conv(t, s, f"neck.fpn_convs.{i}.conv", padding=1) for i, t in enumerate(laterals)]
    levels.append(conv(features[3], s, "neck.fpn_convs.3.conv", stride=2, padding=1))
    levels.append(conv(levels[3], s, "neck.fpn_convs.4.conv", stride=2, padding=1))  # no ReLU before it

    def subnet(name: str, last: str) -> list[Tensor]:
        out = []
        for x in levels:
            for i in range(4):
                x = F.relu(conv(x, s, f"bbox_head.{name}.{i}.conv", padding=1))
            out.append(conv(x, s, f"bbox_head.{last}", padding=1)[0])
        return out

    return subnet("cls_convs", "retina_cls"), subnet("reg_convs", "retina_reg")


@torch.no_grad()
def mmdet_detect(
    s: State, path: Path, *, min_size: int, max_size: int, body: Body = R50, caffe: bool = False
) -> tuple[PeerDetections, list[Tensor]]:
    """Detections with boxes in pixels of the file, and the logits of every level."""
    image = cv2.imread(str(path))  # BGR
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
    logits, deltas = mmdet_forward(s, pad_to_32(x), body, caffe=caffe)
    detections = clip_to_image(select_candidates(logits, deltas, order="ratio first", clamp_below=True), h, w)
    detections = detections._replace(boxes=detections.boxes * torch.tensor([width / w, height / h] * 2))
    return suppress(detections), logits
