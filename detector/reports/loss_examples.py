"""The examples of the class loss on a dataset: every positive entry of the class logits, and negative ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector.assign.assignment import BACKGROUND
from detector.config import Config
from detector.datasets.coco import CocoDataset
from detector.errors import DatasetError
from detector.evaluation.dataset_loop import loop_over_dataset
from detector.inference.detector import Detector
from detector.losses import RetinaNetLoss
from detector.losses.retinanet import assigned_labels
from detector.models import RetinaNet
from detector.structures import Batch


class Examples(NamedTuple):
    """Entries of the class logits, each an anchor and a class. (n,) each."""

    x_t: NDArray[np.float32]
    """The logit of the ground truth: p_t is its sigmoid."""
    positive: NDArray[np.bool_]
    label: NDArray[np.int64]
    """The entry's class, whether positive or negative."""
    level: NDArray[np.int64]
    """0 for P3."""
    alpha: NDArray[np.float64]
    """The factor of the entry in the training loss."""
    weight: NDArray[np.float64]
    """The number of entries that it represents."""

    def select(self, chosen: NDArray[np.bool_] | slice) -> Examples:
        """The chosen examples."""
        return Examples._make(field[chosen] for field in self)

    def by_side(self) -> dict[str, Examples]:
        """The positive and the negative examples."""
        return {"positive": self.select(self.positive), "negative": self.select(~self.positive)}

    def p_t(self) -> NDArray[np.float64]:
        """(n,) probabilities of the ground truth."""
        p_t: NDArray[np.float64] = 1 / (1 + np.exp(-self.x_t.astype(np.float64)))
        return p_t


def subsample(examples: Examples, share: float) -> Examples:
    """Keep a share of the entries that the examples of one image represent, and represent all of them.

    Args:
        examples: in random order.
        share: of `examples.weight.sum()`.
    """
    count = max(1, int(share * examples.weight.sum() + 1e-6))
    if count >= len(examples.x_t):
        return examples
    kept = examples.select(slice(count))
    return kept._replace(weight=kept.weight * (len(examples.x_t) / count))


def collect_examples(
    model: RetinaNet,
    loss: RetinaNetLoss,
    coco: CocoDataset,
    config: Config,
    *,
    device: torch.device,
    indices: Sequence[int] | None = None,
    max_negatives: int = 2_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> Examples:
    """Run a model over a dataset as in evaluation, and assign its anchors as in training.

    Args:
        model: on `device`; its mode is restored afterwards.
        loss: the training loss: its assigner, and its weights of positives and negatives.
        coco: the dataset.
        config: image sizes and precision.
        device: to run on.
        indices: positions of the images to use; None means all.
        max_negatives: if there are more negative entries, this number is drawn without replacement, the same share of
            each image's, and the same ones every time.
        progress: called with the number of images done and their total.

    Raises:
        DatasetError: none of the images can be read.
    """
    collector = _Collector(max_negatives)

    def collect_batch(detector: Detector, loaded: Batch, batch: Batch) -> None:
        outputs = detector.outputs(batch.images, loaded.image_sizes)
        levels = [outputs.level_score_logits(level).float() for level in range(len(outputs.cls_logits))]
        level_of = torch.repeat_interleave(torch.tensor([logits.shape[1] for logits in levels]))
        assignment = loss.assign(outputs.anchors, batch.targets, outputs=outputs)
        labels = assigned_labels(batch.targets, assignment).cpu()
        for index, logits, label in zip(loaded.index.tolist(), torch.cat(levels, dim=1).cpu(), labels, strict=True):
            if index >= 0:
                balance = loss.class_loss.balance(logits.shape[1])
                collector.add(ImageEntries(logits, label, level_of, *balance), seed=index)

    loop_over_dataset(
        model,
        coco,
        config,
        collect_batch,
        device=device,
        indices=indices,
        split_over_processes=False,
        progress=progress,
    )
    if not collector.positives:
        total = len(coco) if indices is None else len(indices)
        raise DatasetError(f"{coco.annotations}: none of the {total} images to analyze can be read")
    return collector.examples()


class ImageEntries(NamedTuple):
    """The class logits of one image and the labels assigned to its anchors."""

    logits: Tensor
    """(A, K) logits whose sigmoids are the scores."""
    label: Tensor
    """(A,) as from `assigned_labels`."""
    level: Tensor
    """(A,)"""
    alpha: Tensor
    """(K,) weights of positives."""
    negative_weight: float

    @property
    def num_negatives(self) -> int:
        """The number of negative entries."""
        num_classes = self.logits.shape[1]
        return int((self.label >= BACKGROUND).sum()) * num_classes - int((self.label >= 0).sum())

    def positives(self) -> Examples:
        """All positive entries."""
        anchor = torch.nonzero(self.label >= 0).squeeze(1)
        return self._at(anchor, self.label[anchor], 1.0)

    def negatives(self, share: float, *, seed: int) -> Examples:
        """About a share of the negative entries, drawn without replacement, in random order."""
        num_classes = self.logits.shape[1]
        rows = torch.nonzero(self.label >= BACKGROUND).squeeze(1)
        entries = len(rows) * num_classes
        count = min(entries, max(1, math.ceil(share * entries)))
        entry = torch.from_numpy(np.random.default_rng(seed).choice(max(1, entries), count, replace=False))
        anchor, k = rows[entry // num_classes], entry % num_classes
        negative = self.label[anchor] != k
        return self._at(anchor[negative], k[negative], self.num_negatives / max(1, int(negative.sum())))

    def _at(self, anchor: Tensor, k: Tensor, weight: float) -> Examples:
        """The entries of anchors (n,) and classes (n,)."""
        positive = self.label[anchor] == k
        logits = self.logits[anchor, k]
        alpha = torch.where(positive, self.alpha[k], self.negative_weight)
        return Examples(
            torch.where(positive, logits, -logits).numpy(), positive.numpy(), k.numpy(), self.level[anchor].numpy(),
            alpha.numpy(), np.full(len(k), weight),
        )  # fmt: skip


class _Collector:
    """Gathers the examples of image after image, holding at most twice `max_negatives` negative ones."""

    def __init__(self, max_negatives: int) -> None:
        self.max_negatives = max_negatives
        self.positives: list[Examples] = []
        self.negatives: list[Examples] = []
        self.num_negatives = 0  # entries, whether held or not
        self.num_held = 0

    @property
    def share(self) -> float:
        """The share of the negative entries to keep."""
        return min(1.0, self.max_negatives / max(1, self.num_negatives))

    def add(self, image: ImageEntries, *, seed: int) -> None:
        self.num_negatives += image.num_negatives
        self.positives.append(image.positives())
        self.negatives.append(image.negatives(self.share, seed=seed))
        self.num_held += len(self.negatives[-1].x_t)
        if self.num_held > 2 * self.max_negatives:
            self.negatives = [subsample(part, self.share) for part in self.negatives]
            self.num_held = sum(len(part.x_t) for part in self.negatives)

    def examples(self) -> Examples:
        parts = [*self.positives, *(subsample(part, self.share) for part in self.negatives)]
        return Examples(*map(np.concatenate, zip(*parts, strict=True)))
