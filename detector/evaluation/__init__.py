"""COCO metrics, evaluation of a model on a dataset, and the self-check."""
