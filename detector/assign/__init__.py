"""Assignment of anchors to ground-truth objects."""
