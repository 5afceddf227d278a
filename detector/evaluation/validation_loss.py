"""The training loss over the validation set."""

from __future__ import annotations

import torch

from detector import distributed
from detector.losses import RetinaNetLoss
from detector.losses.retinanet import Normalizers
from detector.structures import Batch, HeadOutputs


class ValidationLoss:
    """The training loss over a whole dataset, without augmentation and normalized like a single step.

    (GHM-C weights each example by the batch it is in, so its loss depends slightly on the batches.)

    Args:
        loss: the training loss.
        device: the network's device.
    """

    def __init__(self, loss: RetinaNetLoss, device: torch.device) -> None:
        self.loss = loss
        # loss_cls and loss_box before division, and the three normalizers
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)

    @torch.inference_mode()
    def add(self, outputs: HeadOutputs, batch: Batch) -> None:
        """Add a batch."""
        assignment = self.loss.assign(outputs.anchors, batch.targets, outputs=outputs)
        one = torch.ones((), device=outputs.anchors.device)
        undivided = Normalizers(one, one, one)
        parts = self.loss(outputs, batch.targets, assignment=assignment, normalizers=undivided)
        own = self.loss.normalizers(assignment, (batch.index >= 0).sum())
        self.sums += torch.stack([parts["loss_cls"], parts["loss_box"], *own])

    def means(self) -> dict[str, float]:
        """Return loss, loss_cls and loss_box over the batches of all processes."""
        cls, box, *sums = distributed.sum_over_processes(self.sums.clone()).tolist()
        cls_sum, box_sum, images = (max(1.0, total) for total in sums)
        if self.loss.normalizer == "per_image":
            cls_sum = box_sum = images
        cls /= images if self.loss.class_loss.is_mean else cls_sum
        box /= box_sum
        return {"loss": cls + box, "loss_cls": cls, "loss_box": box}
