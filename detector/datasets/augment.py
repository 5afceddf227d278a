"""Augmentation by albumentations pipelines; the only file that uses that library."""

from __future__ import annotations

import difflib
import itertools
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.config_packages import import_albumentations
from detector.datasets.objects import NO_OBJECTS
from detector.datasets.transforms import View
from detector.errors import ConfigError

Transforms = Sequence[Mapping[str, Mapping[str, Any]]]
"""As in `data.augment`: one {name: arguments} for each transform."""

COMPOSITES = ("OneOf", "SomeOf", "RandomOrder", "Sequential", "OneOrOther")
CHOICES = ("OneOf", "SomeOf", "OneOrOther")
"""Composites that apply only some of their transforms."""
TILES = 16
"""Number of parts into which an ignore region is cut along each side; see `_tiles`."""


@cache
def _albumentations() -> Any:
    """Import albumentations where a config augments: it is slow to import, and not everybody needs it."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or it queries the internet for its newest version
    return import_albumentations()


class Augmentation:
    """An albumentations pipeline whose result depends on the image and the random generator alone.

    Args:
        transforms: the pipeline.
        min_visibility: objects of which a smaller share of their area is left are dropped from the view. Ignore regions
            are kept as far as they are in the view, because what they hide must not become background.
        sizes: (height, width) of images to try the pipeline on: the smallest and the most oblong ones of the dataset.

    Raises:
        ConfigError: everything that is wrong with the pipeline: unknown transforms or arguments, transforms that would
            move pixels but not boxes, that return anything but 8-bit RGB, or that fail on an image of one of the sizes.
    """

    def __init__(
        self, transforms: Transforms, *, min_visibility: float, sizes: Sequence[tuple[int, int]] = ((120, 160),)
    ) -> None:
        mistakes: list[str] = []
        self.pipeline = _build_pipeline(transforms, min_visibility, mistakes)
        if mistakes:
            raise ConfigError("\n".join(["the augmentation pipeline has mistakes:", *(f"  {m}" for m in mistakes)]))
        self._try_out(sizes, draws=4)
        # What is improbable is certain here: every transform is applied, every branch is taken.
        whole = self.pipeline
        for branch in range(_num_branches(transforms)):
            self.pipeline = _build_pipeline(_certain(transforms, branch), min_visibility, mistakes)
            self._try_out(sizes, draws=1)
        self.pipeline = whole

    def __call__(self, view: View, rng: np.random.Generator, *, name: str = "an image") -> View:
        """Augment an image with its objects and ignore regions.

        Args:
            view: whose image has the size of the objects' frame.
            rng: for all random draws.
            name: of the image, for errors.

        Raises:
            ConfigError: a transform failed, or returned something else than 8-bit RGB.
        """
        self.pipeline.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        image, objects = view.image, view.objects
        num_objects = len(objects.boxes)
        tiles, region_of_tile = _tiles(objects.ignore_boxes)
        boxes = np.concatenate([objects.boxes, tiles])
        where = f"data.augment fails on {name} of {image.shape[1]} x {image.shape[0]} pixels"
        try:
            result = self.pipeline(image=image, bboxes=boxes, rows=np.arange(len(boxes)))
        except Exception as error:  # whatever a transform raises, it is the pipeline that is wrong
            raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error
        augmented = result["image"]
        if augmented.dtype != np.uint8 or augmented.ndim != 3 or augmented.shape[2] != 3:
            raise ConfigError(
                f"{where}: data.augment must return 8-bit RGB images, got {augmented.dtype} of shape "
                f"{augmented.shape}; remove Normalize, ToFloat, ToTensorV2 and the like (the model normalises)"
            )
        rows = np.asarray(result["rows"], dtype=np.int64)
        boxes = np.asarray(result["bboxes"], dtype=np.float32).reshape(-1, 4)
        real = rows < num_objects
        ignore_boxes = _bounds_of_regions(boxes[~real], region_of_tile[rows[~real] - num_objects])
        objects = objects.take(rows[real], boxes[real])._replace(ignore_boxes=ignore_boxes)
        return View(augmented, augmented.shape[:2], objects)

    def _try_out(self, sizes: Sequence[tuple[int, int]], *, draws: int) -> None:
        """Run on generated images: what fails here would fail hours into the training."""
        for height, width in sizes:
            image = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
            box = np.array([[width / 8, height / 4, width / 2, height * 0.8]], np.float32)
            view = View(image, (height, width), NO_OBJECTS._replace(boxes=box, labels=np.array([0])))
            for seed in range(draws):
                self(view, np.random.default_rng([seed]))


def extreme_sizes(sizes: NDArray[np.integer]) -> list[tuple[int, int]]:
    """Return, of (N, 2) heights and widths, the lowest and the narrowest image, on which crops fail first."""
    if not len(sizes):
        return []
    chosen = {int(sizes[:, side].argmin()) for side in (0, 1)}
    return [(int(sizes[i, 0]), int(sizes[i, 1])) for i in sorted(chosen)]


def _build_pipeline(transforms: Transforms, min_visibility: float, mistakes: list[str]) -> Any:
    library = _albumentations()
    built = [_build(transform, f"data.augment[{i}]", mistakes) for i, transform in enumerate(transforms)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no transform moves boxes, which is allowed
        return library.Compose(
            [t for t in built if t is not None],
            bbox_params=library.BboxParams(
                format="pascal_voc",
                label_fields=["rows"],
                min_visibility=min_visibility,
                clip=True,
                filter_invalid_bboxes=True,
            ),
        )


def _num_branches(transforms: Transforms) -> int:
    """Return the number of pipelines needed to take every branch of every choice once."""
    most = 1
    for transform in transforms:
        ((name, arguments),) = transform.items()
        inner = (arguments or {}).get("transforms", [])
        most = max(most, len(inner) if name in CHOICES else 1, _num_branches(inner))
    return most


def _certain(transforms: Transforms, branch: int) -> list[dict[str, dict[str, Any]]]:
    """Return the same transforms with every probability 1; of a choice, the given branch (modulo their number)."""
    certain: list[dict[str, dict[str, Any]]] = []
    for transform in transforms:
        ((name, arguments),) = transform.items()
        arguments = dict(arguments or {})
        if name not in COMPOSITES:
            certain.append({name: {**arguments, "p": 1.0}})
            continue
        inner = arguments["transforms"]
        if name in CHOICES:
            inner = [inner[branch % len(inner)]]
        certain.append({"Sequential": {"transforms": _certain(inner, branch), "p": 1.0}})
    return certain


def _tiles(regions: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Cut boxes (R, 4) into tiles; return the tiles and the region of each.

    The library drops a box of which a crop leaves too little. Of a region cut into tiles, it drops the tiles that are
    outside the view, and the others bound the part of the region that is inside.
    """
    tiles, region = [], []
    for r, (left, top, right, bottom) in enumerate(regions.tolist()):
        x = np.linspace(left, right, min(TILES, max(1, int((right - left) / 4))) + 1)
        y = np.linspace(top, bottom, min(TILES, max(1, int((bottom - top) / 4))) + 1)
        tiles += [(a, c, b, d) for a, b in itertools.pairwise(x) for c, d in itertools.pairwise(y)]
        region += [r] * ((len(x) - 1) * (len(y) - 1))
    return np.array(tiles, np.float32).reshape(-1, 4), np.array(region, np.int64)


def _bounds_of_regions(tiles: NDArray[np.float32], region: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the box around the tiles of each region that has any; (R, 4)."""
    left = [tiles[region == r] for r in np.unique(region)]
    bounds = [np.concatenate([t[:, :2].min(axis=0), t[:, 2:].max(axis=0)]) for t in left]
    return np.array(bounds, np.float32).reshape(-1, 4)


def _build(transform: Mapping[str, Any], where: str, mistakes: list[str]) -> Any:
    """Build one transform; None, with the reason added to `mistakes`, where that fails."""
    library = _albumentations()
    if not isinstance(transform, Mapping) or len(transform) != 1:
        mistakes.append(f"{where}: must be one transform, `Name: {{arguments}}`, got {transform!r:.80}")
        return None
    ((name, arguments),) = transform.items()
    arguments = dict(arguments or {})
    members = {name: getattr(library, name) for name in dir(library)}
    usable = {n for n, v in members.items() if isinstance(v, type) and issubclass(v, library.BasicTransform)}
    if name not in usable and name not in COMPOSITES:
        near = difflib.get_close_matches(str(name), [*usable, *COMPOSITES], n=1)
        hint = f"did you mean {near[0]}?" if near else f"see the transforms of albumentations {library.__version__}"
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
            warnings.simplefilter("error", UserWarning)  # the library only warns about unknown arguments
            built = getattr(library, name)(**_tuples(arguments))
    except (TypeError, ValueError, UserWarning) as error:
        reason = " ".join(str(error).split()).split(" For further information")[0]
        mistakes.append(f"{where}: {name}({', '.join(arguments)}) is refused by albumentations: {reason}")
        return None
    if isinstance(built, library.DualTransform) and "bboxes" not in {str(t.value).lower() for t in built._targets}:
        mistakes.append(f"{where}: {name} moves pixels but not boxes; use another transform")
        return None
    return built


def _tuples(arguments: Any) -> Any:
    """Convert YAML's lists to the tuples that the library expects."""
    if isinstance(arguments, dict):
        return {key: value if key == "transforms" else _tuples(value) for key, value in arguments.items()}
    return tuple(_tuples(a) for a in arguments) if isinstance(arguments, list) else arguments
