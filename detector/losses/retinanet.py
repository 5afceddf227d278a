"""The whole RetinaNet loss: matching, focal loss over all anchors, box loss over the positive ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from detector.config import Config
from detector.losses.box import BoxLoss, box_loss, matched_boxes
from detector.losses.focal import dense_focal_loss
from detector.matching import Matches, match_anchors
from detector.structures import HeadOutputs, Targets


class RetinaNetLoss(nn.Module):
    """Class and box loss of a batch (Lin et al. 2017, sections 3 and 4.1)."""

    def __init__(
        self,
        *,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
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
        self.alpha = alpha
        self.gamma = gamma
        self.box: BoxLoss = box
        self.smooth_l1_beta = smooth_l1_beta
        self.box_weight = box_weight
        self.normalizer = normalizer
        self.fg_iou_thresh = fg_iou_thresh
        self.bg_iou_thresh = bg_iou_thresh
        self.low_quality_matches = low_quality_matches
        self.ignore_regions = ignore_regions

    def match(self, anchors: Tensor, targets: Targets) -> Matches:
        """Match anchors (A, 4) to the objects of a batch; needs no outputs, so it can be done ahead of the network."""
        return match_anchors(
            anchors,
            targets,
            fg_iou_thresh=self.fg_iou_thresh,
            bg_iou_thresh=self.bg_iou_thresh,
            low_quality_matches=self.low_quality_matches,
            ignore_regions=self.ignore_regions,
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
        labels = torch.where(matches.matched >= 0, _labels_of(targets, matches.matched), matches.matched)
        level_labels = torch.split(labels, [logits.shape[1] for logits in outputs.cls_logits], dim=1)
        cls = torch.stack(
            [
                dense_focal_loss(logits, level, alpha=self.alpha, gamma=self.gamma)
                for logits, level in zip(outputs.cls_logits, level_labels, strict=True)
            ]
        ).sum(dim=0)
        wanted = matched_boxes(outputs.anchors, targets.boxes, matches.matched)
        deltas = outputs.all_box_deltas()
        box = box_loss(deltas, outputs.anchors, wanted, kind=self.box, beta=self.smooth_l1_beta)
        box = torch.where(matches.matched >= 0, box, 0.0).sum(dim=1) * self.box_weight
        if self.normalizer == "global":
            total = matches.num_pos.sum() if num_pos is None else num_pos
            scale = 1 / total.clamp(min=1).float()
        else:
            images = torch.tensor(len(labels)) if num_images is None else num_images
            scale = 1 / (matches.num_pos.clamp(min=1).float() * images.to(labels.device).clamp(min=1))
        return {"loss_cls": (cls * scale).sum(), "loss_box": (box * scale).sum()}


def _labels_of(targets: Targets, index: Tensor) -> Tensor:
    """(B, A) class of each anchor's object; anything where it has none."""
    labels = torch.nn.functional.pad(targets.labels, (0, 1), value=-1)
    return labels.gather(1, index.clamp(min=0))


def build_loss(config: Config) -> RetinaNetLoss:
    """The loss that a config describes."""
    return RetinaNetLoss(
        **config.loss.model_dump(exclude={"cls"}),
        **config.matching.model_dump(),
    )
