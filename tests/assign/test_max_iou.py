"""Matching against torchvision's Matcher, and what padding, ignore regions and blocks must not change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

import detector.assign.max_iou
from detector.anchors import pyramid_grids
from detector.assign.assignment import BACKGROUND, IGNORED, Assignment
from detector.assign.max_iou import MaxIoUAssigner
from detector.config import CompatConfig, ModelConfig
from detector.models import build_anchors
from detector.structures import Targets
from detector.weights.from_torchvision import TORCHVISION_ANCHORS, TORCHVISION_COMPAT

SQUARE = [0.0, 0.0, 10.0, 10.0]


def pad_targets(images: Sequence[Tensor], ignore: Sequence[Tensor] = ()) -> Targets:
    """Boxes of each image to padded targets, all of class 0."""
    boxes = pad_sequence(list(images), batch_first=True)
    labels = pad_sequence([torch.zeros(len(b), dtype=torch.int64) for b in images], True, -1)
    regions = pad_sequence(list(ignore), batch_first=True) if ignore else torch.zeros(len(images), 0, 4)
    return Targets(boxes, labels, regions)


def assign(
    anchors: Tensor, targets: Targets, low_quality: bool = False, grids: Any = None, **settings: Any
) -> Assignment:
    return MaxIoUAssigner(low_quality_matches=low_quality, **settings)(anchors, targets, grids=grids)


def random_boxes(n: int, seed: int, size: float = 256) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=random) * size * 0.8
    side = 4 + torch.rand(n, 2, generator=random) ** 2 * size
    return torch.cat([corner, (corner + side).clamp(max=size)], dim=1)


def image_anchors(side: int) -> Tensor:
    anchors: Tensor = build_anchors(ModelConfig())((side, side), pyramid_grids((side, side)), torch.device("cpu"))
    return anchors


@pytest.fixture(scope="module")
def anchors() -> Tensor:
    return image_anchors(256)


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("counts", [(1,), (7, 1, 30), (100, 3)])
def test_matches_equal_torchvisions_matcher(anchors: Tensor, counts: tuple[int, ...], low_quality: bool) -> None:
    images = [random_boxes(n, seed) for seed, n in enumerate(counts)]
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=low_quality)
    expected = torch.stack([matcher(box_iou(boxes, anchors)) for boxes in images])
    result = assign(anchors, pad_targets(images), low_quality)
    assert torch.equal(result.matched, expected)
    assert torch.equal(result.num_pos, (expected >= 0).sum(dim=1))
    assert (expected >= 0).any() or not low_quality
    assert (expected == IGNORED).any() or len(images) == 1


@pytest.mark.parametrize("low_quality", [False, True])
def test_images_without_objects_are_all_background(anchors: Tensor, low_quality: bool) -> None:
    nothing = assign(anchors, pad_targets([torch.zeros(0, 4)] * 2), low_quality)  # M = 0
    assert (nothing.matched == BACKGROUND).all()
    assert nothing.num_pos.tolist() == [0, 0]
    one_empty = assign(anchors, pad_targets([torch.zeros(0, 4), random_boxes(3, 0)]), low_quality)
    assert (one_empty.matched[0] == BACKGROUND).all()
    assert one_empty.num_pos[0] == 0 < one_empty.num_pos[1]


@pytest.mark.parametrize("low_quality", [False, True])
def test_padding_never_matches_wherever_it_stands(anchors: Tensor, low_quality: bool) -> None:
    boxes = random_boxes(5, 0)
    alone = assign(anchors, pad_targets([boxes]), low_quality)
    padding = torch.zeros(2, 4)
    labels = torch.tensor([[-1, -1, 0, 0, 0, 0, 0, -1, -1]])
    targets = Targets(torch.cat([padding, boxes, padding])[None], labels, torch.zeros(1, 0, 4))
    among_padding = assign(anchors, targets, low_quality).matched
    assert torch.equal(torch.where(among_padding >= 0, among_padding - 2, among_padding), alone.matched)
    # not even where padding has the coordinates of an anchor
    as_anchor = Targets(anchors[None, 500:501], torch.tensor([[-1]]), torch.zeros(1, 0, 4))
    assert (assign(anchors, as_anchor, low_quality).matched == BACKGROUND).all()


@pytest.mark.parametrize("low_quality", [False, True])
def test_ties_go_to_the_object_listed_first(low_quality: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = pad_targets([torch.tensor([SQUARE, SQUARE, SQUARE])])
    anchors = torch.tensor([SQUARE, [0.0, 0.0, 10.0, 9.0], [50.0, 50.0, 60.0, 60.0]])
    assert assign(anchors, targets, low_quality).matched.tolist() == [[0, 0, BACKGROUND]]
    monkeypatch.setattr(detector.assign.max_iou, "MAX_PAIRS", 1)
    assert assign(anchors, targets, low_quality).matched.tolist() == [[0, 0, BACKGROUND]]


@pytest.mark.parametrize(
    ("width", "expected"),
    [(10.0, 0), (5.0, 0), (4.9, IGNORED), (4.0, IGNORED), (3.9, BACKGROUND), (0.0, BACKGROUND)],
)
def test_thresholds_belong_to_the_upper_side(width: float, expected: int) -> None:
    result = assign(torch.tensor([[0.0, 0.0, width, 10.0]]), pad_targets([torch.tensor([SQUARE])]))
    assert result.matched.item() == expected


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("pairs", [1, 20_000, 100_000])
def test_blocks_of_any_size_give_the_same_matches(
    anchors: Tensor, pairs: int, low_quality: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = pad_targets([random_boxes(40, 0), random_boxes(3, 1), torch.zeros(0, 4)])
    whole = assign(anchors, targets, low_quality)
    monkeypatch.setattr(detector.assign.max_iou, "MAX_PAIRS", pairs)
    in_blocks = assign(anchors, targets, low_quality)
    assert torch.equal(in_blocks.matched, whole.matched)
    assert torch.equal(in_blocks.num_pos, whole.num_pos)


def test_low_quality_matches_give_every_object_its_best_anchor_including_ties() -> None:
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [10.0, 0.0, 20.0, 10.0], [0.0, 20.0, 10.0, 30.0]])
    targets = pad_targets([torch.tensor([[8.0, 0.0, 12.0, 10.0]])])  # overlaps two anchors by 1/6 each
    assert assign(anchors, targets).matched.tolist() == [[BACKGROUND] * 3]
    assert assign(anchors, targets, low_quality=True).matched.tolist() == [[0, 0, BACKGROUND]]


def test_an_object_that_touches_no_anchor_matches_none_unlike_torchvisions() -> None:
    anchors, far = torch.tensor([SQUARE, [20.0, 0.0, 30.0, 10.0]]), torch.tensor([[90.0, 90.0, 95.0, 95.0]])
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    assert matcher(box_iou(far, anchors)).tolist() == [0, 0]
    assert assign(anchors, pad_targets([far]), low_quality=True).matched.tolist() == [[BACKGROUND, BACKGROUND]]


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], BACKGROUND),  # padding
        ([0.0, 0.0, 10.0, 5.0], IGNORED),  # exactly half of the anchor
        ([0.0, 0.0, 10.0, 4.9], BACKGROUND),
        ([-90.0, -90.0, 900.0, 900.0], IGNORED),  # the anchor's own area counts, not the union
    ],
)
def test_background_anchors_half_inside_an_ignore_region_are_ignored(region: list[float], expected: int) -> None:
    anchors, nothing = torch.tensor([SQUARE]), torch.zeros(0, 4)
    targets = pad_targets([nothing], [torch.tensor([[0.0, 0.0, 0.0, 0.0], region])])
    assert assign(anchors, targets).matched.item() == expected
    assert assign(anchors, targets, ignore_regions=False).matched.item() == BACKGROUND


def test_positive_anchors_stay_positive_inside_an_ignore_region() -> None:
    anchors = torch.tensor([SQUARE, [0.0, 0.0, 10.0, 4.0], [60.0, 60.0, 70.0, 70.0], [300.0, 300.0, 310.0, 310.0]])
    everything = torch.tensor([[0.0, 0.0, 100.0, 100.0]])
    targets = pad_targets([torch.tensor([SQUARE])] * 2, [everything, torch.zeros(0, 4)])
    result = assign(anchors, targets)
    assert result.matched.tolist() == [[0, IGNORED, IGNORED, BACKGROUND], [0, IGNORED, BACKGROUND, BACKGROUND]]
    assert result.num_pos.tolist() == [1, 1]


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest tensor that any operation makes (views included)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value._base is None:
                self.numel = max(self.numel, value.numel())
        return result


def test_memory_does_not_grow_with_the_number_of_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    anchors = image_anchors(800)
    assert len(anchors) > 120_000
    monkeypatch.setattr(detector.assign.max_iou, "MAX_PAIRS", 1_000_000)
    with LargestTensor() as largest:
        assign(anchors, pad_targets([random_boxes(500, 0, 800)], [random_boxes(50, 1, 800)]))
    assert 0 < largest.numel <= 1_000_000


# ---- windows on the grids --------------------------------------------------------------------------------------

BUILDS = {
    "usual": ModelConfig(),
    "torchvision's": ModelConfig(anchors=TORCHVISION_ANCHORS, compat=CompatConfig(**TORCHVISION_COMPAT)),
    "far apart": ModelConfig.model_validate({"anchors": {"sizes": [5.5, 9.0, 40.0, 70.0, 300.0]}}, strict=False),
}


def both_ways(
    build: str, size: tuple[int, int], boxes: Tensor, low_quality: bool, **more: Any
) -> tuple[Tensor, Tensor]:
    grids = pyramid_grids(size)
    anchors = build_anchors(BUILDS[build])(size, grids, torch.device("cpu"))
    empty = torch.zeros(0, 4)
    others = boxes[: len(boxes) // 2].flip(0) + torch.tensor(
        [11.0, 7.0, 19.0, 9.0]
    )  # near the first image's objects, but not of that image
    targets = pad_targets([boxes, empty, others])
    plain = assign(anchors, targets, low_quality, **more)
    return assign(anchors, targets, low_quality, grids=grids, **more).matched, plain.matched


@given(
    st.sampled_from([*BUILDS]),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 4, st.sampled_from([1.0, 8.0, 60.0, 500.0])), max_size=30),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(0.5, 0.4), (0.7, 0.3), (0.3, 0.3), (0.9, 0.05), (0.02, 0.01)]),
)
@settings(max_examples=150, deadline=None)
def test_windows_find_what_all_pairs_find(
    build: str, size: tuple[int, int], draws: list[tuple[float, ...]], whole: bool, low_quality: bool,
    thresholds: tuple[float, float],
) -> None:  # fmt: skip
    """To the last bit, ties included: boxes on whole pixels tie all the time."""
    rows = []
    for x, y, w, h, scale in draws:
        left, top = x * size[1], y * size[0]
        box = torch.tensor([left, top, left + 0.5 + w * scale, top + 0.5 + h * scale])
        rows.append(box.round() + torch.tensor([0.0, 0.0, 1.0, 1.0]) * whole if whole else box)
    boxes = torch.stack(rows) if rows else torch.zeros(0, 4)
    windows, plain = both_ways(
        build, size, boxes, low_quality, fg_iou_thresh=thresholds[0], bg_iou_thresh=thresholds[1]
    )
    assert torch.equal(windows, plain)


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("count", [0, 1, 1000])
@pytest.mark.parametrize("at_once", [1, 10_000_000])
def test_windows_find_the_same_in_a_crowd(
    count: int, low_quality: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image by image or together."""
    monkeypatch.setattr(detector.assign.max_iou, "MAX_WINDOWS", at_once)
    windows_of, batches = detector.assign.max_iou._windows, []

    def counted(anchors: Tensor, targets: Targets, *settings: Any) -> Tensor:
        batches.append(len(targets.boxes))
        return windows_of(anchors, targets, *settings)

    monkeypatch.setattr(detector.assign.max_iou, "_windows", counted)
    windows, plain = both_ways("usual", (256, 256), random_boxes(count, 3), low_quality)
    assert batches == ([3] if at_once > 1 or count == 0 else [3, 2, 1, 1, 1])
    assert torch.equal(windows, plain)
    assert bool((windows >= 0).any()) == (count > 1 or (count == 1 and low_quality))


@pytest.mark.parametrize("low_quality", [False, True])
def test_windows_that_hold_too_much_give_way_to_blocks(low_quality: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector.assign.max_iou, "MAX_PAIRS", 10_000)
    large = random_boxes(40, 5) * 0.3 + torch.tensor([0.0, 0.0, 170.0, 170.0])
    windows, plain = both_ways("usual", (256, 256), large, low_quality, fg_iou_thresh=0.3, bg_iou_thresh=0.01)
    assert torch.equal(windows, plain)
    assert (windows >= 0).any()


def test_windows_know_objects_outside_all_anchors_and_larger_than_all() -> None:
    far = torch.tensor([[9000.0, 9000.0, 9010.0, 9010.0], [-5000.0, -5000.0, 5000.0, 5000.0], [3.0, 3.0, 3.5, 3.5]])
    windows, plain = both_ways("usual", (128, 160), far, True)
    assert torch.equal(windows, plain)
    assert set(windows[0].tolist()) == {BACKGROUND, 1, 2}


def test_windows_need_memory_for_the_neighbourhood_of_the_objects_only() -> None:
    """No tensor of every anchor with every object."""
    size, boxes = (512, 512), random_boxes(300, 0, 512)
    grids = pyramid_grids(size)
    anchors = build_anchors(ModelConfig())(size, grids, torch.device("cpu"))
    with LargestTensor() as largest:
        assign(anchors, pad_targets([boxes]), True, grids=grids)
    assert len(anchors) <= largest.numel < len(anchors) * len(boxes) / 10
