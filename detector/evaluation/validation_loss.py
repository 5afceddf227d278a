"""The training loss over the validation set."""

from __future__ import annotations

import torch

from detector import distributed
from detector.losses import RetinaNetLoss
from detector.structures import Batch, HeadOutputs


class ValidationLoss:
    """The loss of training over a whole dataset, seen as in evaluation: neither augmented nor mirrored, and divided as that of
    one step. (GHM-C weighs by what it sees at once, so there it depends a little on the batches.)

    Args:
        loss: of training.
        device: of the network.
    """

    def __init__(self, loss: RetinaNetLoss, device: torch.device) -> None:
        self.loss = loss
        # of loss_cls and loss_box before they are divided, positive anchors and images
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    @torch.inference_mode()
    def add(self, outputs: HeadOutputs, batch: Batch) -> None:
        """Count a batch."""
        matches = self.loss.match(outputs.anchors, batch.targets)
        one = torch.ones((), device=outputs.anchors.device)
        parts = self.loss(outputs, batch.targets, matches=matches, num_pos=one, num_images=one)
        counts = matches.num_pos.sum(), (batch.index >= 0).sum()
        self.sums += torch.stack([parts["loss_cls"], parts["loss_box"], *counts])

    def means(self) -> dict[str, float]:
        """loss, loss_cls and loss_box, over what all processes have seen."""
        cls, box, num_pos, num_images = distributed.sum_over_processes(self.sums.clone()).tolist()
        images, positives = max(1.0, num_images), max(1.0, num_pos)
        usual = positives if self.loss.normalizer == "global" else images
        cls /= images if self.loss.class_loss.is_mean else usual
        box /= usual
        return {"loss": cls + box, "loss_cls": cls, "loss_box": box}
