"""COCO-format datasets: reading, indexing and checking; the border where xywh and category ids become boxes and labels.

`read_coco` finds everything that is wrong with a file and its images before the first step of training, and refuses,
repairs or leaves out; it never lets anything through in silence. See `checks.KINDS` for all that it looks for.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detector.datasets.coco_json import (
    AnnotationEntries,
    ImageEntries,
    cut,
    drop_unsafe_names,
    load_json,
    nearest_path,
    numbers_text,
    read_annotations,
    read_categories,
    read_images,
    require_coco,
)
from detector.datasets.image_check import BAD, GOOD, MISSING, ImageFacts, check_images
from detector.datasets.images import DEEP_GREY
from detector.datasets.problems import (
    KINDS,
    BoxChecks,
    Problem,
    check_boxes,
    count_kinds,
    examples,
    format_problems,
    problem,
    table,
    training_boxes,
    wrap,
    write_problems,
)
from detector.errors import DatasetError
from detector.structures import Categories, GroundTruth

__all__ = ["AllBoxes", "CocoDataset", "DatasetError", "Objects", "Problem", "read_coco"]

DECODE_UP_TO = 5_000
"""With `verify="auto"`: decode every image of datasets up to this size (a minute at most), above it read headers."""

TRAINABLE, CROWD, IGNORE = 1, 2, 4  # bits of `CocoDataset.flags`


class Objects(NamedTuple):
    """What training is to find in one image."""

    boxes: NDArray[np.float32]
    """(M, 4) xyxy in pixels, clipped to the image, none of zero size."""
    labels: NDArray[np.int64]
    """(M,) in 0..K-1."""
    ignore_boxes: NDArray[np.float32]
    """(R, 4) boxes of crowd and ignore regions, clipped."""


class AllBoxes(NamedTuple):
    """Every training box of a dataset."""

    boxes: NDArray[np.float32]
    """(T, 4) as in `Objects`."""
    image_index: NDArray[np.int64]
    """(T,) position of the image in the dataset."""
    labels: NDArray[np.int64]
    """(T,)"""


@dataclass(frozen=True, eq=False, repr=False)
class CocoDataset:
    """An opened dataset of N images and G annotations.

    Everything is packed in arrays: a Python object per annotation would be copied into every loader worker as soon as
    its reference count is touched, and memory would grow with workers and time.
    """

    annotations: Path
    images: Path | None
    categories: Categories
    """Label k's name, and the id that this file has for it."""
    apply_exif: bool
    """Whether images are to be turned as their EXIF orientation says; pass it to `decode_image`."""
    overrides_exif: bool
    """Whether images have EXIF orientations that are not applied."""
    image_ids: NDArray[np.int64]
    """(N,)"""
    sizes: NDArray[np.int32]
    """(N, 2) height and width as decoded with `apply_exif`; 0 where unknown (only without images)."""
    num_objects: NDArray[np.int64]
    """(N,) training boxes per image, without crowd and ignore regions."""
    names: bytes
    name_ends: NDArray[np.int64]
    starts: NDArray[np.int64]
    """(N + 1,) annotations of image i are `starts[i]:starts[i + 1]`."""
    xywh: NDArray[np.float64]
    """(G, 4) as published; finite and of positive size."""
    labels: NDArray[np.int32]
    """(G,)"""
    areas: NDArray[np.float64]
    """(G,) as published; width times height where the file has none."""
    flags: NDArray[np.uint8]
    """(G,) bits: TRAINABLE (something of it is left in the image), CROWD, IGNORE."""
    packed_problems: bytes
    notes: tuple[str, ...]
    """Lines of the summary that only the opening knows."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def __repr__(self) -> str:
        return f"CocoDataset({str(self.annotations)!r}, {len(self):,} images, {len(self.categories)} classes)"

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything found at opening; unpacked at each call, because it is rarely wanted and can be large."""
        return tuple(Problem(*p) for p in json.loads(zlib.decompress(self.packed_problems)))

    def file_name(self, i: int) -> str:
        """As in the annotation file, relative to the image folder."""
        i = range(len(self))[i]
        start = self.name_ends[i - 1] if i else 0
        return self.names[start : self.name_ends[i]].decode("utf-8", "surrogatepass")

    def path(self, i: int) -> Path:
        """Of the image file. Raises ValueError for a dataset that was opened without images."""
        if self.images is None:
            raise ValueError(f"{self.annotations} was opened without an image folder, so image {i} has no path")
        return self.images / self.file_name(i)

    def objects(self, i: int) -> Objects:
        """What training is to find in image i."""
        i = range(len(self))[i]
        part = slice(self.starts[i], self.starts[i + 1])
        flags = self.flags[part]
        boxes = training_boxes(self.xywh[part], np.broadcast_to(self.sizes[i], (len(flags), 2)))
        wanted = flags == TRAINABLE
        ignored = (flags > TRAINABLE) & (flags & TRAINABLE > 0)
        return Objects(boxes[wanted], self.labels[part][wanted].astype(np.int64), boxes[ignored])

    def boxes(self) -> AllBoxes:
        """All training boxes, image by image."""
        wanted = self.flags == TRAINABLE
        index = np.repeat(np.arange(len(self)), np.diff(self.starts))[wanted]
        return AllBoxes(
            training_boxes(self.xywh[wanted], self.sizes[index]), index, self.labels[wanted].astype(np.int64)
        )

    def fingerprint(self) -> str:
        """Of the images and annotations: their ids, sizes, boxes, classes and order."""
        digest = hashlib.sha256(self.names)
        for array in (self.image_ids, self.sizes, self.starts, self.xywh, self.labels, self.flags):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def ground_truth(self) -> GroundTruth:
        """What evaluation compares with: the boxes as published, unclipped, of the images that are in the dataset.

        `ignore` is not passed on: pycocotools, too, goes by `iscrowd` alone.
        """
        return GroundTruth(
            categories=self.categories,
            image_ids=self.image_ids,
            ann_image_ids=np.repeat(self.image_ids, np.diff(self.starts)),
            ann_category_ids=np.array(self.categories.ids, np.int64)[self.labels],
            boxes=self.xywh,
            areas=self.areas,
            iscrowd=self.flags & CROWD > 0,
        )

    def summary(self) -> str:
        """What the dataset holds and what was done to it, in a few lines for people."""
        per_class = np.bincount(self.labels[self.flags == TRAINABLE], minlength=len(self.categories))
        order = np.argsort(-per_class, kind="stable")
        used = [f"{self.categories.names[k]} {per_class[k]:,}" for k in order if per_class[k]]
        unused = [self.categories.names[k] for k in order if not per_class[k]]
        crowd = int(np.count_nonzero(self.flags & CROWD))
        ignored = int(np.count_nonzero(self.flags & (CROWD | IGNORE) == IGNORE))
        lines = [
            ("images", f"{len(self):,}, of which {int(np.count_nonzero(self.num_objects == 0)):,} without objects"),
            ("objects", f"{int(per_class.sum()):,} of {len(used)} classes ({len(self.categories)} declared)"),
            ("classes", cut(used, 12) or "none has objects"),
            ("unused classes", cut(unused, 12)),
            ("ignore regions", f"{crowd:,} crowd, {ignored:,} marked ignore" if crowd or ignored else ""),
            *(tuple(note.split(": ", 1)) for note in self.notes),
        ]
        lines = [line for line in lines if line[1]]
        titles = [name if k == 0 or lines[k - 1][0] != name else "" for k, (name, _) in enumerate(lines)]
        told = [wrap(f"  {name:<16}{text}", "", " " * 18) for name, (_, text) in zip(titles, lines, strict=True)]
        return "\n".join([str(self.annotations), *told])


def read_coco(
    annotations: Path,
    images: Path | None,
    *,
    verify: Literal["auto", "header", "decode", "none"] = "auto",
    on_error: Literal["fail", "skip"] = "fail",
    exif: Literal["auto", "apply", "ignore"] = "auto",
    categories: Categories | None = None,
    progress: bool = True,
    problems_file: Path | None = None,
) -> CocoDataset:
    """Open and check a COCO-format dataset.

    `images` None reads the annotations alone. `verify` says how closely image files are looked at: every pixel
    ("decode"), headers, not at all ("none": sizes and existence are taken from the JSON), or by the number of images
    ("auto"). `exif` "auto" finds out from the sizes in the JSON whether the annotations were made on turned images.
    `categories` (those of training) are matched by name; without them all declared categories count, sorted by id.
    `problems_file` receives the complete list of problems, one per line. `progress` prints to stderr what is done.

    Raises `DatasetError` if the file is no COCO file, if its categories contradict each other or `categories`, if no
    image is usable, or, unless `on_error` is "skip", if anything is wrong that would change the dataset's meaning.
    """
    annotations, images = Path(annotations), None if images is None else Path(images)
    problems: list[Problem] = []
    content = load_json(annotations)
    require_coco(annotations, content)
    file_categories, label_of_id = read_categories(annotations, content["categories"], categories, problems)
    if images is not None and not os.path.isdir(images):
        raise DatasetError(f"{images}: no such image folder{nearest_path(images)}")

    entries = read_images(content["images"], problems, with_files=images is not None)
    facts, decode = None, False
    if images is not None:
        decode = verify == "decode" or (verify == "auto" and len(entries.ids) <= DECODE_UP_TO)
        which = entries.alive if verify != "none" else entries.alive & (entries.sizes == 0).any(axis=1)
        drop_unsafe_names(entries, images, problems)
        facts = check_images(images, entries.names, which & entries.alive, decode=decode, progress=progress)
    turning = _decide_exif(exif, entries, facts, looked=verify != "none")
    declared_sizes = entries.sizes.copy()
    if facts is not None and images is not None:
        _check_files(entries, facts, images, turning.apply, problems)
    else:
        for i in np.flatnonzero(entries.alive & (entries.sizes == 0).any(axis=1)).tolist():
            problems.append(problem("no image size", entries.where(i), "no usable width and height"))

    found = read_annotations(content["annotations"], entries, label_of_id, problems)
    num_annotations, num_images = len(content["annotations"]), len(content["images"])
    del content  # with a large dataset the parsed JSON is most of this process
    of_boxes, overwhelming = format_problems(found.xywh, declared_sizes[found.rows], annotations.name)
    problems += of_boxes
    checks = check_boxes(found.xywh, entries.sizes[found.rows])
    problems += _box_problems(checks, found, entries)
    table_notes = {}
    if checks.partly.any():
        table_notes["box partly outside"] = f" (by at most {checks.excess[checks.partly].max():.2g} px)"
    if problems_file is not None and (problems or verify != "none"):  # who has not looked knows of nothing mended
        write_problems(Path(problems_file), problems)
    alive = entries.alive
    lost = int(np.count_nonzero(~alive[found.rows]))
    counts = count_kinds(problems)
    refusing = frozenset(k for k in counts if KINDS[k].severity == "refuse" and (k != "format" or overwhelming))
    if not alive.any() or (refusing and on_error == "fail"):
        raise DatasetError(
            _refusal(
                annotations,
                images,
                entries,
                problems,
                refusing,
                table_notes,
                num_images=num_images,
                lost=lost,
                problems_file=problems_file,
                already_skipping=on_error == "skip",
            )
        )
    if progress and turning.undecided:
        remedy = "look at some of them and set data.exif to apply or ignore"
        print(wrap(f"warning: {annotations}: EXIF: {turning.note}; {remedy}"), file=sys.stderr, flush=True)
    if progress and problems:
        listed = f" (listed in {problems_file})" if problems_file else ""
        told = [f"{annotations}: {len(problems):,} problems{listed}", table(problems, notes=table_notes)]
        told += [wrap(f"warning: {p.where}: {p.detail}") for p in problems if p.kind == "format"]
        print("\n".join(told), file=sys.stderr, flush=True)

    notes = []
    if num_images > int(alive.sum()):
        notes.append(f"left out: {num_images - int(alive.sum()):,} of {num_images:,} images, with {lost:,} annotations")
    if num_annotations > len(found.rows):
        notes.append(f"left out: {num_annotations - len(found.rows):,} of {num_annotations:,} annotations themselves")
    notes += [f"found: {n:,} {k}, {KINDS[k].action}{table_notes.get(k, '')}" for k, n in counts.items()]
    notes.append(f"EXIF: {turning.note}")
    if facts is not None:
        notes.append(f"files: {_files_note(facts, alive, decode, verify != 'none')}")
    keep = alive[found.rows] & np.isfinite(found.xywh).all(axis=1) & (found.xywh[:, 2:] > 0).all(axis=1)
    trainable = ~checks.zero & ~checks.outside
    return _pack(annotations, images, file_categories, turning, entries, found, keep, trainable, problems, notes)


def _box_problems(checks: BoxChecks, found: AnnotationEntries, entries: ImageEntries) -> list[Problem]:
    problems = []
    for kind, mask in (
        ("box not finite", checks.not_finite),
        ("box of zero size", checks.zero),
        ("box outside image", checks.outside),
        ("box partly outside", checks.partly),
    ):
        for k in np.flatnonzero(mask).tolist():
            height, width = entries.sizes[found.rows[k]].tolist()
            over = f", {checks.excess[k]:.2g} px beyond the image" if kind == "box partly outside" else ""
            detail = f"[x, y, width, height] {numbers_text(found.xywh[k])} in {width} x {height}{over}"
            problems.append(problem(kind, found.where(k, entries), detail))
    return problems


class _Turning(NamedTuple):
    """What is done about EXIF orientations."""

    apply: bool
    note: str
    tagged: bool
    """Whether there are any."""
    undecided: bool = False


def _decide_exif(
    exif: Literal["auto", "apply", "ignore"], entries: ImageEntries, facts: ImageFacts | None, *, looked: bool
) -> _Turning:
    """Whether images are turned as their EXIF orientation says, and the reason in words."""
    if facts is None:
        return _Turning(exif == "apply", "no images, nothing to turn", tagged=False)
    turned = (facts.status == GOOD) & (facts.orientations > 1)
    tagged = bool(turned.any())
    with_tag = f"{int(turned.sum()):,} of {int((facts.status == GOOD).sum()):,} images have an orientation tag"
    if exif != "auto":
        applied = exif == "apply"
        note = f"orientation {'applied' if applied else 'ignored'} as configured; {with_tag}"
        return _Turning(applied, note, tagged)
    if not looked:
        return _Turning(False, "orientation not applied (images were not looked at)", tagged)
    if not tagged:
        return _Turning(False, "no image has an orientation tag", tagged)
    quarter = (facts.orientations >= 5) & entries.alive & (facts.sizes[:, 0] != facts.sizes[:, 1])
    for_it = int((quarter & (entries.sizes == facts.sizes[:, ::-1]).all(axis=1)).sum())
    against = int((quarter & (entries.sizes == facts.sizes).all(axis=1)).sum())
    if for_it == against:
        told = "none of them tells" if not for_it else f"{for_it:,} speak for it and as many against"
        note = f"orientation not applied: {with_tag}, {told} by its size whether the annotations follow it"
        return _Turning(False, note, tagged, undecided=True)
    applied = for_it > against
    note = (
        f"orientation {'applied' if applied else 'not applied'}: {with_tag}; the JSON has the turned size for "
        f"{for_it:,} and the stored size for {against:,}"
    )
    return _Turning(applied, note, tagged)


def _check_files(
    entries: ImageEntries, facts: ImageFacts, root: Path, apply_exif: bool, problems: list[Problem]
) -> None:
    """Leave out images that are missing, undecodable or of another size than the JSON says; then fill in sizes."""
    for i in np.flatnonzero(facts.status == MISSING).tolist():
        entries.drop(i, problems, "missing image", f"no such file in {root}")
    for i in np.flatnonzero(facts.status == BAD).tolist():
        entries.drop(i, problems, "undecodable image", facts.reasons[i])
    good = facts.status == GOOD
    decoded = np.where(((facts.orientations >= 5) & apply_exif)[:, None], facts.sizes[:, ::-1], facts.sizes)
    stated = (entries.sizes > 0).all(axis=1)
    for i in np.flatnonzero(good & ~stated).tolist():
        problems.append(problem("unusable image size", entries.where(i), "no usable width and height in the JSON"))
    wrong = good & stated & (decoded != entries.sizes).any(axis=1)
    exchanged = wrong & (decoded == entries.sizes[:, ::-1]).all(axis=1) & (facts.orientations < 5)
    for i in np.flatnonzero(wrong).tolist():
        (height, width), (real_height, real_width) = entries.sizes[i].tolist(), decoded[i].tolist()
        detail = f"width x height is {width} x {height} in the JSON, {real_width} x {real_height} in the file"
        if facts.orientations[i] >= 5:
            detail += f" with EXIF orientation {facts.orientations[i]} {'applied' if apply_exif else 'not applied'}"
        entries.drop(i, problems, "image size mismatch", detail)
    if exchanged.sum() >= 3 and exchanged.sum() >= 0.5 * (good & (decoded[:, 0] != decoded[:, 1])).sum():
        detail = f"{int(exchanged.sum()):,} images have width and height exchanged in the JSON"
        problems.append(problem("format", "images", detail))
    good &= ~wrong
    entries.sizes[good] = decoded[good]
    deep = good & np.isin(facts.modes, [mode.encode() for mode in DEEP_GREY])
    if deep.any() and facts.peaks[deep].max() < 64:
        top = int(facts.peaks[deep].max())
        detail = f"{int(deep.sum()):,} images whose brightest pixel becomes {top} of 255: 10-bit or 12-bit values?"
        problems.append(problem("dark 16-bit images", "images", detail))


def _files_note(facts: ImageFacts, alive: NDArray[np.bool_], decode: bool, looked: bool) -> str:
    if not looked:
        return "not looked at (data.verify=none)"
    modes = Counter(facts.modes[alive].tolist())
    meanings = {
        "1": "black and white", "L": "grey", "P": "palette", "RGBA": "alpha dropped", "LA": "alpha dropped",
        **dict.fromkeys(DEEP_GREY, "grey, scaled by 1/257"),
    }  # fmt: skip

    def told(mode: str) -> str:
        meaning = "high byte of 16 bits" if mode.endswith(";16") and mode not in DEEP_GREY else meanings.get(mode)
        return f"{mode} ({meaning})" if meaning else mode

    counted = [f"{n:,} {told(mode.decode())}" for mode, n in modes.most_common()]
    return f"{'every pixel decoded' if decode else 'headers read'}; {', '.join(counted)}"


def _pack(
    annotations: Path,
    images: Path | None,
    categories: Categories,
    turning: _Turning,
    entries: ImageEntries,
    found: AnnotationEntries,
    keep: NDArray[np.bool_],
    trainable: NDArray[np.bool_],
    problems: list[Problem],
    notes: list[str],
) -> CocoDataset:
    """The images that are alive, with the annotations `keep` (T,) sorted by image."""
    alive = np.flatnonzero(entries.alive)
    position = np.full(len(entries.ids), -1)
    position[alive] = np.arange(len(alive))
    order = np.flatnonzero(keep)
    order = order[np.argsort(position[found.rows[order]], kind="stable")]
    image = position[found.rows[order]]
    flags = trainable[order] * TRAINABLE + found.crowd[order] * CROWD + found.ignore[order] * IGNORE
    encoded = [entries.names[i].encode("utf-8", "surrogatepass") for i in alive.tolist()]
    return CocoDataset(
        annotations=annotations,
        images=images,
        categories=categories,
        apply_exif=turning.apply,
        overrides_exif=turning.tagged and not turning.apply,
        image_ids=entries.ids[alive],
        sizes=entries.sizes[alive],
        num_objects=np.bincount(image[flags == TRAINABLE], minlength=len(alive)),
        names=b"".join(encoded),
        name_ends=np.cumsum([len(e) for e in encoded], dtype=np.int64),
        starts=np.searchsorted(image, np.arange(len(alive) + 1)),
        xywh=found.xywh[order],
        labels=found.labels[order],
        areas=found.areas[order],
        flags=flags.astype(np.uint8),
        packed_problems=zlib.compress(json.dumps(problems).encode(), 1),
        notes=tuple(notes),
    )


def _refusal(
    annotations: Path,
    images: Path | None,
    entries: ImageEntries,
    problems: list[Problem],
    refusing: frozenset[str],
    table_notes: dict[str, str],
    *,
    num_images: int,
    lost: int,
    problems_file: Path | None,
    already_skipping: bool,
) -> str:
    """The text of the error: what is wrong, how often, examples, where the full list is, and what to do."""
    counts = count_kinds(problems)
    left = int(entries.alive.sum())
    severe = sum(counts[k] for k in refusing)
    if not left:
        head = f"{annotations}: none of its {num_images:,} images can be used"
    else:
        head = f"{annotations}: refused for {severe:,} problem{'s' * (severe != 1)} that would change what is learnt"
    lines = [head, "", table(problems, refusing, table_notes), "", "examples"]
    told = [k for k in counts if k in refusing] + [k for k in counts if k not in refusing]
    lines += [examples(problems, told), ""]
    if problems_file is not None:
        lines.append(f"complete list: {problems_file} ({len(problems):,} lines)")
    lines.append("what to do")
    lines += [wrap(f"{k}: {KINDS[k].remedy}", "  - ", "    ") for k in told if KINDS[k].remedy]
    hint = _missing_hint(images, next((p for p in problems if p.kind == "missing image"), None))
    if hint:
        lines.append(wrap(hint, "  - ", "    "))
    if left and not already_skipping:
        lines.append(
            wrap(
                f"or set data.on_error=skip, which uses {left:,} of {num_images:,} images and leaves out "
                f"{num_images - left:,} with {lost:,} annotations",
                "  - ",
                "    ",
            )
        )
    return "\n".join(lines)


def _missing_hint(images: Path | None, missing: Problem | None) -> str:
    """Where a missing image might be instead: a folder up or down, or under another extension."""
    if images is None or missing is None:
        return ""
    name = Path(missing.where.split("(", 1)[1][:-1].replace("\\", "/"))
    if os.path.isfile(images / name.name):
        return f"{name} is not in {images}, but {name.name} is: take the folders out of file_name"
    folders = list(images.absolute().parents)[:3]
    try:
        folders += sorted(Path(entry.path) for entry in os.scandir(images) if entry.is_dir())
    except OSError as error:
        return f"{images} cannot be listed: {error.strerror}"
    for folder in folders:
        if os.path.isfile(folder / name):
            return f"{name} exists in {folder}: set the image folder to that"
    for suffix in (".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".PNG"):
        if os.path.isfile(images / name.with_suffix(suffix)):
            return f"{name} is not there, but {name.with_suffix(suffix)} is: another extension?"
    return ""
