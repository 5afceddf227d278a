"""A RetinaNet-style detector: see README.md for use, docs/ for the reasons."""
