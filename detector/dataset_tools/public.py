"""Fetch public datasets by name: download, verify, unpack, convert.

A dataset's folder exists only once it is complete: it is built in a hidden folder next to it and then renamed. Complete
folders are not touched.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from detector.atomic import make_folder, write_json
from detector.dataset_tools.archive import unpack
from detector.dataset_tools.download import Archive, fetch, part_path, require_space, size_on_disk
from detector.dataset_tools.voc import read_names, voc_to_coco
from detector.datasets.problems import ANNOTATION_LEFT_OUT, Problem, examples, group
from detector.errors import DownloadError
from detector.files import read_bytes
from detector.json_text import parse_json
from detector.text import printable


@dataclass(frozen=True)
class Part:
    """One archive that unpacks to one folder of a dataset."""

    archive: Archive
    folder: str
    """The folder's name, also of the archive's only top-level folder."""
    suffix: str
    count: int
    """Number of files with this suffix."""
    names: tuple[str, ...] = ()
    """Files that must be among them."""


@dataclass(frozen=True)
class SplitCount:
    """The expected size of a converted split."""

    images: int
    boxes: int


# COCO publishes no checksums. TensorFlow Datasets and other projects agree on these sizes and checksums.
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
# GitHub packs archives on request, with unstable bytes: the counts below serve as the check.
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
) -> None:
    """Make the folders `root/coco/{train2017,val2017,annotations}`.

    Args:
        root: folder of all datasets.
        parts: keys of `table`; the parts to fetch.
        keep_archives: keep the zip files in `root/archives`.
        table: the parts that exist.

    Raises:
        DownloadError: an unknown part, too little disk space, no network, an unexpected file, or an incomplete existing
            folder.
    """
    unknown = [name for name in dict.fromkeys(parts) if name not in table]
    if unknown or not parts:
        close = [near[0] for name in unknown if (near := difflib.get_close_matches(name, table, n=1, cutoff=0.5))]
        raise DownloadError(
            f"parts must be one or more of {', '.join(table)}, got {printable(','.join(unknown)) or 'none'}"
            + (f"; did you mean {', '.join(close)}?" if close else ""),
            exit_code=2,
        )
    folder, archives = root / "coco", root / "archives"
    todo: list[Part] = []
    for name in dict.fromkeys(parts):
        part = table[name]
        missing = _missing_files(folder / part.folder, part)
        if missing is None:
            print(f"{folder / part.folder} is complete ({part.count} {part.suffix} files); nothing to do")
        else:
            _refuse_occupied(folder / part.folder, missing)
            todo.append(part)
    if not todo:
        return
    make_folder(folder, option="--root")
    require_space(folder, _space_needed([part.archive for part in todo], archives, keep_archives))
    for part in todo:
        fetched = _fetched(part.archive, archives, keep=keep_archives)
        with fetched as path, _built_aside(folder / part.folder) as staging:
            unpack(path, staging, limit_bytes=part.archive.unpacked_limit, place=_below(part.folder))
            missing = _missing_files(staging, part)
            if missing is not None:
                raise DownloadError(f"{path} {missing}; delete it and run this again")
        print(f"{folder / part.folder} is complete ({part.count} {part.suffix} files)")


def get_bccd(
    root: Path,
    *,
    keep_archives: bool = False,
    archive: Archive = BCCD_ARCHIVE,
    splits: Mapping[str, SplitCount] = BCCD_SPLITS,
) -> None:
    """Make the folders `root/bccd/{images,annotations}`: 364 blood-cell images and one COCO file per split.

    Args:
        root: folder of all datasets.
        keep_archives: keep the zip file in `root/archives`.
        archive: the repository's archive.
        splits: expected counts of every split.

    Raises:
        DownloadError: too little disk space, no network, unexpected counts, or an existing folder that is incomplete.
    """
    folder, archives = root / "bccd", root / "archives"
    findings = _check_bccd(folder, splits)
    if not findings:
        print(f"{folder} is complete ({_counts(splits)}); nothing to do")
        return
    _refuse_occupied(folder, findings[0])
    make_folder(root, option="--root")
    require_space(root, _space_needed([archive], archives, keep_archives))
    with _fetched(archive, archives, keep=keep_archives) as path, _built_aside(folder) as staging:
        raw = staging / "raw"
        staging.mkdir()
        unpack(path, raw, limit_bytes=archive.unpacked_limit, place=_bccd_member)
        try:
            _convert_bccd(raw, staging, splits=splits)
        except FileNotFoundError as error:
            raise DownloadError(
                f"{path} must contain {error.filename}, got no such file; delete it and run this again"
            ) from error
        shutil.rmtree(raw)
        findings = _check_bccd(staging, splits)
        if findings:
            raise DownloadError(
                f"{path} must be BCCD at {BCCD_COMMIT[:12]}: {'; '.join(findings)}; delete it and run this again"
            )
    print(f"{folder} is complete ({_counts(splits)})")


@contextlib.contextmanager
def _fetched(archive: Archive, folder: Path, *, keep: bool) -> Iterator[Path]:
    """Fetch the archive; delete it afterwards unless `keep` or it existed before."""
    make_folder(folder, option="--root")
    path = folder / archive.name
    existed = path.exists()
    if existed:
        print(f"using {path}")
    else:
        print(f"downloading {archive.url}; if interrupted, run the same command again to resume")
    yield fetch(archive, folder)
    if existed or keep:
        print(f"{path} is no longer needed and was kept")
    else:
        path.unlink()
        with contextlib.suppress(OSError):  # not empty: other archives
            folder.rmdir()


@contextlib.contextmanager
def _built_aside(folder: Path) -> Iterator[Path]:
    """Yield a path to build at; it is renamed to `folder` if the block succeeds and deleted otherwise."""
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
    """Return the peak disk space in bytes that fetching and unpacking needs in addition to existing files."""
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


def _refuse_occupied(folder: Path, finding: str) -> None:
    """Raise `DownloadError` if the incomplete `folder` is not empty; only the user may delete its content."""
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise DownloadError(f"{folder} {finding}; move it away and run this again", exit_code=2)


def _missing_files(folder: Path, part: Part) -> str | None:
    """Return what `folder` must contain and does not, or None if it is complete."""
    found = {path.name for path in folder.iterdir() if path.suffix == part.suffix} if folder.is_dir() else set()
    missing = [name for name in part.names if name not in found]
    if missing:
        return f"must contain {', '.join(missing)}, got {len(found)} other {part.suffix} files"
    if len(found) < part.count:
        return f"must contain {part.count} {part.suffix} files, got {len(found)}"
    return None


def _below(folder: str) -> Callable[[str], str | None]:
    """Return a `place` for `unpack` that keeps only the members below `folder`, with paths relative to it."""
    return lambda name: name.removeprefix(f"{folder}/") if name.startswith(f"{folder}/") else None


def _bccd_member(name: str) -> str | None:
    """Return the path of a member that the conversion reads, without GitHub's folder named after the commit."""
    inner = name.partition("/")[2]
    wanted = inner == "LICENSE" or re.fullmatch(
        r"BCCD/(JPEGImages/[^/]+\.jpg|Annotations/[^/]+\.xml|ImageSets/Main/(train|val|test)\.txt)", inner
    )
    return inner if wanted else None


def _convert_bccd(raw: Path, folder: Path, *, splits: Mapping[str, SplitCount]) -> None:
    """Convert the unpacked repository to `folder/{images,annotations}`; ids are unique over all splits."""
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
            first_annotation_id=boxes + 1,
        )
        for image in result.coco["images"]:
            image["license"] = 1
        images += len(result.coco["images"])
        boxes += len(result.coco["annotations"])
        problems += result.problems
        info = {"description": "BCCD (blood cells), COCO conversion", "url": BCCD_URL, "version": BCCD_COMMIT}
        licenses = [{"id": 1, "name": "MIT", "url": "https://opensource.org/licenses/MIT"}]
        content = {"info": info, "licenses": licenses, **result.coco}
        write_json(content, folder / "annotations" / f"{split}.json", compact=True)
    (voc / "JPEGImages").rename(folder / "images")
    (raw / "LICENSE").rename(folder / "LICENSE")
    dropped = sum(problem.action == ANNOTATION_LEFT_OUT for problem in problems)
    print(f"dropped {dropped} of {boxes + dropped} boxes; {len(problems)} problems in all" + (":" if problems else ""))
    print(examples(group(problems)), end="\n" * bool(problems))


def _check_bccd(folder: Path, splits: Mapping[str, SplitCount]) -> list[str]:
    """Return how `folder` differs from the complete dataset."""
    if not folder.is_dir():
        return ["must be a folder"]
    findings = []
    present = {path.name for path in (folder / "images").iterdir()} if (folder / "images").is_dir() else set()
    for split, expected in splits.items():
        path = folder / "annotations" / f"{split}.json"
        try:
            content = parse_json(read_bytes(path))
            names = [str(image["file_name"]) for image in content["images"]]
            found = SplitCount(images=sum(name in present for name in names), boxes=len(content["annotations"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            findings.append(f"must contain a readable annotations/{split}.json, got {printable(str(error), 300)}")
            continue
        if found != expected:
            findings.append(f"must contain {_counts({split: expected})}, got {_counts({split: found})}")
    return findings


def _counts(splits: Mapping[str, SplitCount]) -> str:
    return ", ".join(f"{name} {count.images} images and {count.boxes} boxes" for name, count in splits.items())
