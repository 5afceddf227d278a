"""The training run: loop, step, optimizer, logging, resume."""
