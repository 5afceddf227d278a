"""Cutting one annotation file into k folds: each image is to be measured by once, and to be learnt from k - 1 times."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detector.dataset_tools.voc import write_json
from detector.datasets.coco_json import load_json, require_coco
from detector.errors import DatasetError


class Fold(NamedTuple):
    """Two COCO files: all folds but one, and that one."""

    train: Path
    val: Path


def write_folds(annotations: Path, k: int, *, output_dir: Path, seed: int = 0) -> tuple[list[Fold], list[str]]:
    """Write `output_dir/fold0_train.json`, `fold0_val.json`, ...; the same seed gives the same files.

    Args:
        annotations: a COCO file.
        k: number of folds, at least 2.
        output_dir: for the new files; older ones of these names are replaced.
        seed: of the order in which images are dealt.

    Returns:
        The k folds, and warnings: of classes that cannot be in all of them.

    Raises:
        DatasetError: the file is no COCO file, or has fewer images than folds.
    """
    content = load_json(annotations)
    require_coco(annotations, content)
    fold_of, images_with = deal(content, max(k, 1), seed=seed)
    if k < 2 or len(set(fold_of.values())) < k:
        raise DatasetError(
            f"folds must be at least 2 and no more than there are images, got {k} for the {len(fold_of)} images of "
            f"{annotations}"
        )
    rest = {key: value for key, value in content.items() if key not in ("images", "annotations")}
    folds = []
    for i in range(k):
        # what belongs to no image is left in the training parts, where opening the dataset lists it
        inside = {kind: [_fold(entry, field, fold_of) == i for entry in content[kind]] for kind, field in FIELDS}
        fold = Fold(output_dir / f"fold{i}_train.json", output_dir / f"fold{i}_val.json")
        for path, wanted in ((fold.train, False), (fold.val, True)):
            part = {
                kind: [entry for entry, is_in in zip(content[kind], inside[kind], strict=True) if is_in is wanted]
                for kind in inside
            }
            write_json(path, {**rest, **part})
        folds.append(fold)
    names = {repr(c.get("id")): c.get("name") for c in content["categories"] if isinstance(c, dict)}
    warnings = [
        f"{annotations.name}: class {names.get(category, category)} is in {len(images)} image{'s' * (len(images) > 1)}, "
        f"fewer than {k} folds: where a fold has none of it, its AP is undefined and in no mean"
        for category, images in images_with.items()
        if len(images) < k
    ]
    return folds, warnings


FIELDS = (("images", "id"), ("annotations", "image_id"))


def _fold(entry: Any, field: str, fold_of: dict[str, int]) -> int | None:
    return fold_of.get(repr(entry.get(field))) if isinstance(entry, dict) else None


def deal(content: dict[str, Any], k: int, *, seed: int) -> tuple[dict[str, int], dict[str, list[str]]]:
    """The fold of each image, such that every class is in all folds alike (after Sechidis et al. 2011).

    Rarest class first, each of its images goes to the fold that has the fewest images of that class, and among such to
    the smallest. Images of one file stay together.

    Args:
        content: of a COCO file; entries that are no objects are passed over.
        k: number of folds.
        seed: of the order of images.

    Returns:
        Folds 0..k-1 by the `repr` of the image id, and by that of the category id the images (of different files) with it.
    """
    first_of_file: dict[str, str] = {}
    group_of: dict[str, str] = {}  # of an image: the image that decides for it
    for image in content["images"]:
        if isinstance(image, dict):
            key = repr(image.get("id"))
            group_of.setdefault(key, first_of_file.setdefault(repr(image.get("file_name", key)), key))
    groups = list(dict.fromkeys(group_of.values()))
    classes_of: defaultdict[str, dict[str, None]] = defaultdict(dict)  # sets in order
    for annotation in content["annotations"]:
        if isinstance(annotation, dict) and (key := repr(annotation.get("image_id"))) in group_of:
            classes_of[group_of[key]][repr(annotation.get("category_id"))] = None
    order = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    images_with: defaultdict[str, list[str]] = defaultdict(list)
    for group in order:
        for category in classes_of[group]:
            images_with[category].append(group)

    fold_of: dict[str, int] = {}
    sizes: Counter[int] = Counter()
    holds: Counter[tuple[int, str]] = Counter()

    def put(group: str, wanted: str | None) -> None:
        if group in fold_of:
            return
        fold = min(range(k), key=lambda i: (holds[i, wanted] if wanted is not None else 0, sizes[i], i))
        fold_of[group] = fold
        sizes[fold] += 1
        holds.update((fold, category) for category in classes_of[group])

    for category in sorted(images_with, key=lambda category: (len(images_with[category]), category)):
        for group in images_with[category]:
            put(group, category)
    for group in order:
        put(group, None)
    return {key: fold_of[group] for key, group in group_of.items()}, dict(images_with)
