"""Backbone, feature pyramid, heads and the detector made of them."""

from detector.models.retinanet import RetinaNet, build_anchors, build_model

__all__ = ["RetinaNet", "build_anchors", "build_model"]
