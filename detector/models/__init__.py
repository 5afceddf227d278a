"""Backbone, feature pyramid, heads and the detector made of them."""

from __future__ import annotations

from detector.models.retinanet import RetinaNet, build_anchors, build_model

__all__ = ["RetinaNet", "build_anchors", "build_model"]
