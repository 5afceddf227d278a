"""Weights: read files safely, import and export other frameworks' detectors, load weights into a model."""
