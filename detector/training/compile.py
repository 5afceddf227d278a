"""torch.compile for the training step: network, assignment and loss, one graph each per input shape."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch

from detector.datasets.sampling import StepPlanner
from detector.inference.nms import has_triton
from detector.losses import RetinaNetLoss
from detector.models import RetinaNet
from detector.training.logger import RunLog
from detector.training.step import Learner

MIN_STEPS_PER_SHAPE = 3000
"""Steps per input shape that win back a minute of compilation (docs/benchmarks.md)."""


def compile_if_worth_it(
    wanted: Literal["auto"] | bool, learner: Learner, planner: StepPlanner, log: RunLog, *, steps: int
) -> None:
    """Compile the training step as `train.compile` asks.

    Args:
        wanted: the setting; auto: on CUDA, for runs with enough steps per input shape.
        learner: whose network and loss are compiled, after `micro_batch: auto` has measured memory.
        planner: gives the number of input shapes.
        log: reports that compilation will happen.
        steps: that remain.
    """
    num_shapes = len({keys[0].canvas for keys in planner.first_steps(200)})
    if wanted == "auto":
        enough = learner.device.type == "cuda" and steps >= MIN_STEPS_PER_SHAPE * num_shapes
        wanted = enough and has_triton(learner.device)
    if wanted:
        log.info(
            "the training step is compiled at each new input shape, about a minute each; the first steps of an epoch "
            f"have {num_shapes}"
        )
        compile_step(learner.model, learner.loss)


def compile_step(model: RetinaNet, loss: RetinaNetLoss, *, backend: str = "inductor", fullgraph: bool = False) -> None:
    """Compile the parts of a training step when they first meet an input shape.

    Class losses that choose examples or count in bins stay eager. With `fullgraph`, a part that is not one graph and a
    shape beyond the recompilation limit are errors rather than eager.
    """
    _cache_compiled_code()
    # Multi-scale training has dozens of shapes, and assignment one for every power of two of objects as well; beyond
    # the limit (by default 8), torch falls back to eager.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 1024
    options: dict[str, Any] = {"dynamic": False, "fullgraph": fullgraph, "backend": backend}
    model.forward_tensors = torch.compile(model.forward_tensors, **options)  # type: ignore[method-assign]
    if not loss.class_loss.is_mean:
        loss.forward = torch.compile(loss.forward, **options)  # type: ignore[method-assign]
    loss.assign = torch.compile(loss.assign, **options)  # type: ignore[method-assign]


def _cache_compiled_code() -> None:
    """Keep compiled code for the next run: torch's default, the temporary folder, is emptied now and then."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "detector" / "inductor"
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError:  # the home folder is not writable
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(base))
