"""A network and its post-processing together: images in, detections out, as fast as the device allows.

On a GPU, the network is copied in its inference precision and its normalizations are folded into its convolutions. When
an input shape occurs again, everything up to the padded detections is captured in a CUDA graph, which from then on is
one launch instead of several hundred.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detector.config import Precision
from detector.inference.postprocess import BatchedDetections, postprocess, postprocess_batched
from detector.models import RetinaNet
from detector.precision import DTYPES, autocast
from detector.structures import Detections, HeadOutputs

MAX_GRAPHS = 32
"""Maximum number of input shapes that are captured; each keeps its own inputs and outputs in memory."""


class _Captured(NamedTuple):
    graph: Any
    anchors: Tensor
    """Kept alive, because the graph refers to their memory only."""
    images: Tensor
    sizes: Tensor
    detections: BatchedDetections


class Detector:
    """Detects objects in batches of images: `postprocess` of the network's outputs. For use by one thread.

    Args:
        model: a network on `device`. On a GPU its weights are copied, so it may be trained further.
        settings: arguments of `postprocess`.
        precision: the network's precision.
        device: the device to run on.
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
        """Detect objects in a batch.

        Args:
            images: (B, 3, H, W) on the device, as the network expects them.
            image_sizes, original_sizes: as in `postprocess`; in main memory.
            outputs: the result of `outputs` for this batch, if it was called. Saves running the network on a CPU;
                ignored on a GPU, where the network is part of the graph.

        Returns:
            One per image, in main memory.
        """
        if self.device.type == "cpu":
            if outputs is None:
                outputs = self.outputs(images, image_sizes)
            return postprocess(outputs, image_sizes, original_sizes=original_sizes, **self.settings)
        return self._batched(images, image_sizes).unpack(image_sizes, original_sizes)

    @torch.inference_mode()
    def outputs(self, images: Tensor, image_sizes: Tensor) -> HeadOutputs:
        """The network's outputs for a batch; arguments as above."""
        if self.device.type != "cpu":  # the copy has the precision
            with no_algorithm_search():
                return self.model(images, image_sizes.to(self.device, non_blocking=True))  # type: ignore[no-any-return]
        with autocast(self.precision, self.device):
            return self.model(images, image_sizes)  # type: ignore[no-any-return]

    def _batched(self, images: Tensor, image_sizes: Tensor) -> BatchedDetections:
        key = (tuple(images.shape), images.dtype, images.stride())
        if key not in self._captured:
            sizes = image_sizes.to(images.device, non_blocking=True)
            is_repeated = key in self._seen
            self._seen.add(key)
            if not is_repeated or len(self._captured) >= MAX_GRAPHS or self.device.type != "cuda":
                with no_algorithm_search():
                    return self._detect(images, sizes)
            self._captured[key] = self._capture(images, sizes)
        captured = self._captured[key]
        captured.images.copy_(images, non_blocking=True)
        captured.sizes.copy_(image_sizes, non_blocking=True)
        captured.graph.replay()
        return captured.detections

    def _detect(self, images: Tensor, sizes: Tensor) -> BatchedDetections:
        return postprocess_batched(self.model(images, sizes), sizes, **self.settings)

    def _capture(self, images: Tensor, sizes: Tensor) -> _Captured:
        images, sizes = images.clone(), sizes.clone()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once before the capture, because libraries initialize themselves
            self._detect(images, sizes)
        torch.cuda.current_stream().wait_stream(stream)
        anchors = self.model.anchors_of(images)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": CUDA calls of the loader's pinning thread must not end up in the graph
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            detections = self._detect(images, sizes)
        self._pool = graph.pool()
        return _Captured(graph, anchors, images, sizes, detections)


def no_algorithm_search() -> AbstractContextManager[None]:
    """Disable cuDNN's search for the fastest algorithm, which does not pay for shapes that may occur only once."""
    flags = torch.backends.cudnn.flags
    return flags(enabled=True, benchmark=False, deterministic=torch.backends.cudnn.deterministic, allow_tf32=False)


def inference_copy(model: RetinaNet, dtype: torch.dtype) -> RetinaNet:
    """Copy a network in evaluation mode and another precision; below fp32, its normalizations are folded."""
    copied = copy.deepcopy(model).requires_grad_(False).eval()
    copied.__dict__.pop("forward_tensors", None)  # may be compiled for training
    copied.anchors.clear_cache()
    if dtype != torch.float32:
        copied.backbone.fold_norms()
        for part in copied.children():
            part.to(dtype)
    return copied
