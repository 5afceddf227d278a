"""torch.compile on the training step: network, matching and loss, each one graph for each shape of its inputs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from detector.losses import RetinaNetLoss
from detector.models import RetinaNet


def compile_step(model: RetinaNet, loss: RetinaNetLoss, *, backend: str = "inductor", fullgraph: bool = False) -> None:
    """Have the parts of a training step compiled when they first meet a shape.

    Class losses that choose examples or count in bins are left as they are. With `fullgraph`, a part that is not one graph and
    a shape too many are errors, rather than eager.
    """
    _keep_compiled_code()
    # Multi-scale training has dozens of shapes, and matching one for every power of two of objects besides; what comes beyond
    # the limit (by default 8) goes on eager.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 1024
    options: dict[str, Any] = {"dynamic": False, "fullgraph": fullgraph, "backend": backend}
    model.look = torch.compile(model.look, **options)  # type: ignore[method-assign]
    if loss.class_loss.kind not in ("ghm", "ohem", "bootstrap"):
        loss.forward = torch.compile(loss.forward, **options)  # type: ignore[method-assign]
    loss.match = torch.compile(loss.match, **options)  # type: ignore[method-assign]


def _keep_compiled_code() -> None:
    """For the next run: the temporary folder, torch's choice, is emptied now and then."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "detector" / "inductor"
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(base))
