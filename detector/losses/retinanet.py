"""The whole RetinaNet loss: assignment, class loss over all anchors, box loss over the positive ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detector.assign.assignment import Assigner, Assignment
from detector.assign.max_iou import MaxIoUAssigner
from detector.boxes import decode, paired_iou
from detector.config import BoxLossKind, Config, Normalizer
from detector.errors import ConfigError
from detector.losses.box import box_loss, matched_boxes
from detector.losses.class_loss import CLASS_LOSSES, ClassLoss
from detector.structures import HeadOutputs, Targets

MASKED_LOGIT = -1e4
"""The logit of classes that an image is not annotated for: its loss as a negative, and that loss's gradient, are
zero."""


class Normalizers(NamedTuple):
    """What the losses of an optimizer step are divided by: sums over its micro-batches and processes, fp32 scalars."""

    cls: Tensor
    """Positive anchors, or the sum of their target scores where the class loss has soft targets."""
    box: Tensor
    """Positive anchors, or the sum of their box weights where the assigner gives any."""
    images: Tensor
    """Images, without fillers."""


class RetinaNetLoss(nn.Module):
    """Class and box loss of a batch (Lin et al. 2017, sections 3 and 4.1).

    Args:
        class_loss: None means the paper's focal loss.
        assigner: None means the paper's rule, `MaxIoUAssigner()`.
        box: kind of the box loss, see `box_loss`.
        smooth_l1_beta: where smooth L1 turns from quadratic to linear, in encoded units.
        box_weight: factor of the box loss.
        normalizer: "global" divides the sums of the whole optimizer step by its positive anchors (the paper);
            "per_image" divides each image's sum by its own, then takes the mean of the images (torchvision).

    Example:
        >>> anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [40.0, 40.0, 50.0, 50.0]])
        >>> outputs = HeadOutputs((torch.zeros(1, 2, 3),), (torch.zeros(1, 2, 4),), anchors)
        >>> targets = Targets(anchors[None, :1], labels=torch.tensor([[2]]), ignore_boxes=torch.zeros(1, 0, 4))
        >>> RetinaNetLoss()(outputs, targets)  # the first anchor is a perfect box of class 2
        {'loss_cls': tensor(0.6931), 'loss_box': tensor(0.)}
    """

    def __init__(
        self,
        class_loss: ClassLoss | None = None,
        *,
        assigner: Assigner | None = None,
        box: BoxLossKind = "smooth_l1",
        smooth_l1_beta: float = 1 / 9,
        box_weight: float = 1.0,
        normalizer: Normalizer = "global",
    ) -> None:
        super().__init__()
        self.class_loss = class_loss or ClassLoss()
        self.assigner: Assigner = assigner or MaxIoUAssigner()
        self.box: BoxLossKind = box
        self.smooth_l1_beta = smooth_l1_beta
        self.box_weight = box_weight
        self.normalizer = normalizer

    def assign(
        self,
        anchors: Tensor,
        targets: Targets,
        *,
        grids: Sequence[tuple[int, int]] | None = None,
        outputs: HeadOutputs | None = None,
    ) -> Assignment:
        """Assign anchors (A, 4) to the objects of a batch; see `Assigner`."""
        return self.assigner(anchors, targets, grids=grids, outputs=None if outputs is None else outputs.detach())

    def forward(
        self,
        outputs: HeadOutputs,
        targets: Targets,
        *,
        assignment: Assignment | None = None,
        normalizers: Normalizers | None = None,
    ) -> dict[str, Tensor]:
        """Compute the two losses, already normalized, so that those of micro-batches and processes simply add up.

        Args:
            outputs: of the network.
            targets: of the same images.
            assignment: from `assign`; None: computed here.
            normalizers: of the whole optimizer step; None: those of this batch.

        Returns:
            {"loss_cls", "loss_box"}, fp32 scalars; exact zeros with zero gradients where there is nothing to learn.
        """
        self._require_support(outputs, targets)
        if assignment is None:
            assignment = self.assign(outputs.anchors, targets, outputs=outputs)
        labels = assigned_labels(targets, assignment)
        boxes = matched_boxes(outputs.anchors, targets.boxes, assignment.matched)
        deltas = outputs.all_box_deltas()
        quality = None
        if self.class_loss.needs_quality:
            quality = assignment.target_scores
            if quality is None:
                quality = paired_iou(decode(deltas.detach().float(), outputs.anchors), boxes)
        if targets.class_mask is not None:
            outputs = outputs._replace(cls_logits=_masked(outputs.cls_logits, labels, targets.class_mask))
        weights = None if targets.weights is None else _anchor_weights(targets.weights, assignment)
        cls_scale, box_scale, image_scale = self._scales(assignment, normalizers)
        if self.class_loss.is_mean:
            cls_scale = image_scale
        cls = self.class_loss(outputs, labels, quality, cls_scale, weights)
        box = box_loss(deltas, outputs.anchors, boxes, kind=self.box, beta=self.smooth_l1_beta)
        for factor in (weights, assignment.box_weights):
            box = box if factor is None else box * factor
        box = torch.where(assignment.matched >= 0, box, 0.0).sum(dim=1) * self.box_weight
        return {"loss_cls": cls.sum(), "loss_box": (box * box_scale).sum()}

    def normalizers(self, assignment: Assignment, num_images: Tensor) -> Normalizers:
        """The normalizers of one micro-batch with `num_images` () images; add them up over a step."""
        cls, box = self._image_sums(assignment)
        return Normalizers(cls.sum().float(), box.sum().float(), num_images.float())

    def _scales(self, assignment: Assignment, normalizers: Normalizers | None) -> tuple[Tensor, Tensor, Tensor]:
        """The factors of each image's class loss, box loss, and mean over images, (B,) each."""
        batch, device = len(assignment.num_pos), assignment.num_pos.device
        if normalizers is None:
            normalizers = self.normalizers(assignment, torch.tensor(batch, device=device))
        inverse = Normalizers(*(1 / total.to(device).clamp(min=1).float() for total in normalizers))
        image_scale = inverse.images.expand(batch)
        if self.normalizer == "global":
            return inverse.cls.expand(batch), inverse.box.expand(batch), image_scale
        cls, box = (image_scale / sums.clamp(min=1).float() for sums in self._image_sums(assignment))
        return cls, box, image_scale

    def _image_sums(self, assignment: Assignment) -> tuple[Tensor, Tensor]:
        """Each image's parts of the class and the box normalizer, (B,) each."""
        scores, weights = assignment.target_scores, assignment.box_weights
        hard = scores is None or not self.class_loss.needs_quality
        return (
            assignment.num_pos if scores is None or hard else scores.sum(dim=1),
            assignment.num_pos if weights is None else weights.sum(dim=1),
        )

    def _require_support(self, outputs: HeadOutputs, targets: Targets) -> None:
        """Check that nothing in the outputs or targets would be ignored silently.

        Raises:
            ConfigError: `loss.cls` or `loss.box` cannot use something that they contain.
        """
        kind = self.class_loss.kind
        if self.class_loss.is_mean and (targets.weights is not None or targets.class_mask is not None):
            raise ConfigError(
                f"loss.cls must be a sum over anchors with weights of objects or class masks, got {kind}; use focal"
            )
        if self.box != "giou" and outputs.box_deltas and outputs.box_deltas[0].shape[-1] != 4:
            raise ConfigError(f"loss.box must be giou for a head with box distributions, got {self.box}")
        if outputs.quality is not None:
            raise ConfigError("HeadOutputs.quality has no loss yet: it can be scored, but not trained")

    @torch.no_grad()
    def constant_class_loss(
        self, bias: Tensor, targets: Targets, assignment: Assignment, *, normalizers: Normalizers
    ) -> ConstantLoss | None:
        """Compute in closed form the class loss of a network with the same logits at every anchor, as before training.

        Args:
            bias: (C,) the logits of every anchor.
            targets, assignment, normalizers: as in `forward`.

        Returns:
            None where it depends on more than the labels: on chosen anchors, soft targets, weights or masks.
        """
        simple = targets.weights is None and targets.class_mask is None
        if self.class_loss.is_mean or self.class_loss.needs_quality or not simple:
            return None
        num_classes = len(bias) - (self.class_loss.activation == "softmax")
        labels_once = torch.arange(-1, num_classes, device=bias.device)
        losses = self.class_loss.per_anchor(
            bias.float().expand(len(labels_once), -1), labels_once, torch.zeros(len(labels_once), device=bias.device)
        )
        labels = assigned_labels(targets, assignment)
        counts = torch.stack([(labels == label).sum(dim=1) for label in labels_once], dim=1)  # (B, 1 + K)
        scale, _, _ = self._scales(assignment, normalizers)
        total = (counts * losses).sum(dim=1).mul(scale).sum()
        background, positives = counts[:, 0].sum(), counts[:, 1:].sum()
        mean_positive = (counts[:, 1:] * losses[1:]).sum() / positives.clamp(min=1)
        return ConstantLoss(float(total), int(background), float(losses[0]), int(positives), float(mean_positive))


class ConstantLoss(NamedTuple):
    """The class loss of a network with the same logits at every anchor, and what it is composed of."""

    total: float
    background: int
    """Number of background anchors."""
    background_loss: float
    """Loss of one background anchor."""
    positives: int
    """Number of positive anchors."""
    positive_loss: float
    """Mean loss of a positive anchor."""


def assigned_labels(targets: Targets, assignment: Assignment) -> Tensor:
    """(B, A) int64: the class of each anchor's object; BACKGROUND or IGNORED where it has none."""
    padded = torch.nn.functional.pad(targets.labels, (0, 1), value=-1)
    labels = padded.gather(1, assignment.matched.clamp(min=0))
    return torch.where(assignment.matched >= 0, labels, assignment.matched)


def _anchor_weights(weights: Tensor, assignment: Assignment) -> Tensor:
    """(B, A): the weight of each anchor's object; 1 where it has none."""
    padded = torch.nn.functional.pad(weights, (0, 1), value=1.0)
    gathered = padded.gather(1, assignment.matched.clamp(min=0))
    return torch.where(assignment.matched >= 0, gathered, 1.0)


def _masked(cls_logits: Sequence[Tensor], labels: Tensor, class_mask: Tensor) -> tuple[Tensor, ...]:
    """Class logits (B, A_l, C) with those of classes outside the mask (B, K) replaced by `MASKED_LOGIT`.

    The class of an object in the image counts as annotated, whatever the mask contains.
    """
    num_classes = class_mask.shape[1]
    seen = torch.zeros_like(class_mask, dtype=torch.int64).scatter_add_(1, labels.clamp(min=0), (labels >= 0).long())
    extra = cls_logits[0].shape[-1] - num_classes  # the background of a softmax is always annotated
    mask = torch.nn.functional.pad(class_mask | (seen > 0), (0, extra), value=True)[:, None]
    return tuple(torch.where(mask, logits, MASKED_LOGIT) for logits in cls_logits)


def build_loss(config: Config, *, alpha: Sequence[float] | None = None) -> RetinaNetLoss:
    """Build the loss of a config.

    Args:
        config: `loss`, `matching` and `model.head.activation` are used.
        alpha: (K,) weights of the classes, where the config has them counted from the training set.

    Example:
        >>> build_loss(Config.model_validate({"loss": {"cls": "focal_star"}})).class_loss.kind
        'focal_star'
    """
    settings = config.loss.model_dump(exclude={"alpha_exponent", "alpha_beta"})
    box = {key: settings.pop(key) for key in ("box", "smooth_l1_beta", "box_weight", "normalizer")}
    if isinstance(config.loss.alpha, str):
        counted = alpha is not None or "alpha" not in CLASS_LOSSES[config.loss.cls].settings
        assert counted, "weights of classes are counted beforehand"
        settings["alpha"] = alpha
    class_loss = ClassLoss(settings.pop("cls"), activation=config.model.head.activation, **settings)
    return RetinaNetLoss(class_loss, assigner=MaxIoUAssigner(**config.matching.model_dump()), **box)
