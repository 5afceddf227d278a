"""Stratified splits of one COCO file: training, validation and test sets by shares, or k folds for cross-validation."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detector.atomic import write_json
from detector.datasets.coco_json import load_json, require_coco
from detector.datasets.ids import id_key
from detector.errors import DatasetError, UserError
from detector.text import printable


class Fold(NamedTuple):
    """The two COCO files of one fold: the other folds together, and the fold itself."""

    train: Path
    val: Path


class Stratification(NamedTuple):
    """The part of every image, and the images of every category."""

    part_of: dict[str, int]
    """Index of the part, by `_key` of the image id."""
    images_with: dict[str, list[str]]
    """Images (of different files) that have an annotation of a category, by `_key` of the category id."""


def split_file(
    annotations: Path, fractions: Mapping[str, float], *, output_dir: Path, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Write a stratified split as `output_dir/NAME.json`, for "train" and every name in `fractions`.

    Args:
        annotations: a COCO file.
        fractions: shares of the images, e.g. {"val": 0.2}; the remaining images are for training.
        output_dir: folder for the new files.
        seed: random seed of the split; the same seed and file give the same split.

    Returns:
        The content of the new files, by name.

    Raises:
        DatasetError: the file is not a COCO file, or has too few images.
        UserError: the fractions leave no images for training, or a file to write exists already.
    """
    if not all(0 < share < 1 for share in fractions.values()) or sum(fractions.values()) >= 1:
        raise UserError(f"shares must be above 0 and leave images for training, got {dict(fractions)}")
    existing = [str(path) for name in ("train", *fractions) if (path := output_dir / f"{name}.json").exists()]
    if existing:
        raise UserError(f"{', '.join(existing)} must not exist yet; delete it or give another --output-dir")
    content = load_json(annotations)
    require_coco(annotations, content)
    parts = split_coco(content, fractions, seed=seed)
    empty = [name for name, part in parts.items() if not part["images"]]
    if empty:
        raise DatasetError(f"{annotations} must have images for {', '.join(empty)} too, got {len(content['images'])}")
    for name, part in parts.items():
        write_json(part, output_dir / f"{name}.json", compact=True)
    return parts


def split_coco(content: dict[str, Any], fractions: Mapping[str, float], *, seed: int) -> dict[str, dict[str, Any]]:
    """Return `split_file`'s parts of the content of a COCO file.

    Annotations without an image and malformed entries are left in "train", where opening the dataset reports them.
    """
    shares = [1 - sum(fractions.values()), *fractions.values()]
    part_of = stratify(content, shares, seed=seed).part_of
    return {
        name: _select(content, part_of, {index} if index else {0, None})
        for index, name in enumerate(("train", *fractions))
    }


def write_folds(annotations: Path, k: int, *, output_dir: Path, seed: int = 0) -> tuple[list[Fold], list[str]]:
    """Write k stratified folds as `output_dir/fold0_train.json`, `fold0_val.json`, ...

    Every image is in one validation file and in the k - 1 training files of the other folds. Annotations without an
    image and malformed entries are left in the training files, where opening the dataset reports them.

    Args:
        annotations: a COCO file.
        k: number of folds, at least 2.
        output_dir: folder for the new files; existing files of these names are replaced.
        seed: random seed of the folds; the same seed and file give the same folds.

    Returns:
        The k folds, and one warning for every category with fewer images than folds.

    Raises:
        DatasetError: the file is not a COCO file, or has fewer images than folds.
    """
    content = load_json(annotations)
    require_coco(annotations, content)
    part_of, images_with = stratify(content, [1 / max(k, 1)] * max(k, 1), seed=seed)
    if k < 2 or len(set(part_of.values())) < k:
        raise DatasetError(
            f"folds must be at least 2 and at most the number of images, got {k} for the {len(part_of)} images of "
            f"{annotations}"
        )
    folds = [Fold(output_dir / f"fold{i}_train.json", output_dir / f"fold{i}_val.json") for i in range(k)]
    for i, fold in enumerate(folds):
        write_json(_select(content, part_of, {None, *range(k)} - {i}), fold.train, compact=True)
        write_json(_select(content, part_of, {i}), fold.val, compact=True)
    names = {_key(c.get("id")): printable(str(c.get("name"))) for c in content["categories"] if isinstance(c, dict)}
    warnings = [
        f"{annotations.name}: class {names.get(category) or printable(category)} is in {len(images)} "
        f"image{'s' * (len(images) > 1)}, fewer than {k} folds: in a fold without it, its AP is undefined and left "
        "out of the mean"
        for category, images in images_with.items()
        if len(images) < k
    ]
    return folds, warnings


def stratify(content: dict[str, Any], shares: Sequence[float], *, seed: int) -> Stratification:
    """Assign every image to a part so that each part gets its share of the images of every category.

    Iterative stratification (Sechidis et al. 2011): the rarest category first, each of its images goes to the part that
    lacks most of its share of that category, then of all images. If a category has as many images as there are parts,
    every part gets one before any part gets another. Images without annotations come last. Images of one file stay
    together.

    Args:
        content: content of a COCO file; malformed entries are ignored.
        shares: shares of the parts; their sum is 1.
        seed: random seed of the order of images.
    """
    first_of_file: dict[str, str] = {}
    group_of: dict[str, str] = {}  # all images of a file -> its first image
    for image in content["images"]:
        if isinstance(image, dict):
            key = _key(image.get("id"))
            group_of.setdefault(key, first_of_file.setdefault(repr(image.get("file_name", key)), key))
    groups = list(dict.fromkeys(group_of.values()))
    categories_of: defaultdict[str, dict[str, None]] = defaultdict(dict)  # an ordered set
    for annotation in content["annotations"]:
        if isinstance(annotation, dict) and (key := _key(annotation.get("image_id"))) in group_of:
            categories_of[group_of[key]][_key(annotation.get("category_id"))] = None
    order = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    images_with: defaultdict[str, list[str]] = defaultdict(list)
    for group in order:
        for category in categories_of[group]:
            images_with[category].append(group)

    part_of_group: dict[str, int] = {}
    counts: Counter[tuple[int, str | None]] = Counter()  # images by part and category; category None: all images

    def lack(part: int, category: str | None, total: int) -> tuple[bool, float]:
        count = counts[part, category]
        return count == 0 and total >= len(shares), shares[part] * total - count

    rarest_first = sorted(images_with.items(), key=lambda item: (len(item[1]), item[0]))
    strata: list[tuple[str | None, list[str]]] = [*rarest_first, (None, order)]
    for stratum, members in strata:
        for group in members:
            if group in part_of_group:
                continue
            part = max(
                range(len(shares)),
                key=lambda part: (lack(part, stratum, len(members)), lack(part, None, len(order)), -part),
            )
            part_of_group[group] = part
            counts.update((part, each) for each in (None, *categories_of[group]))
    return Stratification({key: part_of_group[group] for key, group in group_of.items()}, dict(images_with))


def _key(value: Any) -> str:
    """A text for an id, the same for all ways to write it; other values have one, too."""
    key = id_key(value)
    return repr(value if key is None else key)


def _select(content: dict[str, Any], part_of: Mapping[str, int], parts: Collection[int | None]) -> dict[str, Any]:
    """Return a COCO file's content with the images and annotations of `parts` only; None: those without an image."""
    selected = {key: value for key, value in content.items() if key not in ("images", "annotations")}
    for kind, field in (("images", "id"), ("annotations", "image_id")):
        selected[kind] = [
            entry
            for entry in content[kind]
            if (part_of.get(_key(entry.get(field))) if isinstance(entry, dict) else None) in parts
        ]
    return selected
