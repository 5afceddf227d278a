"""A network and its post-processing as one thing: pictures in, objects out, as fast as the device allows.

On a GPU the network is copied in the precision that it is to run in, its normalisations are folded into its convolutions, and
once a shape of input comes again, everything up to the finished list of boxes is captured in a CUDA graph, which from then on
is one launch instead of several hundred.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detector.inference.postprocess import Places, as_detections, best_of_batch, postprocess
from detector.models import RetinaNet
from detector.models.backbone import fold_norms
from detector.precision import DTYPES, Precision, autocast
from detector.structures import Detections, HeadOutputs

MAX_GRAPHS = 32
"""Shapes of input that are captured; each keeps its own inputs and outputs."""


class _Captured(NamedTuple):
    graph: Any
    anchors: Tensor
    """Kept, because the graph knows no more of them than where they lie."""
    images: Tensor
    sizes: Tensor
    places: Places


class Detector:
    """Finds objects in batches of pictures; what it finds is what `postprocess` makes of the network's outputs. For one thread.

    Args:
        model: on `device`. It may be trained on: on a GPU its weights are taken as they are now.
        settings: of `postprocess`.
        precision: to run the network in.
        device: to run on.
    """

    def __init__(
        self,
        model: RetinaNet,
        settings: dict[str, Any],
        *,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self.settings = settings
        self.precision = precision
        self.device = device
        self.model = model if device.type == "cpu" else inference_copy(model, DTYPES[precision])
        self._seen: set[tuple[Any, ...]] = set()
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self._pool: Any = None

    @torch.inference_mode()
    def __call__(
        self,
        images: Tensor,
        image_sizes: Tensor,
        *,
        original_sizes: Tensor | None = None,
        outputs: HeadOutputs | None = None,
    ) -> list[Detections]:
        """Objects of a batch, in main memory.

        Args:
            images: (B, 3, H, W) on the device, as the network takes them.
            image_sizes, original_sizes: as in `postprocess`; in main memory.
            outputs: what `outputs` gave, where that is known; spares a CPU the network, and a GPU, which has it in a graph,
                nothing.
        """
        if self.device.type == "cpu":
            if outputs is None:
                outputs = self.outputs(images, image_sizes)
            return postprocess(outputs, image_sizes, original_sizes=original_sizes, **self.settings)
        return as_detections(self._places(images, image_sizes), image_sizes, original_sizes)

    @torch.inference_mode()
    def outputs(self, images: Tensor, image_sizes: Tensor) -> HeadOutputs:
        """What the network says about a batch; arguments as above."""
        if self.device.type == "cuda":  # the copy is in that precision
            with untried_algorithms():
                return self.model(images, image_sizes.to(self.device, non_blocking=True))  # type: ignore[no-any-return]
        with autocast(self.precision, self.device):
            return self.model(images, image_sizes)  # type: ignore[no-any-return]

    def _places(self, images: Tensor, image_sizes: Tensor) -> Places:
        key = (tuple(images.shape), images.dtype, images.stride())
        if key not in self._captured:
            sizes = image_sizes.to(images.device, non_blocking=True)
            again = key in self._seen
            self._seen.add(key)
            if not again or len(self._captured) >= MAX_GRAPHS:
                with untried_algorithms():
                    return self._find(images, sizes)
            self._captured[key] = self._capture(images, sizes)
        captured = self._captured[key]
        captured.images.copy_(images, non_blocking=True)
        captured.sizes.copy_(image_sizes, non_blocking=True)
        captured.graph.replay()
        return captured.places

    def _find(self, images: Tensor, sizes: Tensor) -> Places:
        options: dict[str, Any] = {"clip": "before_nms", "drop_empty": False, "bound_shrinking": False, **self.settings}
        return best_of_batch(self.model(images, sizes), sizes, **options)

    def _capture(self, images: Tensor, sizes: Tensor) -> _Captured:
        images, sizes = images.clone(), sizes.clone()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once outside: libraries set themselves up
            self._find(images, sizes)
        torch.cuda.current_stream().wait_stream(stream)
        anchors = self.model.anchors_of(images)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": what the loader's pinning thread asks of CUDA meanwhile is no part of it
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            places = self._find(images, sizes)
        self._pool = graph.pool()
        return _Captured(graph, anchors, images, sizes, places)


def untried_algorithms() -> AbstractContextManager[None]:
    """Where a shape may come but once, cuDNN's algorithms are not worth trying out."""
    flags = torch.backends.cudnn.flags
    return flags(enabled=True, benchmark=False, deterministic=torch.backends.cudnn.deterministic, allow_tf32=False)


def inference_copy(model: RetinaNet, dtype: torch.dtype) -> RetinaNet:
    """The network as it is now in another precision, and in lower ones than fp32 without its normalisations."""
    copied = copy.deepcopy(model).requires_grad_(False).eval()
    copied.__dict__.pop("look", None)  # what may have been compiled for training
    copied.anchors.forget()
    if dtype != torch.float32:
        fold_norms(copied.backbone)
        for part in (copied.backbone, copied.fpn, copied.cls_subnet, copied.box_subnet):
            part.to(dtype)
    return copied
