"""A training run without any of the fast paths, to see that they cost no accuracy.

Takes the arguments of tools/train.py. What it replaces, each by the obvious way to do the same:

- matching by the overlap of every anchor with every object, not of windows;
- the focal loss by torchvision's function with one-hot targets and autograd, not by one pass over chunks;
- batch norms of fixed statistics as layers, not folded into the convolutions' weights;
- the pyramid's sum with an enlarged map that is made;
- Pillow for JPEG files, all of their pixels;
- fp32 and contiguous memory, not bf16 and channels_last, nothing kept or compiled.

    for seed in 0 1 2; do
        python tools/train.py --config C.yaml --output-dir runs/fast/seed$seed train.seed=$seed
        python -m tests.oracles.train_plainly --config C.yaml --output-dir runs/plain/seed$seed train.seed=$seed
    done
    python tools/compare.py runs/fast runs/plain --baseline plain

Results: docs/benchmarks.md.

"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from detector.assign import max_iou as matching
from detector.datasets import images
from detector.losses import class_loss
from detector.models import fpn, resnet
from tools.train import main as train

SETTINGS = (
    "train.precision=fp32", "train.channels_last=false", "train.compile=false", "data.scaled_decode=false",
    "data.cache_gb=0", "data.cache_folder=null",
    "data.num_workers=0",  # processes of their own might not know what is replaced
)  # fmt: skip


def every_pair(anchors: Tensor, targets: Any, grids: object, *settings: Any) -> Tensor:
    """In place of `matching._windows`."""
    return matching._all_pairs(anchors, targets, *settings)


def autograd_focal_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float | Tensor | None = 0.25,
    gamma: float = 2.0,
    negative_weight: float | None = None,
    scale: Tensor,
) -> Tensor:
    """In place of `losses.dense.dense_focal_loss`."""
    if isinstance(alpha, Tensor) or negative_weight is not None:
        raise ValueError("torchvision's focal loss has one alpha for all classes")
    one_hot = F.one_hot(labels.clamp(min=0), logits.shape[-1]) * (labels >= 0)[..., None]
    each = sigmoid_focal_loss(logits.float(), one_hot.float(), alpha=-1 if alpha is None else alpha, gamma=gamma)
    total: Tensor = (each * (labels >= -1)[..., None]).sum(dim=(1, 2)) * scale
    return total


def layer_by_layer(conv: nn.Module, norm: nn.Module, x: Tensor, *, relu: bool = False) -> Tensor:
    """In place of `resnet.normed_conv`."""
    out: Tensor = norm(conv(x))
    return F.relu(out) if relu else out


def plus_enlarged(fine: Tensor, coarse: Tensor) -> Tensor:
    """In place of `fpn._add_upsampled`."""
    return fine + F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")


REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (matching, "_windows", every_pair),
    (class_loss, "dense_focal_loss", autograd_focal_loss),
    (resnet, "normed_conv", layer_by_layer),
    (fpn, "_add_upsampled", plus_enlarged),
    (images, "_decode_jpeg", lambda *_: None),
)


def main(argv: list[str]) -> int:
    """Replace, train."""
    for module, name, plain in REPLACED:
        getattr(module, name)  # still of that name
        setattr(module, name, plain)
    return train([*argv, *SETTINGS])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
