"""Drawn boxes, figures, and the analysis of the class loss."""
