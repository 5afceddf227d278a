"""Check images and annotations against each other and against the image files, and pack what is usable."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.config import Exif, Verify
from detector.datasets.box_checks import BoxChecks, check_boxes, format_problems
from detector.datasets.coco import CROWD, IGNORE, TRAINABLE, CocoDataset
from detector.datasets.file_checks import check_files
from detector.datasets.ids import FileIds
from detector.datasets.json_columns import numbers_text
from detector.datasets.problems import Finding, Problem, group, problem, to_json
from detector.datasets.store import ImageStore
from detector.datasets.tables import NO_ID, AnnotationTable, ImageTable
from detector.structures import Categories

MAX_COMPARED = 15
"""Class names for which the most similar one of the other side is searched, among its first thousand."""


@dataclass(frozen=True)
class Inspection:
    """What is wrong with a dataset, and the dataset of everything usable."""

    source: Path
    findings: tuple[Finding, ...]
    dataset: CocoDataset | None = None
    """None if there is a fatal finding."""
    categories: Categories | None = None
    """The source's classes; None if they could not be read."""
    num_images: int = 0
    """Images in the source, usable or not."""
    num_usable: int = 0
    """Images left."""
    num_lost_annotations: int = 0
    """Annotations of the other images."""
    missing: tuple[Path, str] | None = None
    """Folder and file name of the first image that is missing."""


def inspect_tables(
    source: Path,
    images: ImageTable,
    annotations: AnnotationTable,
    categories: Categories | None,
    *,
    store: ImageStore | None,
    training_categories: Categories | None = None,
    verify: Verify = "auto",
    exif: Exif = "auto",
    progress: bool = False,
    problems: list[Problem] | None = None,
    file_ids: FileIds | None = None,
) -> Inspection:
    """Check columns of images and annotations, whatever their source, and pack what is usable into a `CocoDataset`.

    Args:
        source: names the annotations in messages.
        images: is changed: images are dropped, sizes filled in.
        annotations: of these images.
        categories: the source's classes; None if they could not be read, which is among the `problems`.
        store: the image files; None checks the annotations alone.
        training_categories: the classes of the training set, to match by name.
        verify: whether image files are decoded, their headers read, or nothing is checked (`data.verify`).
        exif: whether EXIF orientations are applied (`data.exif`).
        progress: whether to print a progress bar to stderr.
        problems: found so far.
        file_ids: the ids as the source writes them; None: as integers.
    """
    problems = [] if problems is None else problems
    matched = _match_categories(source, categories, training_categories, images, problems)
    _drop_repeated_ids(images, problems)
    num_annotations = len(annotations) + annotations.num_malformed
    annotations, rows, labels = _link(annotations, images, matched, problems)
    declared_sizes = images.sizes.copy()
    files = check_files(
        images, store, verify=verify, exif=exif, progress=progress, where=str(source), problems=problems
    )
    problems += format_problems(annotations.xywh, declared_sizes[rows], source.name)
    checks = check_boxes(annotations.xywh, images.sizes[rows])
    problems += _box_problems(checks, annotations, images, rows)
    num_images, num_usable = len(images.ids) + images.num_malformed, int(images.kept.sum())
    if not num_usable:
        problems.append(problem("no usable image", str(source), f"none of its {num_images:,} images can be used"))
    excess = f" (by at most {checks.excess[checks.partly].max():.2g} px)" if checks.partly.any() else ""
    findings = group(problems, {"box partly outside": excess})

    lost, unusable = int(np.count_nonzero(~images.kept[rows])), num_annotations - len(annotations)
    notes = [
        f"left out: {num_images - num_usable:,} of {num_images:,} images, with {lost:,} annotations"
        if num_images > num_usable else "",
        f"left out: {unusable:,} of {num_annotations:,} annotations themselves" if unusable else "",
        *(f"found: {len(f.problems):,} {f.kind}, {f.action}{f.note}" for f in findings),
        f"EXIF: {files.exif.note}",
        f"files: {files.note}" if files.note else "",
    ]  # fmt: skip
    dataset = None
    if matched is not None and all(finding.severity != "fatal" for finding in findings):
        dataset = CocoDataset(
            annotations=source,
            store=store,
            categories=matched,
            apply_exif=files.exif.apply,
            overrides_exif=files.exif.tagged and not files.exif.apply,
            packed_findings=zlib.compress(to_json(findings).encode(), 1),
            notes=tuple(note for note in notes if note),
            file_ids=FileIds() if file_ids is None else file_ids,
            **_packed(images, annotations, rows, labels, trainable=~checks.zero & ~checks.outside),
        )
    return Inspection(source, findings, dataset, categories, num_images, num_usable, lost, files.missing)


def _match_categories(
    source: Path,
    own: Categories | None,
    training: Categories | None,
    images: ImageTable,
    problems: list[Problem],
) -> Categories | None:
    """Bring the source's classes, and the columns of the images' class mask, into the order of training, by name."""
    if own is None or training is None:
        return own
    own_place = {name: k for k, name in enumerate(own.names)}
    training_names = frozenset(training.names)
    differing = [(name, "this file", training.names) for name in own.names if name not in training_names]
    differing += [(name, "training", own.names) for name in training.names if name not in own_place]
    for k, (name, place, others) in enumerate(differing):
        near = get_close_matches(name, others[:1000], 1, 0.6) if k < MAX_COMPARED else []
        detail = f"{name!r} is only in {place}" + (f" (nearest on the other side: {near[0]!r})" if near else "")
        problems.append(problem("category names", str(source), f"category names must be those of training: {detail}"))
    if differing:
        return own
    order = [own_place[name] for name in training.names]
    if images.class_mask is not None:
        images.class_mask = images.class_mask[:, order]
    return Categories(tuple(own.ids[k] for k in order), training.names)


def _drop_repeated_ids(images: ImageTable, problems: list[Problem]) -> None:
    """Drop images whose id an earlier image has."""
    ids, first = np.unique(images.ids, return_index=True)
    repeated = images.kept.copy()
    repeated[first] = False
    for i in np.flatnonzero(repeated).tolist():
        owner = images.names[int(first[np.searchsorted(ids, images.ids[i])])] or "an earlier image"
        images.drop(i, problems, "duplicate image id", f"the id belongs to {owner} already")


def _link(
    annotations: AnnotationTable, images: ImageTable, categories: Categories | None, problems: list[Problem]
) -> tuple[AnnotationTable, NDArray[np.int64], NDArray[np.int32]]:
    """Return the T annotations that have an image and a class, with their (T,) rows in `images` and (T,) labels."""

    def report(kind: str, mask: NDArray[np.bool_], detail: str, values: NDArray[np.int64]) -> None:
        for k in np.flatnonzero(mask).tolist():
            problems.append(problem(kind, annotations.where(k), detail.format(values[k])))

    # Annotations belong to the first image that has their image id.
    has_image, rows = _find(annotations.image_ids, images.ids)
    report("orphan annotation", ~has_image, "no image has the id {}", annotations.image_ids)
    if categories is None:  # there will be no dataset, but there may be more to report
        has_class, labels = np.ones(len(annotations), bool), np.zeros(len(annotations), np.int64)
    else:
        has_class, labels = _find(annotations.category_ids, np.array(categories.ids, np.int64))
    report("unknown category", ~has_class, "category_id {} is not declared", annotations.category_ids)
    repeated = annotations.ids != NO_ID
    repeated[np.unique(annotations.ids, return_index=True)[1]] = False
    report("duplicate annotation id", repeated, "an earlier annotation has the id {} too", annotations.ids)
    keep = np.flatnonzero(has_image & has_class)
    return annotations.take(keep), rows[keep], labels[keep].astype(np.int32)


def _find(queries: NDArray[np.int64], ids: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Look up each of (T,) queries: whether it is among the ids, and the first position where it is."""
    known, first = np.unique(ids, return_index=True)
    if not len(known):
        return np.zeros(len(queries), bool), np.zeros(len(queries), np.int64)
    place = np.minimum(np.searchsorted(known, queries), len(known) - 1)
    return known[place] == queries, first[place]


def _box_problems(
    checks: BoxChecks, annotations: AnnotationTable, images: ImageTable, rows: NDArray[np.int64]
) -> list[Problem]:
    problems = []
    for kind, mask in (
        ("box not finite", checks.not_finite),
        ("box of zero size", checks.zero),
        ("box outside image", checks.outside),
        ("box partly outside", checks.partly),
    ):
        for k in np.flatnonzero(mask).tolist():
            image = int(rows[k])
            height, width = images.sizes[image].tolist()
            beyond = f", {checks.excess[k]:.2g} px beyond the image" if kind == "box partly outside" else ""
            detail = f"[x, y, width, height] {numbers_text(annotations.xywh[k])} in {width} x {height}{beyond}"
            problems.append(problem(kind, annotations.where(k, images.names[image]), detail))
    return problems


def _packed(
    images: ImageTable,
    annotations: AnnotationTable,
    rows: NDArray[np.int64],
    labels: NDArray[np.int32],
    *,
    trainable: NDArray[np.bool_],
) -> dict[str, Any]:
    """Return the arrays of a `CocoDataset`: the kept images and their annotations of positive size, by image."""
    kept = np.flatnonzero(images.kept)
    position = np.full(len(images.ids), -1)
    position[kept] = np.arange(len(kept))
    xywh = annotations.xywh
    order = np.flatnonzero(images.kept[rows] & np.isfinite(xywh).all(axis=1) & (xywh[:, 2:] > 0).all(axis=1))
    order = order[np.argsort(position[rows[order]], kind="stable")]
    image = position[rows[order]]
    own = annotations.take(order)
    with np.errstate(over="ignore"):
        usable = np.isfinite(own.areas) & (own.areas >= 0)
        areas = np.where(usable, own.areas, own.xywh[:, 2] * own.xywh[:, 3])
    flags = trainable[order] * TRAINABLE + own.crowd * CROWD + own.ignore * IGNORE
    encoded = [images.names[i].encode("utf-8", "surrogatepass") for i in kept.tolist()]
    return {
        "image_ids": images.ids[kept],
        "sizes": images.sizes[kept],
        "num_objects": np.bincount(image[flags == TRAINABLE], minlength=len(kept)),
        "names": b"".join(encoded),
        "name_ends": np.cumsum([len(e) for e in encoded], dtype=np.int64),
        "starts": np.searchsorted(image, np.arange(len(kept) + 1)),
        "xywh": own.xywh,
        "labels": labels[order],
        "areas": areas,
        "flags": flags.astype(np.uint8),
        "extras": own.extras,
        "class_mask": None if images.class_mask is None else images.class_mask[kept],
    }
