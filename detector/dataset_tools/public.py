"""Public datasets in a data folder, by name: download, verify, unpack, convert.

A dataset's folder exists only once it is whole: everything is built in a hidden folder beside it and renamed. What is
whole is left alone.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from detector.dataset_tools.archive import unpack
from detector.dataset_tools.download import Archive, Say, fetch, nearest, part_path, require_space, size_on_disk
from detector.dataset_tools.voc import Problem, read_names, voc_to_coco, write_json
from detector.errors import DownloadError


@dataclass(frozen=True)
class Part:
    """One archive that unpacks to one folder of a dataset."""

    archive: Archive
    folder: str  # also the archive's only top-level folder
    suffix: str
    count: int  # files with this suffix
    names: tuple[str, ...] = ()  # files that must be among them


@dataclass(frozen=True)
class SplitCount:
    """What a converted split must hold."""

    images: int
    boxes: int


# COCO publishes no sums. These sizes and sums are those TensorFlow Datasets and other projects pin, all the same.
COCO2017: Mapping[str, Part] = {
    "train": Part(
        Archive(
            url="http://images.cocodataset.org/zips/train2017.zip",
            name="train2017.zip",
            size=19_336_861_798,
            sha256="69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
            unpacked_limit=22_000_000_000,
        ),
        folder="train2017",
        suffix=".jpg",
        count=118_287,
    ),
    "val": Part(
        Archive(
            url="http://images.cocodataset.org/zips/val2017.zip",
            name="val2017.zip",
            size=815_585_330,
            sha256="4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
            unpacked_limit=950_000_000,
        ),
        folder="val2017",
        suffix=".jpg",
        count=5_000,
    ),
    "annotations": Part(
        Archive(
            url="http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
            name="annotations_trainval2017.zip",
            size=252_907_541,
            sha256="113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
            unpacked_limit=1_200_000_000,
        ),
        folder="annotations",
        suffix=".json",
        count=6,
        names=("instances_train2017.json", "instances_val2017.json"),
    ),
}
BCCD_URL = "https://github.com/Shenggan/BCCD_Dataset"
BCCD_COMMIT = "d272fb14cdff6e473fafeeeba32aba5f560e9e43"
# GitHub packs an archive for each request and its bytes are not stable: the counts below are the check.
BCCD_ARCHIVE = Archive(
    url=f"{BCCD_URL}/archive/{BCCD_COMMIT}.zip",
    name=f"BCCD_Dataset-{BCCD_COMMIT[:12]}.zip",
    size=None,
    sha256=None,
    unpacked_limit=100_000_000,
)
BCCD_CATEGORIES = ("RBC", "WBC", "Platelets")  # id 1, 2, 3
BCCD_SPLITS: Mapping[str, SplitCount] = {
    "train": SplitCount(images=205, boxes=2804),
    "val": SplitCount(images=87, boxes=1137),
    "test": SplitCount(images=72, boxes=945),
}


def get_coco2017(
    root: Path,
    *,
    parts: Sequence[str] = ("train", "val", "annotations"),
    keep_archives: bool = False,
    table: Mapping[str, Part] = COCO2017,
    say: Say = print,
) -> None:
    """Make ``root/coco/{train2017,val2017,annotations}``, as far as ``parts`` names them.

    Raises:
        DownloadError: an unknown part, too little disk, no network, a wrong file, or a folder in the way.
    """
    mistakes = [
        f"part must be one of {', '.join(table)}, got {name!r}{nearest(name, table)}"
        for name in dict.fromkeys(parts)
        if name not in table
    ]
    if mistakes or not parts:
        raise DownloadError("; ".join(mistakes) or f"parts must name one or more of {', '.join(table)}", exit_code=2)
    folder, archives = root / "coco", root / "archives"
    todo: list[Part] = []
    for name in dict.fromkeys(parts):
        part = table[name]
        missing = _missing_files(folder / part.folder, part)
        if missing is None:
            say(f"{folder / part.folder} is complete ({part.count} {part.suffix} files); nothing to do")
        else:
            _refuse_occupied(folder / part.folder, missing)
            todo.append(part)
    if not todo:
        return
    _make_folder(folder)
    require_space(folder, _space_needed([part.archive for part in todo], archives, keep_archives))
    for part in todo:
        fetched = _archive(part.archive, archives, keep=keep_archives, say=say)
        with fetched as path, _built_aside(folder / part.folder) as staging:
            unpack(path, staging, limit_bytes=part.archive.unpacked_limit, place=_below(part.folder))
            missing = _missing_files(staging, part)
            if missing is not None:
                raise DownloadError(f"{path} {missing}; delete it and run this again")
        say(f"{folder / part.folder} is complete ({part.count} {part.suffix} files)")


def get_bccd(
    root: Path,
    *,
    keep_archives: bool = False,
    archive: Archive = BCCD_ARCHIVE,
    splits: Mapping[str, SplitCount] = BCCD_SPLITS,
    say: Say = print,
) -> None:
    """Make ``root/bccd/{images,annotations}``: 364 blood-cell images and one COCO JSON a split.

    Raises:
        DownloadError: too little disk, no network, counts other than expected, or a folder in the way.
    """
    folder, archives = root / "bccd", root / "archives"
    mistakes = _bccd_mistakes(folder, splits)
    if not mistakes:
        say(f"{folder} is complete ({_counts(splits)}); nothing to do")
        return
    _refuse_occupied(folder, mistakes[0])
    _make_folder(root)
    require_space(root, _space_needed([archive], archives, keep_archives))
    with _archive(archive, archives, keep=keep_archives, say=say) as path, _built_aside(folder) as staging:
        raw = staging / "raw"
        staging.mkdir()
        unpack(path, raw, limit_bytes=archive.unpacked_limit, place=_bccd_place)
        try:
            _convert_bccd(raw, staging, splits=splits, say=say)
        except FileNotFoundError as error:
            raise DownloadError(
                f"{path} must hold {error.filename}, got no such file; delete it and run again"
            ) from error
        shutil.rmtree(raw)
        mistakes = _bccd_mistakes(staging, splits)
        if mistakes:
            raise DownloadError(
                f"{path} must be BCCD at {BCCD_COMMIT[:12]}: {'; '.join(mistakes)}; delete it and run again"
            )
    say(f"{folder} is complete ({_counts(splits)})")


@contextlib.contextmanager
def _archive(archive: Archive, folder: Path, *, keep: bool, say: Say) -> Iterator[Path]:
    """Fetch the archive; afterwards delete it, unless it is to be kept or was there before, put by hand."""
    _make_folder(folder)
    path = folder / archive.name
    was_there = path.exists()
    say(f"uses {path}" if was_there else f"downloads {archive.url}")
    yield fetch(archive, folder, say=say)
    if was_there or keep:
        say(f"{path} stays; nothing needs it any more")
    else:
        path.unlink()
        with contextlib.suppress(OSError):  # not empty: other archives
            folder.rmdir()


@contextlib.contextmanager
def _built_aside(folder: Path) -> Iterator[Path]:
    """Give a path to build at; it becomes ``folder`` in one step if the block ends well, else nothing stays."""
    staging = folder.with_name(f".{folder.name}.unfinished")
    if staging.exists():
        shutil.rmtree(staging)
    try:
        yield staging
        if folder.exists():  # empty, see _refuse_occupied
            folder.rmdir()
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _space_needed(archives: Sequence[Archive], folder: Path, keep: bool) -> int:
    """Return the largest number of bytes in use at any moment, beyond what is there now."""
    needed = peak = 0
    for archive in archives:
        path = folder / archive.name
        size = archive.size if archive.size is not None else archive.unpacked_limit
        download = 0 if path.exists() else max(0, size - size_on_disk(part_path(path)))
        needed += download + archive.unpacked_limit
        peak = max(peak, needed)
        if not keep and not path.exists():
            needed -= size
    return peak


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"{folder} must be a folder to write in, got {error.strerror}", exit_code=2) from error


def _refuse_occupied(folder: Path, mistake: str) -> None:
    """Raise if ``folder`` holds anything: it is not complete, and not ours to delete."""
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise DownloadError(f"{folder} {mistake}; move it away and run this again", exit_code=2)


def _missing_files(folder: Path, part: Part) -> str | None:
    """Say what ``folder`` must hold and does not, or None if it is complete."""
    found = {path.name for path in folder.iterdir() if path.suffix == part.suffix} if folder.is_dir() else set()
    missing = [name for name in part.names if name not in found]
    if missing:
        return f"must hold {', '.join(missing)}, got {len(found)} other {part.suffix} files"
    if len(found) < part.count:
        return f"must hold {part.count} {part.suffix} files, got {len(found)}"
    return None


def _below(folder: str) -> Callable[[str], str | None]:
    """Return a ``place`` for `unpack` that takes the members below ``folder`` out of it and leaves out the others."""
    return lambda name: name.removeprefix(f"{folder}/") if name.startswith(f"{folder}/") else None


def _bccd_place(name: str) -> str | None:
    """Keep what the conversion reads: GitHub puts everything below one folder named after the commit."""
    inner = name.partition("/")[2]
    wanted = inner == "LICENSE" or re.fullmatch(
        r"BCCD/(JPEGImages/[^/]+\.jpg|Annotations/[^/]+\.xml|ImageSets/Main/(train|val|test)\.txt)", inner
    )
    return inner if wanted else None


def _convert_bccd(raw: Path, folder: Path, *, splits: Mapping[str, SplitCount], say: Say) -> None:
    """Convert the unpacked repository to ``folder/{images,annotations}``; ids count on from split to split."""
    voc = raw / "BCCD"
    problems: list[Problem] = []
    images = boxes = 0
    for split in splits:
        result = voc_to_coco(
            voc / "JPEGImages",
            voc / "Annotations",
            names=read_names(voc / "ImageSets" / "Main" / f"{split}.txt"),
            categories=BCCD_CATEGORIES,
            first_image_id=images + 1,
            first_box_id=boxes + 1,
        )
        for image in result.coco["images"]:
            image["license"] = 1
        images += len(result.coco["images"])
        boxes += len(result.coco["annotations"])
        problems += result.problems
        info = {"description": "BCCD (blood cells), COCO conversion", "url": BCCD_URL, "version": BCCD_COMMIT}
        licenses = [{"id": 1, "name": "MIT", "url": "https://opensource.org/licenses/MIT"}]
        write_json(folder / "annotations" / f"{split}.json", {"info": info, "licenses": licenses, **result.coco})
    (voc / "JPEGImages").rename(folder / "images")
    (raw / "LICENSE").rename(folder / "LICENSE")
    dropped = sum(problem.lost == "box" for problem in problems)
    say(f"dropped {dropped} of {boxes + dropped} boxes; {len(problems)} problems in all" + (":" if problems else ""))
    for problem in problems:
        say(f"  {problem}")


def _bccd_mistakes(folder: Path, splits: Mapping[str, SplitCount]) -> list[str]:
    """Say how ``folder`` differs from the complete dataset."""
    if not folder.is_dir():
        return ["must be a folder"]
    mistakes = []
    present = {path.name for path in (folder / "images").iterdir()} if (folder / "images").is_dir() else set()
    for split, expected in splits.items():
        path = folder / "annotations" / f"{split}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names = [image["file_name"] for image in content["images"]]
            found = SplitCount(images=sum(name in present for name in names), boxes=len(content["annotations"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            mistakes.append(f"must hold a readable annotations/{split}.json, got {error}")
            continue
        if found != expected:
            mistakes.append(f"must hold {_counts({split: expected})}, got {_counts({split: found})}")
    return mistakes


def _counts(splits: Mapping[str, SplitCount]) -> str:
    return ", ".join(f"{name} {count.images} images and {count.boxes} boxes" for name, count in splits.items())
