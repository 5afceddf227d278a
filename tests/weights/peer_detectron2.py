"""detectron2's RetinaNet as an independent implementation: tensors under its names, forward pass, detections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
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


def detectron2_state(body: Body = R50, *, group_norm: bool = False, num_classes: int = 80, seed: int = 0) -> State:
    """Random weights under detectron2\'s names."""
    make, s = RandomWeights(seed), State()
    s["backbone.bottom_up.stem.conv1.weight"] = make.conv(64, 3, 7) / 60  # the input is in 0..255
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
            index = 3 * i if group_norm else 2 * i
            s[f"head.{subnet}.{index}.weight"] = make.conv(256, 256, 3)
            s[f"head.{subnet}.{index}.bias"] = make.vector(256, -0.1, 0.1)
            if group_norm:
                s[f"head.{subnet}.{index + 1}.weight"] = make.vector(256, 0.5, 1.2)
                s[f"head.{subnet}.{index + 1}.bias"] = make.vector(256, -0.2, 0.2)
    add_predictors(s, make, "head.cls_score", "head.bbox_pred", num_classes)
    return s


def detectron2_forward(s: State, x: Tensor, body: Body = R50) -> tuple[list[Tensor], list[Tensor]]:
    """Logits (9 * K, H, W) and deltas (36, H, W) of every level."""
    p = "backbone.bottom_up"
    x = F.relu(frozen_batch_norm(conv(x, s, f"{p}.stem.conv1", stride=2, padding=3), s, f"{p}.stem.conv1.norm"))
    x = F.max_pool2d(x, 3, 2, 1)
    features = []
    for stage, count in enumerate(body.blocks):
        for i in range(count):
            b = f"{p}.res{stage + 2}.{i}"
            stride = 2 if i == 0 and stage > 0 else 1
            y = F.relu(frozen_batch_norm(conv(x, s, f"{b}.conv1", stride=stride), s, f"{b}.conv1.norm"))
            y = F.relu(frozen_batch_norm(conv(y, s, f"{b}.conv2", padding=1, groups=body.groups), s, f"{b}.conv2.norm"))
            y = frozen_batch_norm(conv(y, s, f"{b}.conv3"), s, f"{b}.conv3.norm")
            if i == 0:
                x = frozen_batch_norm(conv(x, s, f"{b}.shortcut", stride=stride), s, f"{b}.shortcut.norm")
            x = F.relu(x + y)
        features.append(x)
    _, c3, c4, c5 = features
    top = conv(c5, s, "backbone.fpn_lateral5")
    middle = conv(c4, s, "backbone.fpn_lateral4") + F.interpolate(top, scale_factor=2.0, mode="nearest")
    bottom = conv(c3, s, "backbone.fpn_lateral3") + F.interpolate(middle, scale_factor=2.0, mode="nearest")
    levels = [conv(t, s, f"backbone.fpn_output{n}", padding=1) for n, t in ((3, bottom), (4, middle), (5, top))]
    p6 = conv(c5, s, "backbone.top_block.p6", stride=2, padding=1)
    levels += [p6, conv(F.relu(p6), s, "backbone.top_block.p7", stride=2, padding=1)]

    def subnet(name: str, last: str) -> list[Tensor]:
        out = []
        for x in levels:
            for index in range(11):
                weight = s.get(f"head.{name}.{index}.weight")
                if weight is None:
                    continue
                if weight.dim() == 4:
                    x = conv(x, s, f"head.{name}.{index}", padding=1)
                    if s.get(f"head.{name}.{index + 1}.weight") is None:
                        x = F.relu(x)
                else:
                    x = F.relu(F.group_norm(x, 32, weight, s[f"head.{name}.{index}.bias"]))
            out.append(conv(x, s, f"head.{last}", padding=1)[0])
        return out

    return subnet("cls_subnet", "cls_score"), subnet("bbox_subnet", "bbox_pred")


@torch.no_grad()
def detectron2_detect(
    s: State, path: Path, *, min_size: int, max_size: int, body: Body = R50
) -> tuple[PeerDetections, list[Tensor]]:
    """Detections with boxes in pixels of the file, and the logits of every level."""
    image = np.asarray(Image.open(path).convert("RGB"))[:, :, ::-1]
    height, width = image.shape[:2]
    scale = min_size / min(height, width)
    new_h, new_w = (min_size, scale * width) if height < width else (scale * height, min_size)
    if max(new_h, new_w) > max_size:
        factor = max_size / max(new_h, new_w)
        new_h, new_w = new_h * factor, new_w * factor
    h, w = int(new_h + 0.5), int(new_w + 0.5)
    resized = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))
    x = torch.from_numpy(resized.astype(np.float32)).permute(2, 0, 1)
    x = x - torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
    logits, deltas = detectron2_forward(s, pad_to_32(x), body)
    detections = suppress(select_candidates(logits, deltas, order="scale first", clamp_below=False))
    detections = detections._replace(boxes=detections.boxes * torch.tensor([width / w, height / h] * 2))
    return clip_to_image(detections, height, width), logits
