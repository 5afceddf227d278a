"""Detecting in picture files that belong to no dataset."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from detector.boxes import xyxy_to_xywh
from detector.checkpoint import TrainState, load_checkpoint
from detector.config import Config
from detector.datasets.images import decode_image
from detector.datasets.loader import EMPTY, Sample, collate, to_device
from detector.datasets.sampling import SampleKey
from detector.datasets.transforms import padded_size, resize_picture, resized_size
from detector.errors import CheckpointError, ImageError, InputError
from detector.inference.detector import Detector
from detector.models import RetinaNet, build_model
from detector.precision import resolve_precision
from detector.structures import Batch, Categories, Detections, HeadOutputs

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"}
"""What is picked up from folders; files named one by one may be called anything."""


class Predictor:
    """A detector ready for use: pictures in, objects out.

    Args:
        state: a checkpoint's content; averaged weights are used where there are any.
        device: to run on.
        score_thresh: replaces the checkpoint's own.
    """

    def __init__(self, state: TrainState, *, device: torch.device, score_thresh: float | None = None) -> None:
        self.config: Config = state.config
        self.categories: Categories = state.categories
        self.origin = state.origin
        """Lines about imported weights."""
        self.apply_exif = state.apply_exif and self.config.data.exif != "ignore"
        """Pass it to `decode_image`, so that pictures lie as those of training did."""
        self.device = device
        settings: dict[str, Any] = self.config.postprocess.model_dump()
        if score_thresh is not None:
            settings["score_thresh"] = score_thresh
        precision = resolve_precision(self.config.eval.precision, device)
        self.detector = Detector(model_of(state, device), settings, precision=precision, device=device)

    def __call__(self, image: NDArray[np.uint8]) -> Detections:
        """Objects in one (H, W, 3) uint8 RGB picture, boxes in its pixels."""
        batch = self.batch_of(image)
        (detections,) = self.detector(batch.images, batch.image_sizes, original_sizes=batch.original_sizes)
        return detections

    def outputs(self, image: NDArray[np.uint8]) -> HeadOutputs:
        """What the network says about one (H, W, 3) uint8 RGB picture."""
        batch = self.batch_of(image)
        return self.detector.outputs(batch.images, batch.image_sizes)

    def batch_of(self, image: NDArray[np.uint8]) -> Batch:
        """One (H, W, 3) uint8 RGB picture as the network takes it: the image on the device, all else in main memory."""
        data, model = self.config.data, self.config.model
        original = (image.shape[0], image.shape[1])
        size = resized_size(original, min_size=data.eval_size, max_size=data.max_size, resize=model.resize)
        if model.resize != "float_bilinear":
            image = resize_picture(image, size, model.resize)
        key = SampleKey(0, 0, data.eval_size, padded_size(size, model.pad))
        loaded = collate([Sample(image, size, EMPTY, 0, original, key)])
        return loaded._replace(images=to_device(loaded, self.device).images, unresized=None)


def model_of(state: TrainState, device: torch.device) -> RetinaNet:
    """The network of a checkpoint with the weights to use, in evaluation mode."""
    model = build_model(state.config.model, len(state.categories))
    try:
        model.load_state_dict(state.weights)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's weights do not fit the network that it describes: {error}") from None
    model.to(device).eval()
    if state.config.train.channels_last:
        model.to(memory_format=torch.channels_last)
    return model


def load_predictor(checkpoint: Path, *, device: torch.device, score_thresh: float | None = None) -> Predictor:
    """A predictor from a checkpoint file, which needs nothing beside it.

    Raises:
        CheckpointError: unreadable.
    """
    return Predictor(load_checkpoint(checkpoint), device=device, score_thresh=score_thresh)


def find_pictures(inputs: Sequence[str], *, output_dir: Path | None = None) -> list[Path]:
    """The files that names, folders (searched to the bottom) and globs stand for, each once, in order.

    Raises:
        InputError: every input that stands for no picture; or pictures in `output_dir`, which would be written over.
    """
    found: dict[Path, None] = {}
    mistakes = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            here = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif path.exists():
            here = [path]
        else:
            here = [Path(p) for p in sorted(glob.glob(text, recursive=True)) if Path(p).is_file()]
        if not here:
            what = "a folder without pictures" if path.is_dir() else "no file, folder or glob with matches"
            mistakes.append(f"  {text}: {what}")
        found.update(dict.fromkeys(here))
    if mistakes:
        raise InputError("\n".join(["inputs must be pictures, folders of pictures, or globs, got:", *mistakes]))
    inside = [str(p) for p in found if output_dir is not None and p.resolve().parent == output_dir.resolve()]
    if inside:
        raise InputError(
            f"--output-dir {output_dir} must hold none of the inputs, which drawn pictures could replace, got "
            f"{', '.join(inside[:3])}{', ...' if len(inside) > 3 else ''}; choose another folder"
        )
    return list(found)


class Prediction(NamedTuple):
    """One input's outcome."""

    path: Path
    image: NDArray[np.uint8] | None
    detections: Detections | None
    error: str | None
    """Why the file could not be read."""


def predict_files(predictor: Predictor, paths: Sequence[Path]) -> Iterator[Prediction]:
    """Detect in one file after the other; an unreadable one is reported and the others go on."""
    for path in paths:
        try:
            image = decode_image(path, apply_exif=predictor.apply_exif)
        except (ImageError, OSError) as error:
            yield Prediction(path, None, None, str(error))
            continue
        yield Prediction(path, image, predictor(image), None)


def result_records(
    image_id: int, file_name: str, detections: Detections, categories: Categories
) -> list[dict[str, Any]]:
    """COCO results records at full precision, with the file's name added."""
    boxes = xyxy_to_xywh(detections.boxes.double()).tolist()
    return [
        {
            "image_id": image_id,
            "category_id": categories.ids[label],
            "bbox": box,
            "score": score,
            "file_name": file_name,
        }
        for box, score, label in zip(boxes, detections.scores.tolist(), detections.labels.tolist(), strict=True)
    ]


def write_records(records: Sequence[dict[str, Any]], path: Path) -> None:
    """A COCO results file, one record a line, whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("[" + ",\n".join(json.dumps(record) for record in records) + "]\n", encoding="utf-8")
    temporary.replace(path)
