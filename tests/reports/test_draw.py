from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from detector.reports.draw import (
    MAX_COVER,
    class_color,
    draw_boxes,
    draw_detections,
    place_labels,
    side_by_side,
)
from detector.structures import Detections

NAMES = ["cat", "dog", "wine glass"]
NO_BOXES = np.zeros((0, 4))


def photo(width: int = 640, height: int = 600) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def some_boxes(n: int, low: float = 0, high: float = 600, side: float = 60) -> NDArray[np.float64]:
    corners = np.random.default_rng(n).uniform(low, high - side, (n, 2))
    return np.concatenate([corners, corners + side], axis=1)


def detections(boxes: Any, labels: list[int], scores: list[float]) -> Detections:
    return Detections(torch.as_tensor(boxes, dtype=torch.float32), torch.tensor(scores), torch.tensor(labels))


def test_without_boxes_the_image_is_returned_unchanged() -> None:
    for image in (photo(), photo(50, 30), Image.fromarray(photo())):
        for scores in (None, np.zeros(0)):
            drawn = draw_boxes(image, NO_BOXES, np.zeros(0, dtype=int), NAMES, scores=scores)
            assert drawn.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(drawn), np.asarray(image))
    drawn = draw_boxes(photo(), [], [], [])
    np.testing.assert_array_equal(np.asarray(drawn), photo())


def test_a_title_is_drawn_above_the_image_and_not_on_it() -> None:
    drawn = np.asarray(draw_boxes(photo(), [], [], NAMES, title="epoch 3"))
    assert drawn.shape[1] == 640
    np.testing.assert_array_equal(drawn[-600:], photo())
    assert (drawn[:-600] > 200).any()


def test_the_input_is_not_modified() -> None:
    image, boxes = photo(), some_boxes(5)
    before, before_boxes = image.copy(), boxes.copy()
    pil = Image.fromarray(image)
    for source in (image, pil):
        draw_boxes(source, boxes, [0] * 5, NAMES, scores=[0.5] * 5, ignore_boxes=boxes[:2], title="t")
        np.testing.assert_array_equal(np.asarray(source), before)
    np.testing.assert_array_equal(boxes, before_boxes)


@pytest.mark.parametrize(("size", "factor"), [((640, 600), 1), ((560, 20), 1), ((100, 80), 6), ((1, 1), 560)])
def test_small_images_are_enlarged_by_an_integer_factor_and_others_keep_their_size(
    size: tuple[int, int], factor: int
) -> None:
    drawn = draw_boxes(photo(*size), [[0, 0, 0.8 * size[0], 0.8 * size[1]]], [0], ["a"], scores=[1.0])
    assert drawn.mode == "RGB"
    assert drawn.width == size[0] * factor
    if min(size) >= 80:  # the one label fits, so no legend
        assert drawn.height == size[1] * factor


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_any_pillow_mode_gives_rgb(mode: str) -> None:
    drawn = draw_boxes(Image.fromarray(photo()).convert(mode), [[20, 40, 200, 200]], [0], NAMES)
    assert (drawn.mode, drawn.size) == ("RGB", (640, 600))


def test_numpy_and_torch_boxes_give_the_same_image() -> None:
    boxes, labels, scores = some_boxes(6), [0, 1, 2, 0, 1, 2], np.linspace(0, 1, 6)
    a = draw_boxes(photo(), boxes, np.array(labels), NAMES, scores=scores)
    b = draw_boxes(
        Image.fromarray(photo()), torch.tensor(boxes), torch.tensor(labels), NAMES, scores=torch.tensor(scores)
    )
    assert a.tobytes() == b.tobytes()


def test_an_object_is_not_covered_by_its_own_frame() -> None:
    drawn = np.asarray(draw_boxes(photo(), [[100, 100, 110, 110]], [0], NAMES, scores=[0.5]))
    np.testing.assert_array_equal(drawn[100:110, 100:110], photo()[100:110, 100:110])
    assert (drawn[95:115, 95:115] == class_color(0)).all(axis=2).any()


def test_the_detection_with_the_higher_score_is_on_top_in_any_order() -> None:
    box = [200, 200, 400, 400]
    for labels, scores in (([0, 1], [0.9, 0.2]), ([1, 0], [0.2, 0.9])):
        drawn = np.asarray(draw_boxes(photo(), [box, box], labels, NAMES, scores=scores))
        np.testing.assert_array_equal(drawn[300, 198], class_color(0))


def test_lines_and_letters_scale_with_the_image() -> None:
    gray = np.full((600, 600, 3), 128, dtype=np.uint8)
    small = draw_boxes(gray, [[100, 100, 500, 500]], [0], NAMES)
    large = draw_boxes(gray.repeat(5, axis=0).repeat(5, axis=1), [[500, 500, 2500, 2500]], [0], NAMES)
    changed_small, changed_large = (float((np.asarray(p) != 128).any(axis=2).mean()) for p in (small, large))
    assert changed_large == pytest.approx(changed_small, rel=0.35)


def test_ground_truth_is_drawn_differently_from_detections() -> None:
    box = [[100, 100, 300, 300]]
    ground_truth = draw_boxes(photo(), box, [0], ["a longer name"])
    detected = draw_boxes(photo(), box, [0], ["a longer name"], scores=[1.0])
    filled = [(np.asarray(p)[80:100] == class_color(0)).all(axis=2).sum() for p in (ground_truth, detected)]
    assert filled[0] < filled[1] / 2


def test_ignored_regions_are_hatched_in_grey_only() -> None:
    blank = np.full((600, 600, 3), 255, dtype=np.uint8)
    drawn = np.asarray(draw_boxes(blank, [], [], NAMES, ignore_boxes=[[100, 100, 300, 300], [5, 5, 5, 5]])).astype(int)
    assert np.ptp(drawn, axis=2).max() == 0
    assert 0.1 < (drawn[100:300, 100:300, 0] < 255).mean() < 0.5
    assert (drawn[320:, 320:] == 255).all()


@pytest.mark.parametrize(
    "box",
    [[9, 9, 9, 9], [0, 0, 0, 0], [640, 600, 640, 600], [50, 50, 20, 20], [-1e30, -1e30, 1e30, 1e30], [-9, 5, 700, 5]],
)
def test_degenerate_and_crossing_boxes_are_drawn(box: list[float]) -> None:
    drawn = draw_boxes(photo(), [box], [0], NAMES, scores=[0.5])
    assert (np.asarray(drawn) == class_color(0)).all(axis=2).any()


def test_boxes_outside_the_image_are_not_drawn() -> None:
    boxes = [[-50, 0, -10, 40], [700, 0, 900, 40], [0, -9, 40, -5], [0, 601, 40, 700]]
    drawn = draw_boxes(photo(), boxes, [0, 1, 2, 0], NAMES, scores=[0.1, 0.2, 0.3, 0.4])
    np.testing.assert_array_equal(np.asarray(drawn), photo())


UNUSUAL_NAMES = ["", " ", "\n", "glóbulo rojo", "中文名字", "x" * 10_000, "🦁", "\ud800", "a\x00b", "مرحبا", "?", "-"]


def test_any_class_name_can_be_drawn() -> None:
    drawn = draw_boxes(
        photo(),
        some_boxes(len(UNUSUAL_NAMES)),
        range(len(UNUSUAL_NAMES)),
        UNUSUAL_NAMES,
        title="\n".join(UNUSUAL_NAMES),
    )
    assert drawn.width == 640


def test_accents_are_dropped_and_unreadable_names_become_their_label() -> None:
    def label(name: str) -> bytes:
        return draw_boxes(photo(), [[100, 100, 300, 300]], [0], [name]).tobytes()

    assert label("glóbulo ñandú") == label("globulo nandu")
    assert label("中文") == label("") == label("#0")
    assert label("x" * 300) == label("x" * 200)


def test_many_objects_get_a_legend_with_their_classes_and_a_single_one_does_not() -> None:
    grid = np.stack(np.meshgrid(np.arange(10), np.arange(10)), axis=-1).reshape(-1, 2) * 22.0 + 200
    boxes = np.concatenate([grid, grid + 20], axis=1)
    labels = np.arange(100) % 3
    drawn = draw_boxes(photo(), boxes, labels, NAMES, scores=np.linspace(0, 1, 100))
    assert drawn.height > 600
    legend = np.asarray(drawn)[600:]
    assert all((legend == class_color(k)).all(axis=2).any() for k in range(3))
    assert draw_boxes(photo(), boxes[:1], labels[:1], NAMES).height == 600


def test_a_legend_of_too_many_classes_has_a_limited_height() -> None:
    names = [f"class number {i}" for i in range(500)]
    drawn = draw_boxes(photo(), some_boxes(500, side=5), np.arange(500), names)
    assert 600 < drawn.height < 900


def overlap(a: NDArray[Any], b: NDArray[Any]) -> float:
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return float(sides.clip(0).prod())


@settings(max_examples=60, deadline=None)
@given(
    corners=st.lists(st.tuples(*[st.integers(0, 200)] * 4), max_size=25),
    width=st.integers(1, 250),
    height=st.integers(1, 30),
)
def test_labels_stay_inside_the_image_and_cover_neither_each_other_nor_objects(
    corners: list[tuple[int, int, int, int]], width: int, height: int
) -> None:
    boxes = np.array([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in corners], float).reshape(-1, 4)
    choice, placed = place_labels(boxes, np.tile([width, width / 2.0], (len(boxes), 1)), height, (200, 180))
    assert choice.shape == (len(boxes),)
    assert placed.shape == (len(boxes), 4)
    kept = placed[choice >= 0]
    assert (kept[:, :2] >= 0).all()
    assert (kept[:, 2:] <= (200, 180)).all()
    for i, label in enumerate(kept):
        assert label[3] - label[1] == height
        assert all(overlap(label, other) == 0 for other in kept[:i])
        for box in boxes:
            assert overlap(label, box) <= MAX_COVER * max(1.0, (box[2:] - box[:2]).prod()) + 1e-6


def test_the_first_choice_is_the_whole_text_above_the_box() -> None:
    choice, placed = place_labels(np.array([[50.0, 50, 150, 150]]), np.array([[40.0, 20]]), 12, (200, 200))
    assert choice.tolist() == [0]
    assert placed.tolist() == [[50, 38, 90, 50]]


def test_a_label_is_shortened_or_omitted_rather_than_hide_a_neighbour() -> None:
    neighbours = [[x, y, x + 20.0, y + 20] for x in (0, 21, 42) for y in (0, 21, 42) if (x, y) != (21, 21)]
    boxes = np.array([[21, 21, 41, 41], *neighbours])
    assert place_labels(boxes, np.full((9, 1), 20.0), 15, (300, 300))[0][0] == -1
    assert place_labels(boxes, np.tile([20.0, 6], (9, 1)), 9, (300, 300))[0][0] == 1


def test_the_first_twenty_colours_are_far_apart_and_far_from_grey() -> None:
    colors = np.array([class_color(k) for k in range(20)] + [(150, 150, 150)], dtype=float)
    apart = np.linalg.norm(colors[:, None] - colors, axis=2) + 1e9 * np.eye(21)
    assert apart.min() > 45


def test_neighbouring_labels_differ_in_colour_and_each_is_bright_and_repeatable() -> None:
    colors = np.array([class_color(k) for k in range(300)], dtype=float)
    assert np.linalg.norm(np.diff(colors, axis=0), axis=1).min() > 30
    assert colors.max(axis=1).min() > 100
    assert class_color(7) == class_color(7)
    with pytest.raises(ValueError, match="must be 0 or more, got -1"):
        class_color(-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [[0, 0, 5, float("nan")]] * 2}, r"boxes must be finite, got .*nan.* at index 0 \(2 such\)"),
        ({"boxes": [[0, 0, 5, float("inf")], [0, 0, 1, 1]]}, "boxes must be finite"),
        ({"boxes": [[0, 0, 5]] * 2}, "boxes must have the shape"),
        ({"labels": [0]}, "labels must have the shape"),
        ({"labels": [0, 3]}, r"labels must be integers in 0..2 .*got 3 at index 1"),
        ({"labels": [-1, 0]}, "labels must be integers"),
        ({"labels": [0.5, 0]}, "labels must be integers"),
        ({"scores": [0.5]}, "scores must have the shape"),
        ({"scores": [0.5, float("nan")]}, "scores must be finite"),
        ({"ignore_boxes": [[0, 0, 1, float("nan")]]}, "ignore_boxes must be finite"),
        ({"image": np.zeros((5, 5), np.uint8)}, "image must be uint8"),
        ({"image": np.zeros((5, 5, 3), np.float32)}, "image must be uint8"),
        ({"image": np.zeros((0, 5, 3), np.uint8)}, "image must be uint8"),
    ],
)
def test_invalid_input_is_refused_with_the_rule_it_breaks(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"image": photo(), "boxes": [[0, 0, 5, 5], [1, 1, 9, 9]], "labels": [0, 1], "names": NAMES}
    draw_boxes(**good)
    with pytest.raises(ValueError, match=message):
        draw_boxes(**(good | change))


def test_detections_below_the_threshold_are_not_drawn() -> None:
    found = detections([[10, 40, 90, 90], [200, 200, 300, 300]], [0, 1], [0.5, 0.25])
    assert not (np.asarray(draw_detections(photo(), found, NAMES, score_thresh=0.3)) == class_color(1)).all(2).any()
    assert (np.asarray(draw_detections(photo(), found, NAMES, score_thresh=0.25)) == class_color(1)).all(2).any()
    none = draw_detections(photo(), found, NAMES, score_thresh=0.9)
    np.testing.assert_array_equal(np.asarray(none), photo())


def test_a_detection_without_a_finite_score_is_refused_whatever_the_threshold() -> None:
    found = detections([[10, 40, 90, 90]], [0], [float("nan")])
    with pytest.raises(ValueError, match="scores must be finite"):
        draw_detections(photo(), found, NAMES, score_thresh=0.5)


@pytest.mark.parametrize("n", [0, 1, 40])
@pytest.mark.parametrize("size", [(640, 600), (90, 60)])
def test_side_by_side_has_the_ground_truth_left_and_the_detections_right(n: int, size: tuple[int, int]) -> None:
    boxes = some_boxes(n, high=60, side=20)
    sheet = side_by_side(photo(*size), detections(NO_BOXES, [], []), boxes, [1] * n, NAMES)
    half = sheet.width // 2
    left, right = np.asarray(sheet)[:, :half], np.asarray(sheet)[:, half:]
    assert (left == class_color(1)).all(axis=2).any() == (n > 0)
    assert not (right == class_color(1)).all(axis=2).any()
    flipped = side_by_side(photo(*size), detections(boxes, [1] * n, [0.9] * n), NO_BOXES, [], NAMES)
    assert (np.asarray(flipped)[:, half:] == class_color(1)).all(axis=2).any() == (n > 0)
