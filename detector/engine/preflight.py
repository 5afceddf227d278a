"""Before the first step: open the data, and say what is about to happen and what looks wrong about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from detector.anchors import AnchorGenerator, best_anchor_iou
from detector.boxes import area
from detector.coco_eval import ground_truth_warnings
from detector.config import Config, ConfigError, DataConfig, LossConfig, SplitConfig
from detector.datasets.augment import Augmentation
from detector.datasets.coco import CocoDataset, DatasetError, read_coco
from detector.datasets.sampling import balanced_factors, repeat_factors
from detector.datasets.transforms import padded_size, resized_size
from detector.losses import effective_number, inverse_frequency
from detector.losses.class_loss import USES
from detector.losses.retinanet import ConstantLoss
from detector.models.reading import read_tensors
from detector.structures import Categories

FIRST_LOSS_TOLERANCE = 0.1
"""Share by which the first class loss may differ from that of the prior: the class subnet's random weights spread it."""


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


def require_settings(config: Config, *, fresh: bool) -> None:
    """What the config alone, and files it names besides the data, can be wrong about: told at once, where looking at the data
    may take minutes.

    Args:
        fresh: whether the weights of the backbone will be needed.

    Raises:
        ConfigError, WeightsError: the first of it.
    """
    if config.data.train is None:
        raise ConfigError(
            "data.train must name images and annotations; set data.train.images and data.train.annotations"
        )
    if config.data.augment:
        # on no picture: how large a crop may be, the data will say
        Augmentation(config.data.augment, min_visibility=config.data.augment_min_visibility, sizes=())
    weights = config.model.backbone_weights
    if fresh and weights not in ("imagenet", "none") and not Path(weights).exists():
        read_tensors(Path(weights))  # which says so


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


def data_warnings(
    anchors: AnchorGenerator, train_set: CocoDataset, others: list[CocoDataset], config: Config
) -> list[str]:
    """What the data make one expect: objects out of the anchors' reach, scenes fuller than the metric looks at."""
    warnings = coverage_warnings(anchors, train_set, config)
    for dataset in others:
        for line in ground_truth_warnings(dataset.ground_truth(), config.eval.max_dets):
            warnings.append(f"{dataset.annotations.name}: {line}")
    return warnings


def coverage_warnings(anchors: AnchorGenerator, coco: CocoDataset, config: Config) -> list[str]:
    """Objects that no anchor overlaps enough to learn from (as the boxes are before augmentation)."""
    size = config.data.eval_size
    boxes, images, _ = coco.boxes()
    heights_widths = coco.sizes.astype(np.int64)
    best = torch.zeros(len(boxes))
    resized = np.array(
        [
            resized_size((h, w), min_size=size, max_size=config.data.max_size, resize=config.model.resize)
            for h, w in heights_widths
        ]
    )
    factors = (resized / heights_widths)[images][:, [1, 0, 1, 0]]
    scaled = torch.from_numpy((boxes * factors).astype(np.float32))
    canvases = [padded_size((int(h), int(w)), config.model.pad) for h, w in resized]
    for canvas in set(canvases):
        rows = torch.from_numpy(np.array([c == canvas for c in canvases])[images])
        best[rows] = best_anchor_iou(anchors, scaled[rows], canvas)
    lost = best < config.matching.fg_iou_thresh
    if not bool(lost.any()) or config.matching.low_quality_matches:
        return []
    sides = area(scaled[lost]).sqrt()
    return [
        f"{int(lost.sum())} of {len(boxes)} objects ({float(lost.float().mean()):.1%}) overlap no anchor by "
        f"{config.matching.fg_iou_thresh} at data.min_size {size} and will not be learnt; their sides are "
        f"{sides.min():.0f} to {sides.max():.0f} pixels there (median {sides.median():.0f}); larger data.min_size, other "
        "model.anchors.sizes or ratios, or matching.low_quality_matches=true would reach them"
    ]


def first_loss_text(constant: ConstantLoss, found: float, num_pos: int) -> tuple[str, bool]:
    """A line that compares the first class loss with what it must be before anything is learnt, and whether they agree.

    Args:
        constant: the loss of a network that says its prior of every anchor.
        found: what the network's first step gave.
        num_pos: positives that both were divided by.
    """
    arithmetic = (
        f"{constant.background:,} background anchors x {constant.background_loss:.3g} + {constant.positives:,} positive ones x "
        f"{constant.positive_loss:.3g}, over {max(1, num_pos):,}, gives {constant.total:.3f}"
    )
    agrees = abs(found / constant.total - 1) <= FIRST_LOSS_TOLERANCE if constant.total > 0 else found < 1e-3
    if agrees:
        return f"the first class loss is {found:.3f}, as it must be at the prior: {arithmetic}", True
    return (
        f"the first class loss is {found:.3f}, but at the prior {arithmetic}; look at model.head.prior_prob, at the loss and at "
        "whether the pictures look as they should (model.pixel_mean, pixel_std)"
    ), False


def class_weights(loss: LossConfig, train_set: CocoDataset) -> list[float] | None:
    """The weights of positives by class where `loss.alpha` leaves them to the data, or gives one for each class.

    Raises:
        ConfigError: a list of another length than there are classes.
    """
    num_classes = len(train_set.categories)
    if "alpha" not in USES[loss.cls]:
        return None
    if isinstance(loss.alpha, tuple):
        if len(loss.alpha) != num_classes:
            raise ConfigError(
                f"loss.alpha must give one weight for each of the {num_classes} classes "
                f"({', '.join(train_set.categories.names[:5])}{', ...' * (num_classes > 5)}), got {len(loss.alpha)}"
            )
        return list(loss.alpha)
    if not isinstance(loss.alpha, str):
        return None
    counts = torch.bincount(torch.from_numpy(train_set.boxes().labels), minlength=num_classes)
    if loss.alpha == "inverse_frequency":
        weights = inverse_frequency(counts, exponent=loss.alpha_exponent)
    else:
        weights = effective_number(counts, beta=loss.alpha_beta)
    return weights.tolist()


def class_weights_text(weights: list[float], train_set: CocoDataset) -> str:
    """A line for the log."""
    pairs = zip(train_set.categories.names, weights, strict=True)
    return "weights of positives by class: " + ", ".join(f"{name} {weight:.3g}" for name, weight in pairs)


def sampling_factors(data: DataConfig, train_set: CocoDataset) -> NDArray[np.float64] | None:
    """How often each training picture comes in an epoch; None: once."""
    boxes = train_set.boxes()
    if data.sampling == "repeat_factor":
        return repeat_factors(boxes.image_index, boxes.labels, len(train_set), threshold=data.repeat_threshold)
    if data.sampling == "class_balanced":
        return balanced_factors(boxes.image_index, boxes.labels, len(train_set))
    return None
