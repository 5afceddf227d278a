"""albumentations pipelines from the config; the only file that knows that library."""

from __future__ import annotations

import difflib
import itertools
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import albumentations as A
import numpy as np
from numpy.typing import NDArray

from detector.datasets.coco import Objects
from detector.errors import ConfigError

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the internet for its newest version

COMPOSITES = ("OneOf", "SomeOf", "RandomOrder", "Sequential", "OneOrOther")


Steps = Sequence[Mapping[str, Mapping[str, Any]]]
TILES = 16
"""Into how many parts an ignore region is cut along each side; see `_tiles`."""


class Augmentation:
    """A pipeline that gives the same result for the same seed, whatever process or order it runs in.

    Args:
        steps: as in `data.augment`: one {name: arguments} each.
        min_visibility: objects of which less than this share of their area is left are dropped from the view. Ignore
            regions are kept as far as they are in the view, because what they hide must not become background.
        sizes: (height, width) of pictures to try the pipeline on: the smallest and the most oblong it will meet.

    Raises:
        ConfigError: everything that is wrong with the steps: unknown transforms or arguments, transforms that would
            move pixels but not boxes, that give anything but 8-bit RGB, or that fail on a picture of one of the sizes.
    """

    def __init__(
        self, steps: Steps, *, min_visibility: float, sizes: Sequence[tuple[int, int]] = ((120, 160),)
    ) -> None:
        mistakes: list[str] = []
        self.pipeline = _compose(steps, min_visibility, mistakes)
        if mistakes:
            raise ConfigError("\n".join(["the augmentation pipeline has mistakes:", *(f"  {m}" for m in mistakes)]))
        self._try_out(sizes, draws=4)
        # What is rare by chance is certain here: every transform is applied, every branch is taken.
        whole = self.pipeline
        for branch in range(_num_branches(steps)):
            self.pipeline = _compose(_certain(steps, branch), min_visibility, mistakes)
            self._try_out(sizes, draws=1)
        self.pipeline = whole

    def __call__(
        self, image: NDArray[np.uint8], objects: Objects, *, seed: Sequence[int], name: str = "a picture"
    ) -> tuple[NDArray[np.uint8], Objects]:
        """Augment one picture with its objects and ignore regions.

        Args:
            image: (H, W, 3) uint8.
            objects: boxes inside the image.
            seed: any number of integers; the same ones give the same view.
            name: of the picture, for errors.

        Raises:
            ConfigError: a transform failed, or left something else than 8-bit RGB.
        """
        rng = np.random.default_rng(seed)
        self.pipeline.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        num_objects = len(objects.boxes)
        tiles, region_of_tile = _tiles(objects.ignore_boxes)
        boxes = np.concatenate([objects.boxes, tiles])
        where = f"data.augment fails on {name} of {image.shape[1]} x {image.shape[0]} pixels"
        try:
            result = self.pipeline(image=image, bboxes=boxes, rows=np.arange(len(boxes)))
        except Exception as error:  # whatever a transform throws, it is the pipeline that is wrong
            raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error
        picture = result["image"]
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ConfigError(
                f"{where}: data.augment must leave 8-bit RGB pictures, got {picture.dtype} of shape {picture.shape}; "
                "remove Normalize, ToFloat, ToTensorV2 and the like (the model normalises)"
            )
        rows = np.asarray(result["rows"], dtype=np.int64)
        boxes = np.asarray(result["bboxes"], dtype=np.float32).reshape(-1, 4)
        real = rows < num_objects
        ignore_boxes = _untiled(boxes[~real], region_of_tile[rows[~real] - num_objects])
        return picture, Objects(boxes[real], objects.labels[rows[real]], ignore_boxes)

    def _try_out(self, sizes: Sequence[tuple[int, int]], *, draws: int) -> None:
        """Run on made-up pictures: what fails here would have failed hours into the training."""
        for height, width in sizes:
            picture = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
            box = np.array([[width / 8, height / 4, width / 2, height * 0.8]], np.float32)
            objects = Objects(box, np.array([0]), np.zeros((0, 4), np.float32))
            for seed in range(draws):
                self(picture, objects, seed=[seed])


def extreme_sizes(sizes: NDArray[np.integer]) -> list[tuple[int, int]]:
    """Of (N, 2) heights and widths: the lowest and the narrowest picture, on which crops fail first."""
    if not len(sizes):
        return []
    chosen = {int(sizes[:, side].argmin()) for side in (0, 1)}
    return [(int(sizes[i, 0]), int(sizes[i, 1])) for i in sorted(chosen)]


def _compose(steps: Steps, min_visibility: float, mistakes: list[str]) -> Any:
    transforms = [_build(step, f"data.augment[{i}]", mistakes) for i, step in enumerate(steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no transform moves boxes, which is as it may be
        return A.Compose(
            [t for t in transforms if t is not None],
            bbox_params=A.BboxParams(
                format="pascal_voc",
                label_fields=["rows"],
                min_visibility=min_visibility,
                clip=True,
                filter_invalid_bboxes=True,
            ),
        )


CHOOSING = ("OneOf", "SomeOf", "OneOrOther")


def _num_branches(steps: Steps) -> int:
    """Pipelines that are needed to take every branch of every choice once."""
    most = 1
    for step in steps:
        ((name, arguments),) = step.items()
        inner = (arguments or {}).get("transforms", [])
        most = max(most, len(inner) if name in CHOOSING else 1, _num_branches(inner))
    return most


def _certain(steps: Steps, branch: int) -> list[dict[str, dict[str, Any]]]:
    """The same steps with every chance 1; of a choice the given branch (counted round)."""
    certain: list[dict[str, dict[str, Any]]] = []
    for step in steps:
        ((name, arguments),) = step.items()
        arguments = dict(arguments or {})
        if name not in COMPOSITES:
            certain.append({name: {**arguments, "p": 1.0}})
            continue
        inner = arguments["transforms"]
        if name in CHOOSING:
            inner = [inner[branch % len(inner)]]
        certain.append({"Sequential": {"transforms": _certain(inner, branch), "p": 1.0}})
    return certain


def _tiles(regions: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Boxes (R, 4) cut into small ones, and whose part each is.

    The library drops a box of which a crop leaves too little. Of a region cut into tiles it drops the tiles that are
    out of the view, and what is left bounds the part of the region that is in it.
    """
    tiles, region = [], []
    for r, (left, top, right, bottom) in enumerate(regions.tolist()):
        x = np.linspace(left, right, min(TILES, max(1, int((right - left) / 4))) + 1)
        y = np.linspace(top, bottom, min(TILES, max(1, int((bottom - top) / 4))) + 1)
        tiles += [(a, c, b, d) for a, b in itertools.pairwise(x) for c, d in itertools.pairwise(y)]
        region += [r] * ((len(x) - 1) * (len(y) - 1))
    return np.array(tiles, np.float32).reshape(-1, 4), np.array(region, np.int64)


def _untiled(tiles: NDArray[np.float32], region: NDArray[np.int64]) -> NDArray[np.float32]:
    """The box around what is left of each region; (R, 4), without those of which nothing is."""
    left = [tiles[region == r] for r in np.unique(region)]
    bounds = [np.concatenate([t[:, :2].min(axis=0), t[:, 2:].max(axis=0)]) for t in left]
    return np.array(bounds, np.float32).reshape(-1, 4)


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
