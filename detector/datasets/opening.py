"""Open and check the training, validation and test sets of a config."""

from __future__ import annotations

from pathlib import Path

from detector.config import Config, SplitConfig
from detector.datasets.coco import CocoDataset, read_coco
from detector.errors import DatasetError
from detector.structures import Categories


def open_split(
    config: Config, split: SplitConfig, *, categories: Categories | None, problems_file: Path | None
) -> CocoDataset:
    """Read and check one set of pictures; `problems_file` None is for the processes that keep quiet."""
    return read_coco(
        Path(split.annotations),
        Path(split.images),
        verify=config.data.verify,
        on_error=config.data.on_error,
        exif=config.data.exif,
        categories=categories,
        progress=problems_file is not None,
        problems_file=problems_file,
    )


def open_datasets(
    config: Config, output_dir: Path, *, quiet: bool
) -> tuple[CocoDataset, CocoDataset | None, CocoDataset | None]:
    """Read and check the train, val and test sets; the latter two with the classes of the first.

    Raises:
        DatasetError: what is wrong with any of them, together.
    """
    refusals: list[str] = []

    def opened(name: str, split: SplitConfig | None, categories: Categories | None) -> CocoDataset | None:
        if split is None:
            return None
        problems_file = None if quiet else output_dir / f"problems_{name}.tsv"
        try:
            return open_split(config, split, categories=categories, problems_file=problems_file)
        except DatasetError as error:
            refusals.append(str(error))
            return None

    train_set = opened("train", config.data.train, None)
    classes = train_set.categories if train_set is not None else None
    val_set, test_set = opened("val", config.data.val, classes), opened("test", config.data.test, classes)
    if refusals:
        raise DatasetError("\n\n".join(refusals))
    assert train_set is not None, "require_settings has looked"
    return train_set, val_set, test_set
