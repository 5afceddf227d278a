"""The whole RetinaNet loss: matching, focal loss over all anchors, box loss over the positive ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from detector.assign.max_iou import Matches, match_anchors
from detector.boxes import decode, overlap
from detector.config import Config
from detector.losses.box import BoxLoss, box_loss, matched_boxes
from detector.losses.class_loss import USES, ClassLoss
from detector.structures import HeadOutputs, Targets


class RetinaNetLoss(nn.Module):
    """Class and box loss of a batch (Lin et al. 2017, sections 3 and 4.1)."""

    def __init__(
        self,
        class_loss: ClassLoss | None = None,
        *,
        box: BoxLoss = "smooth_l1",
        smooth_l1_beta: float = 1 / 9,
        box_weight: float = 1.0,
        normalizer: Literal["global", "per_image"] = "global",
        fg_iou_thresh: float = 0.5,
        bg_iou_thresh: float = 0.4,
        low_quality_matches: bool = False,
        ignore_regions: bool = True,
    ) -> None:
        super().__init__()
        self.class_loss = class_loss or ClassLoss()
        self.box: BoxLoss = box
        self.smooth_l1_beta = smooth_l1_beta
        self.box_weight = box_weight
        self.normalizer = normalizer
        self.fg_iou_thresh = fg_iou_thresh
        self.bg_iou_thresh = bg_iou_thresh
        self.low_quality_matches = low_quality_matches
        self.ignore_regions = ignore_regions

    def match(self, anchors: Tensor, targets: Targets, *, grids: Sequence[tuple[int, int]] | None = None) -> Matches:
        """Match anchors (A, 4) to the objects of a batch; needs no outputs, so it can be done ahead of the network.

        `grids`: of the levels, see `matching.match_anchors`.
        """
        return match_anchors(
            anchors,
            targets,
            fg_iou_thresh=self.fg_iou_thresh,
            bg_iou_thresh=self.bg_iou_thresh,
            low_quality_matches=self.low_quality_matches,
            ignore_regions=self.ignore_regions,
            grids=grids,
        )

    def forward(
        self,
        outputs: HeadOutputs,
        targets: Targets,
        *,
        matches: Matches | None = None,
        num_pos: Tensor | None = None,
        num_images: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The two losses, already divided by their normaliser, so that micro-batches and processes simply add up.

        Args:
            outputs: of the network.
            targets: of the same images.
            matches: from `match`; made here if not given.
            num_pos: scalar, positive anchors of the whole optimizer step (normalizer "global"); None: of this batch.
            num_images: scalar, images of the whole step (normalizer "per_image"); None: of this batch.

        Returns:
            {"loss_cls", "loss_box"}, fp32 scalars; exact zeros with a gradient of zeros where there is nothing to learn.
        """
        matches = matches or self.match(outputs.anchors, targets)
        labels = labels_of(targets, matches)
        wanted = matched_boxes(outputs.anchors, targets.boxes, matches.matched)
        deltas = outputs.all_box_deltas()
        quality = None
        if self.class_loss.needs_quality:
            quality = overlap(decode(deltas.detach().float(), outputs.anchors), wanted)
        scale, per_image = self._scales(matches, num_pos, num_images)
        cls = self.class_loss(outputs, labels, quality, per_image if self.class_loss.is_mean else scale)
        box = box_loss(deltas, outputs.anchors, wanted, kind=self.box, beta=self.smooth_l1_beta)
        box = torch.where(matches.matched >= 0, box, 0.0).sum(dim=1) * self.box_weight
        return {"loss_cls": cls.sum(), "loss_box": (box * scale).sum()}

    def _scales(self, matches: Matches, num_pos: Tensor | None, num_images: Tensor | None) -> tuple[Tensor, Tensor]:
        """What each image's sum is multiplied by, (B,): under the chosen normaliser, and for the mean over images."""
        device = matches.num_pos.device
        images = torch.tensor(len(matches.num_pos)) if num_images is None else num_images
        per_image = (1 / images.to(device).clamp(min=1).float()).expand(len(matches.num_pos))
        if self.normalizer == "global":
            total = matches.num_pos.sum() if num_pos is None else num_pos
            return (1 / total.clamp(min=1).float()).expand(len(matches.num_pos)), per_image
        return per_image / matches.num_pos.clamp(min=1).float(), per_image

    @torch.no_grad()
    def class_loss_at(
        self, bias: Tensor, targets: Targets, matches: Matches, *, num_pos: Tensor, num_images: Tensor
    ) -> ConstantLoss | None:
        """The class loss of a network that says the same of every anchor: known in closed form before it has learnt.

        Args:
            bias: (C,) the logits of every anchor.
            targets, matches, num_pos, num_images: as in `forward`.

        Returns:
            None where it depends on more than the labels (chosen anchors, the quality of boxes).
        """
        if self.class_loss.is_mean or self.class_loss.needs_quality:
            return None
        num_classes = len(bias) - (self.class_loss.activation == "softmax")
        kinds = torch.arange(-1, num_classes, device=bias.device)
        each = self.class_loss.each(
            bias.float().expand(len(kinds), -1), kinds, torch.zeros(len(kinds), device=bias.device)
        )
        labels = labels_of(targets, matches)
        counts = torch.stack([(labels == kind).sum(dim=1) for kind in kinds], dim=1)  # (B, 1 + K)
        scale, _ = self._scales(matches, num_pos, num_images)
        total = (counts * each).sum(dim=1).mul(scale).sum()
        background, positives = counts[:, 0].sum(), counts[:, 1:].sum()
        of_positives = (counts[:, 1:] * each[1:]).sum() / positives.clamp(min=1)
        return ConstantLoss(float(total), int(background), float(each[0]), int(positives), float(of_positives))


class ConstantLoss(NamedTuple):
    """The class loss of a network that says the same of every anchor, and what it is made of."""

    total: float
    background: int
    """Anchors of the background."""
    background_loss: float
    """Of one of them."""
    positives: int
    positive_loss: float
    """Of one of them, on average."""


def labels_of(targets: Targets, matches: Matches) -> Tensor:
    """(B, A) int64: the class of each anchor's object; BACKGROUND or IGNORED where it has none."""
    padded = torch.nn.functional.pad(targets.labels, (0, 1), value=-1)
    labels = padded.gather(1, matches.matched.clamp(min=0))
    return torch.where(matches.matched >= 0, labels, matches.matched)


BOX_SETTINGS = ("box", "smooth_l1_beta", "box_weight", "normalizer")


def build_loss(config: Config, *, alpha: Sequence[float] | None = None) -> RetinaNetLoss:
    """The loss that a config describes; `alpha` are the weights of the classes where the config leaves them to the data."""
    settings = config.loss.model_dump()
    box = {key: settings.pop(key) for key in BOX_SETTINGS}
    for key in ("alpha_exponent", "alpha_beta"):
        del settings[key]
    if isinstance(config.loss.alpha, str):
        assert alpha is not None or "alpha" not in USES[config.loss.cls], "weights of classes are counted beforehand"
        settings["alpha"] = alpha
    class_loss = ClassLoss(settings.pop("cls"), activation=config.model.head.activation, **settings)
    return RetinaNetLoss(class_loss, **box, **config.matching.model_dump())
