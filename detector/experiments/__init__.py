"""Sweeps over settings and comparison of runs."""
