"""albumentations pipelines from the config; the only file that knows that library."""

from __future__ import annotations

import difflib
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the internet for its newest version

import albumentations as A
import numpy as np
from numpy.typing import NDArray

from detector.config import ConfigError
from detector.datasets.coco import Objects

COMPOSITES = ("OneOf", "SomeOf", "RandomOrder", "Sequential", "OneOrOther")


class Augmentation:
    """A pipeline that gives the same result for the same seed, whatever process or order it runs in.

    Args:
        steps: as in `data.augment`: one {name: arguments} each.
        min_visibility: objects of which less than this share of their area is left are dropped from the view.

    Raises:
        ConfigError: everything that is wrong with the steps: unknown transforms or arguments, transforms that would
            move pixels but not boxes, or that give anything but 8-bit RGB.
    """

    def __init__(self, steps: Sequence[Mapping[str, Mapping[str, Any]]], *, min_visibility: float) -> None:
        mistakes: list[str] = []
        transforms = [_build(step, f"data.augment[{i}]", mistakes) for i, step in enumerate(steps)]
        if mistakes:
            raise ConfigError("\n".join(["the augmentation pipeline has mistakes:", *(f"  {m}" for m in mistakes)]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that no transform moves boxes, which is as it may be
            self.pipeline = A.Compose(
                [t for t in transforms if t is not None],
                bbox_params=A.BboxParams(
                    format="pascal_voc",
                    label_fields=["rows"],
                    min_visibility=min_visibility,
                    clip=True,
                    filter_invalid_bboxes=True,
                ),
            )
        self._try_out()

    def __call__(self, image: NDArray[np.uint8], objects: Objects, *, seed: Sequence[int]) -> _View:
        """Augment one picture with its objects and ignore regions.

        Args:
            image: (H, W, 3) uint8.
            objects: boxes inside the image.
            seed: any number of integers; the same ones give the same view.
        """
        rng = np.random.default_rng(seed)
        self.pipeline.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        num_objects = len(objects.boxes)
        boxes = np.concatenate([objects.boxes, objects.ignore_boxes])
        result = self.pipeline(image=image, bboxes=boxes, rows=np.arange(len(boxes)))
        rows = np.asarray(result["rows"], dtype=np.int64)
        boxes = np.asarray(result["bboxes"], dtype=np.float32).reshape(-1, 4)
        real = rows < num_objects
        return result["image"], Objects(boxes[real], objects.labels[rows[real]], boxes[~real])

    def _try_out(self) -> None:
        """Run once on a made-up picture: what fails here would have failed hours into the training."""
        picture = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
        objects = Objects(np.array([[20, 30, 90, 100]], np.float32), np.array([0]), np.zeros((0, 4), np.float32))
        for seed in range(4):
            try:
                image, _ = self(picture, objects, seed=[seed])
            except Exception as error:  # whatever a transform throws, it is the pipeline that is wrong
                raise ConfigError(
                    f"data.augment fails on a 160x120 picture: {type(error).__name__}: {error}"
                ) from error
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ConfigError(
                    f"data.augment must leave 8-bit RGB pictures, got {image.dtype} of shape {image.shape}; "
                    "remove Normalize, ToFloat, ToTensorV2 and the like (the model normalises)"
                )


_View = tuple[NDArray[np.uint8], Objects]


def _build(step: Mapping[str, Any], where: str, mistakes: list[str]) -> Any:
    """One transform, or None with the reason added to `mistakes`."""
    if not isinstance(step, Mapping) or len(step) != 1:
        mistakes.append(f"{where}: must be one transform, `Name: {{arguments}}`, got {step!r:.80}")
        return None
    ((name, arguments),) = step.items()
    arguments = dict(arguments or {})
    transform = getattr(A, str(name), None)
    usable = {n for n in dir(A) if isinstance(getattr(A, n), type) and issubclass(getattr(A, n), A.BasicTransform)}
    if name not in usable and name not in COMPOSITES:
        near = difflib.get_close_matches(str(name), [*usable, *COMPOSITES], n=1)
        hint = f"did you mean {near[0]}?" if near else f"see the transforms of albumentations {A.__version__}"
        mistakes.append(f"{where}: unknown transform {name}; {hint}")
        return None
    if name in COMPOSITES:
        inner = arguments.pop("transforms", None)
        if not isinstance(inner, list):
            mistakes.append(f"{where}: {name} must have a list `transforms`, got {inner!r:.80}")
            return None
        arguments["transforms"] = [_build(s, f"{where}.{name}.transforms[{i}]", mistakes) for i, s in enumerate(inner)]
        if None in arguments["transforms"]:
            return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # the library only warns about arguments it does not know
            built = transform(**_tuples(arguments))  # type: ignore[misc]
    except (TypeError, ValueError, UserWarning) as error:
        reason = " ".join(str(error).split()).split(" For further information")[0]
        mistakes.append(f"{where}: {name}({', '.join(arguments)}) is refused by albumentations: {reason}")
        return None
    if isinstance(built, A.DualTransform) and "bboxes" not in {str(t.value).lower() for t in built._targets}:
        mistakes.append(f"{where}: {name} moves pixels but not boxes; use another transform")
        return None
    return built


def _tuples(arguments: Any) -> Any:
    """YAML has lists where the library wants tuples."""
    if isinstance(arguments, dict):
        return {key: value if key == "transforms" else _tuples(value) for key, value in arguments.items()}
    return tuple(_tuples(a) for a in arguments) if isinstance(arguments, list) else arguments
