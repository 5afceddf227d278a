"""Reading, checking, augmenting and loading COCO-format data."""
