"""Check the image files of a dataset against its annotations: names, presence, sizes, and EXIF orientations."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from detector.config import Exif, Verify
from detector.datasets.file_names import find_files, is_absolute, last_parts
from detector.datasets.image_check import BAD, GOOD, MISSING, ImageFacts, check_images
from detector.datasets.images import DEEP_GREY
from detector.datasets.problems import Problem, problem
from detector.datasets.store import FolderStore, ImageStore
from detector.datasets.tables import ImageTable
from detector.text import shown

DECODE_UP_TO = 5_000
"""With `verify="auto"`: decode every image of datasets up to this size (a minute at most), above it read headers."""


class FileChecks(NamedTuple):
    """What the check of a dataset's image files found besides problems."""

    exif: ExifDecision
    note: str = ""
    """How the files were checked and how their modes are converted, for the log."""
    missing: tuple[Path, str] | None = None
    """Folder and file name of the first image that is missing."""


def check_files(
    images: ImageTable,
    store: ImageStore | None,
    *,
    verify: Verify,
    exif: Exif,
    progress: bool,
    where: str,
    problems: list[Problem],
) -> FileChecks:
    """Drop images whose files cannot be used, and fill in the sizes of the others; see `inspection.inspect_tables`."""
    unsized = (images.sizes == 0).any(axis=1)
    if store is None:
        for i in np.flatnonzero(images.kept & unsized).tolist():
            problems.append(problem("no image size", images.where(i), "no usable width and height"))
        return FileChecks(ExifDecision(exif == "apply", "no images, nothing to rotate"))
    if isinstance(store, FolderStore):
        _use_last_parts(images, store.root, problems)
    _check_names(images, store, problems)
    decode = verify == "decode" or (verify == "auto" and len(images.ids) <= DECODE_UP_TO)
    which = images.kept & (unsized | (verify != "none"))
    facts = check_images(store, images.names, which, decode=decode, progress=progress)
    if isinstance(store, FolderStore) and (facts.status == MISSING).any():
        renamed = _use_similar_names(images, store.root, facts.status == MISSING, problems)
        _update(facts, check_images(store, images.names, renamed, decode=decode, progress=False), renamed)
    decision = decide_exif(exif, images, facts, checked=verify != "none", where=where, problems=problems)
    _compare(images, facts, store, decision.apply, problems)
    note = "not checked (data.verify=none)" if verify == "none" else _files_note(facts, images.kept, decode)
    missing = None
    if isinstance(store, FolderStore) and (facts.status == MISSING).any():
        missing = store.root, images.names[int((facts.status == MISSING).argmax())]
    return FileChecks(decision, note, missing)


def _use_last_parts(images: ImageTable, root: Path, problems: list[Problem]) -> None:
    """Replace absolute paths and URLs by their last parts, if each is a file of the folder and no other image's."""
    absolute = [i for i in np.flatnonzero(images.kept).tolist() if is_absolute(images.names[i])]
    parts = last_parts(images.names[i] for i in absolute)
    if not parts or not all(_encodable(part) and os.path.isfile(root / part) for part in parts):
        return
    if not set(parts).isdisjoint(images.names):
        return
    for i, part in zip(absolute, parts, strict=True):
        _rename(images, i, part, problems)


def _use_similar_names(
    images: ImageTable, root: Path, missing: NDArray[np.bool_], problems: list[Problem]
) -> NDArray[np.bool_]:
    """Replace names of missing files by those of files that are written in another way; returns which."""
    rows = np.flatnonzero(missing).tolist()
    taken = [images.names[i] for i in np.flatnonzero(~missing).tolist()]
    found = find_files(root, [images.names[i] for i in rows], taken=taken)
    renamed = np.zeros(len(missing), bool)
    for i in rows:
        if images.names[i] in found:
            _rename(images, i, found[images.names[i]], problems)
            renamed[i] = True
    return renamed


def _rename(images: ImageTable, i: int, name: str, problems: list[Problem]) -> None:
    problems.append(problem("file name written differently", images.where(i), f"the file is {shown(name)}"))
    images.names[i] = name


def _update(facts: ImageFacts, others: ImageFacts, rows: NDArray[np.bool_]) -> None:
    """Replace some rows of facts by others."""
    for name in ("status", "sizes", "orientations", "modes", "peaks"):
        getattr(facts, name)[rows] = getattr(others, name)[rows]
    facts.reasons.update(others.reasons)


def _check_names(images: ImageTable, store: ImageStore, problems: list[Problem]) -> None:
    """Note names that are used twice, and drop images whose name leads out of the store."""
    seen: dict[str, int] = {}
    for i in np.flatnonzero(images.kept).tolist():
        name = images.names[i]
        if seen.setdefault(name, i) != i:
            detail = f"image {images.ids[seen[name]]} has the same file"
            problems.append(problem("duplicate file name", images.where(i), detail))
        reason = _unsafe(name, store)
        if reason is not None:
            images.drop(i, problems, "unsafe file name", reason)


def _unsafe(name: str, store: ImageStore) -> str | None:
    if not name.strip():
        return "file_name is empty"
    if "\0" in name or not _encodable(name):
        return "file_name has characters that no file name can have"
    if any(len(os.fsencode(part)) > 255 for part in name.split("/")):
        return "file_name is longer than file systems allow"
    if name.endswith(("/", "/.")) or name == ".":
        return "file_name names a folder"
    if name[0] in "/\\" or re.match(r"[A-Za-z]:[\\/]", name):
        return "file_name must be relative to the image folder"
    if ".." in name and ".." in re.split(r"[\\/]", name) and isinstance(store, FolderStore):
        outside = store.outside(name)
        return f"leads out of the image folder, to {outside}" if outside is not None else None
    return None


def _encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


class ExifDecision(NamedTuple):
    """What is done about EXIF orientations."""

    apply: bool
    """Whether they are applied."""
    note: str
    """The decision and its reason, for the log."""
    tagged: bool = False
    """Whether any image has one."""


def decide_exif(
    setting: Exif, images: ImageTable, facts: ImageFacts, *, checked: bool, where: str, problems: list[Problem]
) -> ExifDecision:
    """Decide for a dataset whether EXIF orientations are applied.

    With "auto", by majority: the declared size of an image that its orientation turns by a quarter is either the stored
    one or the rotated one.

    Args:
        setting: `data.exif`.
        images: with the declared sizes.
        facts: of the image files.
        checked: whether all image files were opened.
        where: names the dataset in messages.
        problems: receives one if nothing decides.
    """
    good = facts.status == GOOD
    tagged = good & (facts.orientations > 1)
    with_tag = f"{int(tagged.sum()):,} of {int(good.sum()):,} images have an orientation tag"
    if setting != "auto":
        apply = setting == "apply"
        note = f"orientation {'applied' if apply else 'ignored'} as configured; {with_tag}"
        return ExifDecision(apply, note, bool(tagged.any()))
    if not checked:
        return ExifDecision(False, "orientation not applied (images were not checked)", bool(tagged.any()))
    if not tagged.any():
        return ExifDecision(False, "no image has an orientation tag")
    quarter = (facts.orientations >= 5) & images.kept & (facts.sizes[:, 0] != facts.sizes[:, 1])
    rotated = int((quarter & (images.sizes == facts.sizes[:, ::-1]).all(axis=1)).sum())
    stored = int((quarter & (images.sizes == facts.sizes).all(axis=1)).sum())
    if rotated == stored:
        evidence = (
            f"{rotated:,} declared sizes support it and as many contradict it" if rotated else "no size decides it"
        )
        note = f"orientation not applied: {with_tag}; {evidence}"
        problems.append(problem("undecided EXIF orientation", where, f"{with_tag}; {evidence}"))
        return ExifDecision(False, note, True)
    apply = rotated > stored
    note = (
        f"orientation {'applied' if apply else 'not applied'}: {with_tag}; the declared size is the rotated one for "
        f"{rotated:,} and the stored one for {stored:,}"
    )
    return ExifDecision(apply, note, True)


def _compare(
    images: ImageTable, facts: ImageFacts, store: ImageStore, apply_exif: bool, problems: list[Problem]
) -> None:
    """Drop images that are missing, undecodable or of another size than declared; then fill in sizes."""
    for i in np.flatnonzero(facts.status == MISSING).tolist():
        images.drop(i, problems, "missing image", _why_missing(store, images.names[i]))
    for i in np.flatnonzero(facts.status == BAD).tolist():
        images.drop(i, problems, "undecodable image", facts.reasons[i])
    good = facts.status == GOOD
    decoded = np.where(((facts.orientations >= 5) & apply_exif)[:, None], facts.sizes[:, ::-1], facts.sizes)
    declared = (images.sizes > 0).all(axis=1)
    for i in np.flatnonzero(good & ~declared).tolist():
        problems.append(
            problem("unusable image size", images.where(i), "no usable width and height in the annotations")
        )
    wrong = good & declared & (decoded != images.sizes).any(axis=1)
    exchanged = wrong & (decoded == images.sizes[:, ::-1]).all(axis=1) & (facts.orientations < 5)
    for i in np.flatnonzero(wrong).tolist():
        (height, width), (real_height, real_width) = images.sizes[i].tolist(), decoded[i].tolist()
        detail = f"width x height is {width} x {height} in the annotations, {real_width} x {real_height} in the file"
        if facts.orientations[i] >= 5:
            detail += f" with EXIF orientation {facts.orientations[i]} {'applied' if apply_exif else 'not applied'}"
        images.drop(i, problems, "image size mismatch", detail)
    if exchanged.sum() >= 3 and exchanged.sum() >= 0.5 * (good & (decoded[:, 0] != decoded[:, 1])).sum():
        detail = f"{int(exchanged.sum()):,} images have width and height exchanged in the annotations"
        problems.append(problem("suspected format", "images", detail))
    good &= ~wrong
    images.sizes[good] = decoded[good]
    deep = good & np.isin(facts.modes, [mode.encode() for mode in DEEP_GREY])
    if deep.any() and facts.peaks[deep].max() < 64:
        top = int(facts.peaks[deep].max())
        detail = f"{int(deep.sum()):,} images whose brightest pixel becomes {top} of 255: 10-bit or 12-bit values?"
        problems.append(problem("dark 16-bit images", "images", detail))


def _why_missing(store: ImageStore, name: str) -> str:
    path = store.describe(name)
    if isinstance(store, FolderStore) and os.path.islink(path):
        return f"{path} is a link to {os.readlink(path)}, which does not exist"
    return f"no such file: {path}"


def _files_note(facts: ImageFacts, kept: NDArray[np.bool_], decoded: bool) -> str:
    """Describe how the image files were checked and how their modes are converted."""
    conversions = {
        "1": "black and white", "L": "grey", "P": "palette", "RGBA": "alpha dropped", "LA": "alpha dropped",
        **dict.fromkeys(DEEP_GREY, "grey, scaled by 1/257"),
    }  # fmt: skip
    counted = []
    for mode, n in Counter(facts.modes[kept].tolist()).most_common():
        name = mode.decode()
        deep = name.endswith(";16") and name not in DEEP_GREY
        conversion = "high byte of 16 bits" if deep else conversions.get(name)
        counted.append(f"{n:,} {name}" + (f" ({conversion})" if conversion else ""))
    return f"{'every pixel decoded' if decoded else 'headers read'}; {', '.join(counted)}"
