"""The geometry shared by training, evaluation and prediction."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detector.datasets.objects import NO_OBJECTS, Objects
from detector.datasets.transforms import (
    View,
    fit_inside,
    mirror,
    mirror_randomly,
    padded_size,
    resize_batch,
    resize_image,
    resize_view,
    resized_size,
)
from detector.structures import Unresized

SIDES = st.integers(1, 3000)


def painted(box: tuple[int, int, int, int], size: tuple[int, int] = (60, 90)) -> View:
    """A black image with a white rectangle, which is both an object and an ignore region."""
    image = np.zeros((*size, 3), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = 255
    boxes = np.array([box], np.float32)
    return View(image, size, Objects(boxes, np.array([1]), boxes, {"ids": np.array([17])}))


def white_box(image: np.ndarray) -> list[int]:
    """The box around the white pixels."""
    ys, xs = np.nonzero(image[..., 0] > 127)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((600, 800), (800, 1067)),
        ((800, 600), (1067, 800)),
        ((100, 1000), (133, 1333)),  # the long side binds
        ((800, 800), (800, 800)),
        ((1, 5000), (1, 1333)),  # never nothing
    ],
)
def test_the_short_side_is_scaled_unless_the_long_side_would_be_too_long(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert resized_size(size, min_size=800, max_size=1333) == expected


@given(height=SIDES, width=SIDES, min_size=st.integers(16, 900))
def test_a_resized_image_keeps_its_aspect_ratio_and_its_bounds(height: int, width: int, min_size: int) -> None:
    new = resized_size((height, width), min_size=min_size, max_size=1333)
    assert max(new) <= 1333
    assert min(new) <= min_size
    assert min(new) == min_size or max(new) == 1333
    scale = min(min_size / min(height, width), 1333 / max(height, width))
    assert abs(new[0] - height * scale) <= 0.5 or new[0] == 1
    assert abs(new[1] - width * scale) <= 0.5 or new[1] == 1


@given(height=SIDES, width=SIDES, canvas=st.tuples(SIDES, SIDES))
def test_an_image_fitted_to_a_canvas_fits_and_is_never_enlarged(
    height: int, width: int, canvas: tuple[int, int]
) -> None:
    new = fit_inside((height, width), canvas)
    assert new[0] <= min(canvas[0], height)
    assert new[1] <= min(canvas[1], width)
    assert min(new) >= 1
    if height <= canvas[0] and width <= canvas[1]:
        assert new == (height, width)


@given(height=SIDES, width=SIDES)
def test_padding_rounds_up_to_the_next_multiple(height: int, width: int) -> None:
    for pad, multiple in (("multiple_128", 128), ("batch_max_32", 32)):
        padded = padded_size((height, width), pad)  # type: ignore[arg-type]
        for side, new in zip((height, width), padded, strict=True):
            assert new % multiple == 0
            assert 0 <= new - side < multiple


def test_an_image_of_the_right_size_is_not_copied() -> None:
    view = painted((10, 10, 20, 20))
    assert resize_image(view.image, (60, 90), "area") is view.image


@pytest.mark.parametrize("size", [(120, 180), (30, 45), (61, 91), (40, 90)])
def test_resized_boxes_bound_the_resized_rectangle(size: tuple[int, int]) -> None:
    view = painted((12, 18, 60, 48))
    resized = resize_view(view, size, "area")
    assert resized.size == resized.image.shape[:2] == size
    assert np.abs(resized.objects.boxes[0] - white_box(resized.image)).max() <= 1
    assert np.array_equal(resized.objects.ignore_boxes, resized.objects.boxes)
    assert resized.objects.labels.tolist() == [1]
    assert resized.objects.extras["ids"].tolist() == [17]
    left = resize_view(view, size, "float_bilinear")
    assert left.image is view.image
    assert np.array_equal(left.objects.boxes, resized.objects.boxes)


def test_shrinking_averages_the_pixels_that_it_merges() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    assert np.abs(resize_image(stripes, (16, 16), "area").astype(int) - 100).max() <= 1, (
        "stripes must average, not alias"
    )


@given(SIDES, SIDES, st.integers(1, 1000))
def test_torchvisions_sizes_are_rounded_down(height: int, width: int, min_size: int) -> None:
    """As torch.nn.functional.interpolate does with torchvision's scale factor."""
    scale = min(min_size / min(height, width), 1333 / max(height, width))
    expected = math.floor(height * scale), math.floor(width * scale)
    new = resized_size((height, width), min_size=min_size, max_size=1333, resize="float_bilinear")
    assert new == (max(1, expected[0]), max(1, expected[1]))


def test_each_resize_rule_equals_its_library() -> None:
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    for size in ((20, 29), (74, 106), (30, 60)):
        by_pillow = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
        by_opencv = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
        assert np.array_equal(resize_image(image, size, "pil_bilinear"), by_pillow)
        assert np.array_equal(resize_image(image, size, "cv2_bilinear"), by_opencv)


def test_a_batch_resized_on_the_device_is_torchvisions() -> None:
    """Compared with the class that torchvision's detectors use, with means and deviations that change nothing."""
    rng = np.random.default_rng(1)
    images = [torch.from_numpy(rng.integers(0, 256, (3, *s), dtype=np.uint8)) for s in ((40, 61), (55, 30), (64, 64))]
    transform = GeneralizedRCNNTransform(48, 70, [0.0] * 3, [1.0] * 3, size_divisible=32)
    expected, _ = transform([image.float() for image in images])
    canvas = np.zeros((3, 3, 64, 64), np.uint8)
    for place, image in zip(canvas, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    resized = [resized_size(s, min_size=48, max_size=70, resize="float_bilinear") for s in sizes]
    assert resized == expected.image_sizes
    largest = (max(h for h, _ in resized), max(w for _, w in resized))
    unresized = Unresized(sizes, resized, padded_size(largest, "batch_max_32"))
    found = resize_batch(torch.from_numpy(canvas), unresized)
    assert found.shape == expected.tensors.shape
    assert (found - expected.tensors).abs().max() < 1e-3  # of 255


def test_mirrored_boxes_bound_the_mirrored_rectangle() -> None:
    view = painted((12, 18, 60, 48))
    mirrored = mirror(view)
    assert mirrored.objects.boxes.tolist() == [white_box(mirrored.image)]
    assert mirrored.objects.ignore_boxes.tolist() == [white_box(mirrored.image)]
    assert mirrored.objects.extras["ids"].tolist() == [17]
    again = mirror(mirrored)
    assert np.array_equal(again.image, view.image)
    assert np.array_equal(again.objects.boxes, view.objects.boxes)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_images_are_mirrored_with_the_given_probability(probability: float) -> None:
    view, rng = painted((12, 18, 60, 48)), np.random.default_rng(0)
    times = sum(mirror_randomly(view, rng, probability=probability) is not view for _ in range(400))
    assert abs(times - 400 * probability) < 4.5 * math.sqrt(400 * probability * (1 - probability)) + 1e-9


def test_images_without_objects_are_transformed_too() -> None:
    view = View(np.zeros((10, 20, 3), np.uint8), (10, 20), NO_OBJECTS)
    assert mirror(view).objects.boxes.shape == (0, 4)
    assert resize_view(view, (30, 60), "area").objects.ignore_boxes.shape == (0, 4)
