"""Open COCO datasets: read, inspect, report, and refuse what training must not use."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from detector.config import Config, Exif, OnError, SplitConfig, Verify
from detector.datasets.coco import CocoDataset
from detector.datasets.coco_json import (
    load_json,
    other_format,
    read_annotations,
    read_categories,
    read_ids,
    read_images,
)
from detector.datasets.inspection import Inspection, inspect_tables
from detector.datasets.missing_paths import missing_image_hint, nearest_path
from detector.datasets.problems import WHOLE_DATASET, Problem, examples, group, problem, table, wrap, write_problems
from detector.datasets.store import FolderStore, ImageStore
from detector.errors import DatasetError
from detector.structures import Categories
from detector.text import MAX_MESSAGE, as_many_as_fit, printable, printable_lines


def read_coco(
    annotations: Path,
    images: Path | ImageStore | None,
    *,
    verify: Verify = "auto",
    on_error: OnError = "fail",
    exif: Exif = "auto",
    categories: Categories | None = None,
    progress: bool = True,
    problems_file: Path | None = None,
) -> CocoDataset:
    """Open and check a COCO-format dataset.

    Args:
        annotations: the annotation file.
        images: the image folder, or another image store; None reads the annotations alone.
        verify: how image files are checked: every pixel ("decode"), headers, not at all ("none": sizes and existence
            are taken from the annotations), or depending on the number of images ("auto").
        on_error: whether errors refuse the dataset, or what has them is left out.
        exif: "auto" infers from the declared sizes whether the annotations were made on rotated images.
        categories: the classes of training, to be matched by name; None: all declared categories, sorted by id.
        progress: whether to print progress and problems to stderr.
        problems_file: receives the complete list of problems, one per line.

    Raises:
        DatasetError: the dataset cannot be used; the message reports all problems.
    """
    inspection = inspect_coco(
        annotations,
        images,
        verify=verify,
        exif=exif,
        categories=categories,
        progress=progress,
        problems_file=problems_file,
    )
    return accept(inspection, on_error=on_error, progress=progress, problems_file=problems_file)


def inspect_coco(
    annotations: Path,
    images: Path | ImageStore | None,
    *,
    verify: Verify,
    exif: Exif,
    categories: Categories | None,
    progress: bool,
    problems_file: Path | None,
) -> Inspection:
    """Read and check a COCO-format dataset, whatever is wrong with it; see `read_coco`."""
    annotations = Path(annotations)
    problems: list[Problem] = []
    if isinstance(images, str | os.PathLike):
        store: ImageStore | None = FolderStore(Path(images))
        if not os.path.isdir(images):
            store = None
            problems.append(problem("image folder", str(images), f"no such image folder{nearest_path(Path(images))}"))
    else:
        store = images
    content = _load(annotations, problems)
    if content is None:
        inspection = Inspection(annotations, group(problems))
    else:
        ids = read_ids(content)
        annotation_table = read_annotations(content["annotations"], ids, problems)
        declared = read_categories(
            annotations, content["categories"], ids.categories, problems,
            used=annotation_table.category_ids, kept=() if categories is None else categories.names,
        )  # fmt: skip
        image_table = read_images(content["images"], ids.images, problems, with_files=store is not None)
        del content  # with a large dataset, the parsed JSON is most of this process
        inspection = inspect_tables(
            annotations,
            image_table,
            annotation_table,
            declared,
            store=store,
            training_categories=categories,
            verify=verify,
            exif=exif,
            progress=progress,
            problems=problems,
            file_ids=ids,
        )
    # A check of nothing must not delete the list of an earlier one.
    if problems_file is not None and (inspection.findings or verify != "none"):
        write_problems(Path(problems_file), inspection.findings)
    return inspection


def _load(annotations: Path, problems: list[Problem]) -> dict[str, list[Any]] | None:
    """Parse a COCO file; where it is none, add a problem and return None."""
    try:
        content: dict[str, list[Any]] = load_json(annotations)
    except DatasetError as error:
        detail = str(error).removeprefix(f"{annotations}: ")
        problems.append(problem("annotation file", str(annotations), detail))
        return None
    other = other_format(content)
    if other is not None:
        problems.append(problem("file format", str(annotations), f"must be a COCO annotation file, got {other}"))
        return None
    return content


def accept(
    inspection: Inspection, *, on_error: OnError, progress: bool, problems_file: Path | None, limit: int = MAX_MESSAGE
) -> CocoDataset:
    """Return the dataset of an inspection, or refuse it; with `progress`, print to stderr what is wrong with it.

    Args:
        inspection: the dataset and what is wrong with it.
        on_error: whether errors refuse the dataset ("fail").
        progress: whether to print.
        problems_file: where all problems are listed.
        limit: bytes of the message of a refusal.

    Raises:
        DatasetError: it has a fatal finding, or errors unless `on_error` is "skip".
    """
    findings = inspection.findings
    if any(f.severity == "fatal" or (f.severity == "error" and on_error == "fail") for f in findings):
        raise DatasetError(_refusal(inspection, problems_file, limit))
    if progress and findings:
        listed = f" (listed in {problems_file})" if problems_file else ""
        count = sum(len(finding.problems) for finding in findings)
        lines = [f"{inspection.source}: {count:,} problem{'s' * (count != 1)}{listed}", table(findings)]
        for finding in findings:
            if finding.kind in WHOLE_DATASET:
                lines += [wrap(f"warning: {one.where}: {one.detail}; {finding.remedy}") for one in finding.problems]
        print(printable_lines("\n".join(lines)), file=sys.stderr, flush=True)
    assert inspection.dataset is not None, "without a fatal finding, there is a dataset"
    return inspection.dataset


def _refusal(inspection: Inspection, problems_file: Path | None, limit: int) -> str:
    """Explain why a dataset is refused: what is wrong, how often, with examples and remedies, in `limit` bytes."""
    findings = inspection.findings
    fatal = [finding for finding in findings if finding.severity == "fatal"]
    errors = [finding for finding in findings if finding.severity == "error"]
    others = errors + [finding for finding in findings if finding.severity not in ("fatal", "error")]
    if fatal:
        several = [one for finding in fatal for one in finding.problems]
        places = [""] + [one.where for one in several]
        reasons = [
            f"  {one.detail}" if one.where == before else f"{one.where}: {one.detail}"
            for one, before in zip(several, places, strict=False)
        ]
    else:
        count = sum(len(finding.problems) for finding in errors)
        some = f"{count:,} error{'s' * (count != 1)}"
        reasons = [f"{printable(str(inspection.source))}: refused for {some} that would change the training data"]
    overview = ["", *table(others, refused=True).splitlines()] if others else []
    listed = ["", "examples", *examples(others).splitlines(), ""] if others else []
    if others and problems_file is not None:
        listed.append(f"complete list: {problems_file} ({sum(len(f.problems) for f in findings):,} lines)")
    advice = _advice(inspection, only_errors=not fatal)
    reasons, advice, overview, listed = _fitted([reasons, advice, overview, listed], limit)
    return "\n".join([*reasons, *overview, *listed, *advice])


def _advice(inspection: Inspection, *, only_errors: bool) -> list[str]:
    """What to do about the findings, as lines."""
    advice = [f"{finding.kind}: {finding.remedy}" for finding in inspection.findings if finding.remedy]
    if inspection.missing is not None:
        advice.append(printable(missing_image_hint(*inspection.missing), 600))
    if only_errors:
        left_out = inspection.num_images - inspection.num_usable
        advice.append(
            f"or set data.on_error=skip, which uses {inspection.num_usable:,} of {inspection.num_images:,} images and "
            f"leaves out {left_out:,} with {inspection.num_lost_annotations:,} annotations"
        )
    return ["what to do", *(wrap(text, "  - ", "    ") for text in advice if text)] if any(advice) else []


def _fitted(sections: list[list[str]], limit: int) -> list[list[str]]:
    """Shorten the sections of a message: a quarter of the limit is each one's, what is left the earlier ones'."""
    sizes = [sum(len(line.encode(errors="backslashreplace")) + 1 for line in lines) for lines in sections]
    room = [min(size, limit // len(sections)) for size in sizes]
    for k, size in enumerate(sizes):
        room[k] += min(size - room[k], limit - sum(room))
    return [as_many_as_fit(lines, bytes_) for lines, bytes_ in zip(sections, room, strict=True)]


def open_split(
    config: Config, split: SplitConfig, *, categories: Categories | None, problems_file: Path | None
) -> CocoDataset:
    """Open one split with the settings of `data`; without a `problems_file`, nothing is printed.

    Raises:
        DatasetError: the split cannot be used.
    """
    inspection = _inspect_split(config, split, categories, problems_file)
    progress = problems_file is not None
    return accept(inspection, on_error=config.data.on_error, progress=progress, problems_file=problems_file)


def _inspect_split(
    config: Config, split: SplitConfig, categories: Categories | None, problems_file: Path | None
) -> Inspection:
    return inspect_coco(
        Path(split.annotations),
        Path(split.images),
        verify=config.data.verify,
        exif=config.data.exif,
        categories=categories,
        progress=problems_file is not None,
        problems_file=problems_file,
    )


def open_datasets(
    config: Config, output_dir: Path, *, quiet: bool
) -> tuple[CocoDataset, CocoDataset | None, CocoDataset | None]:
    """Open the training, validation and test sets; the classes of the latter two are matched with those of training.

    Args:
        config: its `data`.
        output_dir: receives the lists of problems.
        quiet: whether to print and write nothing, as all processes but the first.

    Raises:
        DatasetError: what is wrong with any of them, together.
    """
    datasets: list[CocoDataset | None] = []
    refusals: list[str] = []
    classes = None
    for name in ("train", "val", "test"):
        split: SplitConfig | None = getattr(config.data, name)
        if split is None:
            datasets.append(None)
            continue
        problems_file = None if quiet else output_dir / f"problems_{name}.tsv"
        inspection = _inspect_split(config, split, classes, problems_file)
        if name == "train":
            classes = inspection.categories
        try:
            datasets.append(
                accept(
                    inspection,
                    on_error=config.data.on_error,
                    progress=not quiet,
                    problems_file=problems_file,
                    limit=MAX_MESSAGE // 3,
                )
            )
        except DatasetError as error:
            refusals.append(str(error))
    if refusals:
        raise DatasetError("\n\n".join(refusals))
    train_set, val_set, test_set = datasets
    assert train_set is not None, "require_settings has checked that data.train is set"
    return train_set, val_set, test_set
