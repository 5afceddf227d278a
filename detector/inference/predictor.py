"""Prediction for image files and arrays that belong to no dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from detector.checkpoint import TrainState, load_checkpoint, require_fitting_weights
from detector.config import ChannelOrder, Config
from detector.datasets.images import decode_image, rgb_pixels
from detector.datasets.transforms import padded_size, resize_batch, resize_image, resized_size
from detector.distributed import pick_device
from detector.errors import CheckpointError, ConfigError, InputError
from detector.inference.detector import Detector
from detector.models import RetinaNet, build_model
from detector.precision import resolve_precision
from detector.structures import Categories, Detections, HeadOutputs, Unresized
from detector.text import printable, printable_lines

ImageLike = str | Path | Image.Image | NDArray[np.uint8]
"""The path of an image file, a PIL image, or a uint8 array (H, W, 3)."""

PredictionDevice = Literal["auto", "cpu", "cuda", "mps"]


class _Prepared(NamedTuple):
    """An image at its size for the network, unless the device is to resize it."""

    pixels: NDArray[np.uint8]
    size: tuple[int, int]
    original_size: tuple[int, int]
    canvas: tuple[int, int]
    """Height and width with padding."""


class Predictor:
    """A trained detector: images in, detections out.

    Args:
        state: the content of a checkpoint; EMA weights are used where there are any.
        device: the device to run on.
        score_thresh: minimum score of a detection; None: the checkpoint's setting.
    """

    def __init__(self, state: TrainState, *, device: torch.device, score_thresh: float | None = None) -> None:
        self.config: Config = state.config
        self.categories: Categories = state.categories
        self.origin = state.origin
        """Notes about imported weights, for the user."""
        self.apply_exif = state.apply_exif and self.config.data.exif != "ignore"
        """Whether the EXIF orientation is applied, as in training; see `decode_image`."""
        self.device = device
        settings: dict[str, Any] = self.config.postprocess_arguments
        if score_thresh is not None:
            settings["score_thresh"] = score_thresh
        precision = resolve_precision(self.config.eval.precision, device)
        self.detector = Detector(model_of(state, device), settings, precision=precision, device=device)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is also a sequence of str
        self, images: ImageLike, *, channel_order: ChannelOrder = ..., batch_size: int = ...
    ) -> Detections: ...

    @overload
    def __call__(
        self, images: Sequence[ImageLike], *, channel_order: ChannelOrder = ..., batch_size: int = ...
    ) -> list[Detections]: ...

    def __call__(
        self, images: ImageLike | Sequence[ImageLike], *, channel_order: ChannelOrder = "rgb", batch_size: int = 8
    ) -> Detections | list[Detections]:
        """Detect objects in an image, or in each image of a list.

        Args:
            images: a path, a PIL image, a uint8 array (H, W, 3), or a list or tuple of them.
            channel_order: of arrays; "bgr" for those of OpenCV.
            batch_size: maximum number of images of a list that go through the network together. Images share a batch
                only if their padded sizes agree, so that each gets the padding that it would get alone.

        Returns:
            The detections, with class names, and boxes in pixels of the image (after its EXIF orientation is applied);
            for a list, one per image, in its order.

        Raises:
            InputError: an argument of another type or shape.
            ImageError: a file that is missing or no image.

        Example:
            >>> predictor = load_predictor("runs/shapes/checkpoints/best.pt")  # doctest: +SKIP
            >>> found = predictor("image.jpg")  # doctest: +SKIP
            >>> [(name, score) for name, score in zip(found.names, found.scores.tolist())]  # doctest: +SKIP
            [('cup', 0.97), ('plate', 0.61)]
        """
        if not isinstance(images, list | tuple):
            return self._detect([self._prepare(cast(ImageLike, images), channel_order)])[0]
        results: dict[int, Detections] = {}
        waiting: dict[tuple[int, int], dict[int, _Prepared]] = {}
        for position, image in enumerate(images):
            prepared = self._prepare(image, channel_order, name=f"images[{position}]")
            batch = waiting.setdefault(prepared.canvas, {})
            batch[position] = prepared
            if len(batch) >= batch_size:
                results |= zip(batch, self._detect([*batch.values()]), strict=True)
                del waiting[prepared.canvas]
        for batch in waiting.values():
            results |= zip(batch, self._detect([*batch.values()]), strict=True)
        return [results[position] for position in range(len(images))]

    def outputs(self, image: ImageLike) -> HeadOutputs:
        """The network's outputs for one image."""
        images, image_sizes, _ = self._batch([self._prepare(image, "rgb")])
        return self.detector.outputs(images, image_sizes)

    def _prepare(self, image: ImageLike, channel_order: ChannelOrder, *, name: str = "image") -> _Prepared:
        pixels = _read(image, channel_order, name, apply_exif=self.apply_exif)
        data, model = self.config.data, self.config.model
        original = (pixels.shape[0], pixels.shape[1])
        size = resized_size(original, min_size=data.eval_size, max_size=data.max_size, resize=model.compat.resize)
        if model.compat.resize != "float_bilinear":
            pixels = resize_image(pixels, size, model.compat.resize)
        return _Prepared(pixels, size, original, padded_size(size, model.pad))

    def _batch(self, prepared: Sequence[_Prepared]) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W) of one canvas on the device; their sizes and original sizes, (B, 2) in main memory."""
        canvas = prepared[0].canvas
        shapes, sizes = [(p.pixels.shape[0], p.pixels.shape[1]) for p in prepared], [p.size for p in prepared]
        unresized = None
        if shapes != sizes:
            unresized = Unresized(shapes, sizes, canvas)
            canvas = (max(height for height, _ in shapes), max(width for _, width in shapes))
        padded = torch.zeros((len(prepared), *canvas, 3), dtype=torch.uint8)  # channels last, as the network wants them
        for row, (height, width), item in zip(padded.numpy(), shapes, prepared, strict=True):
            row[:height, :width] = item.pixels
        images = padded.permute(0, 3, 1, 2).to(self.device)
        if unresized is not None:
            images = resize_batch(images, unresized)
        return images, torch.tensor(sizes), torch.tensor([p.original_size for p in prepared])

    def _detect(self, prepared: Sequence[_Prepared]) -> list[Detections]:
        images, image_sizes, original_sizes = self._batch(prepared)
        found = self.detector(images, image_sizes, original_sizes=original_sizes)
        return [Detections(d.boxes, d.scores, d.labels, self.categories.names) for d in found]


def _read(image: ImageLike, channel_order: ChannelOrder, name: str, *, apply_exif: bool) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB."""
    if isinstance(image, str | Path):
        return decode_image(Path(image), apply_exif=apply_exif)
    expected = f"{name} must be a path, a PIL image or a uint8 array (H, W, 3), got"
    if isinstance(image, Image.Image):
        if image.mode == "F":
            raise InputError(f"{expected} a PIL image of floating-point pixels (mode F); convert it to 0..255")
        try:
            return rgb_pixels(image, apply_exif=apply_exif)
        except Exception as error:  # noqa: BLE001 - its file is read now, and decoders raise anything
            raise InputError(f"{expected} one that cannot be decoded: {printable(str(error))}") from None
    if not isinstance(image, np.ndarray):
        raise InputError(f"{expected} {type(image).__name__}")
    if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
        return np.ascontiguousarray(image[..., ::-1] if channel_order == "bgr" else image)
    remedies = (
        (image.dtype != np.uint8, "; convert its values to 0..255 in uint8"),
        (image.ndim == 2, "; repeat a grey image's channel with np.stack([image] * 3, axis=2)"),
        (image.ndim == 4, "; pass a list of images"),
        (image.shape[2:] == (4,), "; drop the alpha channel with image[..., :3]"),
        (image.shape[:1] == (3,), "; move the channels last with image.transpose(1, 2, 0)"),
        (True, ""),
    )
    remedy = next(text for applies, text in remedies if applies)
    raise InputError(f"{expected} {image.dtype} {image.shape}{remedy}")


def model_of(state: TrainState, device: torch.device) -> RetinaNet:
    """Build the network of a checkpoint in evaluation mode, with its EMA weights where there are any.

    Raises:
        CheckpointError: the weights do not fit the network.
    """
    require_fitting_weights(state)
    model = build_model(state.config.model, len(state.categories))
    try:
        model.load_state_dict(state.weights)
    except RuntimeError as error:
        reason = printable_lines(str(error), 3000)
        raise CheckpointError(f"the checkpoint's weights do not fit the network that it describes: {reason}") from None
    model.to(device).eval()
    if state.config.train.channels_last:
        model.to(memory_format=torch.channels_last)
    return model


def load_predictor(
    checkpoint: str | Path, *, device: torch.device | PredictionDevice = "auto", score_thresh: float | None = None
) -> Predictor:
    """Load a predictor from a checkpoint file, which is all it needs.

    Args:
        checkpoint: the file: ours, or another program's RetinaNet.
        device: the device to run on; auto: a CUDA device, else Apple's MPS, else the CPU.
        score_thresh: minimum score of a detection; None: the checkpoint's setting.

    Raises:
        CheckpointError: the file is unreadable.
        ConfigError: the machine has no such device.
    """
    if not isinstance(device, torch.device):
        device = _prediction_device(device)
    return Predictor(load_checkpoint(Path(checkpoint)), device=device, score_thresh=score_thresh)


def _prediction_device(device: PredictionDevice) -> torch.device:
    """As `pick_device`, but including MPS, on which training and evaluation are untested."""
    has_mps = torch.backends.mps.is_available()
    if device == "mps" and not has_mps:
        raise ConfigError("device must be auto or cpu on this machine, got mps: torch sees no MPS device")
    if device == "mps" or (device == "auto" and has_mps and not torch.cuda.is_available()):
        return torch.device("mps")
    return pick_device(device)
