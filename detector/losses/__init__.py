"""The focal loss, box losses and the whole RetinaNet loss."""

from detector.losses.box import box_loss
from detector.losses.focal import dense_focal_loss, sigmoid_focal_loss
from detector.losses.retinanet import RetinaNetLoss, build_loss

__all__ = ["RetinaNetLoss", "box_loss", "build_loss", "dense_focal_loss", "sigmoid_focal_loss"]
