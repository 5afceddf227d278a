"""Dividing one annotation file into a part to learn from and parts to be measured by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from detector.dataset_tools.voc import write_json
from detector.datasets.coco_json import load_json, require_coco


def split_file(
    annotations: Path, fractions: Mapping[str, float], *, output_dir: Path, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Write `output_dir/NAME.json` for "train" and every name in `fractions`; returns what they hold.

    Args:
        annotations: a COCO file.
        fractions: shares of the images, as {"val": 0.2}; the rest is for training.
        output_dir: for the new files.
        seed: the same one divides the same file in the same way.

    Raises:
        DatasetError: the file is no COCO file.
        ValueError: the fractions leave nothing; the file has too few images; or a file to write is there already.
    """
    if not all(0 < share < 1 for share in fractions.values()) or sum(fractions.values()) >= 1:
        raise ValueError(f"shares must be above 0 and leave something to learn from, got {dict(fractions)}")
    there = [str(path) for name in ("train", *fractions) if (path := output_dir / f"{name}.json").exists()]
    if there:
        raise ValueError(f"{', '.join(there)} must not be there yet; delete it or give another --output-dir")
    content = load_json(annotations)
    require_coco(annotations, content)
    parts = split_coco(content, fractions, seed=seed)
    empty = [name for name, part in parts.items() if not part["images"]]
    if empty:
        raise ValueError(f"{annotations} must have images for {', '.join(empty)} too, got {len(content['images'])}")
    for name, part in parts.items():
        write_json(output_dir / f"{name}.json", part)
    return parts


def split_coco(content: dict[str, Any], fractions: Mapping[str, float], *, seed: int) -> dict[str, dict[str, Any]]:
    """The same images, annotations and everything else, by image, in "train" and the named parts.

    Classes are shared out as the images are, the rarest first (after Sechidis et al. 2011): each part gets its share of
    the images with the class, and at least one where there are enough. Images of one file stay together. Whatever
    belongs to no image goes to "train", where opening the dataset lists it.
    """
    classes_of: defaultdict[Any, set[Any]] = defaultdict(set)
    for annotation in content["annotations"]:
        if isinstance(annotation, dict):
            classes_of[_key(annotation.get("image_id"))].add(_key(annotation.get("category_id")))
    first_of_file: dict[str, str] = {}
    group_of: dict[str, str] = {}  # of an image: the image that decides for it
    for image in content["images"]:
        if isinstance(image, dict):
            key = _key(image.get("id"))
            group_of.setdefault(key, first_of_file.setdefault(_key(image.get("file_name", key)), key))
    images_with: defaultdict[Any, dict[str, None]] = defaultdict(dict)  # a set in order
    groups = list(dict.fromkeys(group_of.values()))
    for key, group in group_of.items():
        for name in classes_of.get(key, ()):
            images_with[name][group] = None

    rng = np.random.default_rng(seed)
    part_of: dict[str, str] = {}

    def deal(candidates: list[str]) -> None:
        """Give every part its share of these images, counting those that it has."""
        free = [candidates[i] for i in rng.permutation(len(candidates)) if candidates[i] not in part_of]
        for name, share in fractions.items():
            has = sum(part_of.get(group) == name for group in candidates)
            wanted = max(round(share * len(candidates)), int(len(candidates) > len(fractions)))
            for group in free[: max(0, wanted - has)]:
                part_of[group] = name
            free = [group for group in free if group not in part_of]
        part_of.update(dict.fromkeys(free, "train"))

    for name in sorted(images_with, key=lambda name: (len(images_with[name]), str(name))):
        deal([*images_with[name]])
    deal([group for group in groups if group not in part_of])

    rest = {key: value for key, value in content.items() if key not in ("images", "annotations")}
    parts = {name: {**rest, "images": [], "annotations": []} for name in ("train", *fractions)}
    for kind, field in (("images", "id"), ("annotations", "image_id")):
        for entry in content[kind]:
            key = _key(entry.get(field)) if isinstance(entry, dict) else ""
            parts[part_of.get(group_of.get(key, ""), "train")][kind].append(entry)
    return parts


def _key(value: Any) -> str:
    """Something to compare by, whatever stands in the file."""
    return repr(value)
