"""Augmentation: repeatable, independent, boxes stay on their objects, and mistakes are reported before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from detector.datasets.augment import Augmentation, Transforms, extreme_sizes
from detector.datasets.objects import NO_OBJECTS, Objects
from detector.datasets.transforms import View
from detector.errors import ConfigError

NONE = np.zeros((0, 4), np.float32)


def augmentation(*transforms: Mapping[str, Mapping[str, Any]], min_visibility: float = 0.3) -> Augmentation:
    return Augmentation(transforms, min_visibility=min_visibility)


def augmented(
    pipeline: Augmentation, image: NDArray[np.uint8], objects: Objects, *, seed: list[int], **named: str
) -> tuple[NDArray[np.uint8], Objects]:
    view = pipeline(View(image, (image.shape[0], image.shape[1]), objects), np.random.default_rng(seed), **named)
    assert view.size == view.image.shape[:2]
    return view.image, view.objects


def corner_image() -> NDArray[np.uint8]:
    """An image whose upper left quarter is bright, which shows how it was flipped."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[:20, :30] = 200
    return image


def views(transforms: Transforms, seeds: list[list[int]]) -> list[bytes]:
    """At the top level, so that another process can call it."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
    objects = Objects(np.array([[5, 5, 30, 30]], np.float32), np.array([2]), NONE)
    pipeline = augmentation(*transforms)
    seen = []
    for seed in seeds:
        pixels, moved = augmented(pipeline, image, objects, seed=seed)
        seen.append(pixels.tobytes() + moved.boxes.tobytes())
    return seen


MANY: Transforms = (
    {"HorizontalFlip": {"p": 0.5}},
    {"RandomBrightnessContrast": {"p": 0.7}},
    {"OneOf": {"transforms": [{"VerticalFlip": {"p": 1.0}}, {"GaussianBlur": {"p": 1.0}}], "p": 0.8}},
    {"Affine": {"translate_px": [-5, 5], "p": 0.5}},
)


@pytest.mark.filterwarnings("error")
def test_an_empty_pipeline_changes_nothing_and_does_not_warn() -> None:
    image = corner_image()
    objects = Objects(np.array([[1, 2, 30, 20]], np.float32), np.array([4]), np.array([[0, 0, 10, 10]], np.float32))
    pixels, same = augmented(augmentation(), image, objects, seed=[0])
    assert np.array_equal(pixels, image)
    assert np.array_equal(same.boxes, objects.boxes)
    assert np.array_equal(same.labels, objects.labels)
    assert np.array_equal(same.ignore_boxes, objects.ignore_boxes)


def test_two_flips_of_one_pipeline_are_independent() -> None:
    pipeline = augmentation({"HorizontalFlip": {"p": 0.5}}, {"VerticalFlip": {"p": 0.5}})
    image, counts = corner_image(), np.zeros((2, 2), int)
    for index in range(400):
        pixels, _ = augmented(pipeline, image, NO_OBJECTS, seed=[0, 0, index])
        left, top = pixels[:, :30].mean() > pixels[:, 30:].mean(), pixels[:20].mean() > pixels[20:].mean()
        counts[int(left), int(top)] += 1
    assert counts.sum() == 400
    # Each of the four outcomes has chance 1/4: 100 of 400, standard deviation 8.7; 4.5 of them are one in 100,000.
    assert np.abs(counts - 100).max() < 39, counts


@pytest.mark.parametrize("which", [0, 1, 2], ids=["seed", "epoch", "image"])
def test_every_image_epoch_and_run_has_its_own_random_draws(which: int) -> None:
    seeds = [[1, 1, 1] for _ in range(30)]
    for i, seed in enumerate(seeds):
        seed[which] = i
    assert len(set(views(MANY, seeds))) >= 25


def test_the_same_seed_gives_the_same_view_in_any_order_and_any_process() -> None:
    seeds = [[0, epoch, index] for epoch in range(2) for index in range(5)]
    here = views(MANY, seeds)
    assert views(MANY, seeds[::-1])[::-1] == here
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:  # as the loader's workers on Linux
        assert list(pool.map(views, [MANY, MANY], [seeds, seeds[3:]])) == [here, here[3:]]


def test_all_mistakes_of_a_pipeline_are_reported_together() -> None:
    with pytest.raises(ConfigError) as refusal:
        augmentation(
            {"HorizontalFlop": {}},
            {"HorizontalFlip": {"probability": 0.5}},
            {"OneOf": {"p": 0.5}},
            {"OneOf": {"transforms": [{"GausianBlur": {}}]}},
            {"RandomCrop": {"height": -4, "width": 4}},
        )
    text = str(refusal.value)
    for part in (
        "data.augment[0]: unknown transform HorizontalFlop; did you mean HorizontalFlip?",
        "data.augment[1]", "probability",
        "data.augment[2]: OneOf must have a list `transforms`",
        "data.augment[3].OneOf.transforms[0]: unknown transform GausianBlur; did you mean GaussianBlur?",
        "data.augment[4]",
    ):  # fmt: skip
        assert part in text


@pytest.mark.parametrize("name", ["Normalize", "ToFloat", "ToTensorV2"])
def test_a_pipeline_that_returns_no_8_bit_image_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"8-bit RGB|unknown transform ToTensorV2"):
        augmentation({name: {"p": 1.0}})


def test_a_pipeline_that_rarely_returns_no_8_bit_image_is_refused_too() -> None:
    with pytest.raises(ConfigError, match="8-bit RGB"):
        augmentation({"ToFloat": {"p": 0.01}})


def test_transforms_that_move_pixels_but_not_boxes_are_refused_and_those_that_move_no_pixels_are_not() -> None:
    with pytest.raises(ConfigError, match="moves pixels but not boxes"):
        augmentation(
            {"GridElasticDeform": {"num_grid_xy": [4, 4], "magnitude": 5, "p": 1.0}},
            {"OverlayElements": {}},
            {"MaskDropout": {}},
        )
    augmentation({"GaussNoise": {"p": 1.0}}, {"ToGray": {"p": 1.0}}, {"CLAHE": {"p": 1.0}})


def test_a_pipeline_that_fails_on_an_image_fails_before_training() -> None:
    with pytest.raises(ConfigError, match=r"data\.augment fails on an image of 160 x 120 pixels: CropSizeError"):
        augmentation({"RandomCrop": {"height": 500, "width": 500}})


def test_a_pipeline_is_tried_on_the_extreme_sizes_of_the_dataset() -> None:
    sizes = np.array([[600, 800], [700, 520], [512, 2000], [900, 900]])
    assert extreme_sizes(sizes) == [(700, 520), (512, 2000)]
    assert extreme_sizes(sizes[:0]) == []
    crop = {"RandomCrop": {"height": 512, "width": 512}}
    Augmentation([crop], min_visibility=0.3, sizes=extreme_sizes(sizes))
    with pytest.raises(ConfigError, match="of 500 x 600 pixels: CropSizeError"):
        Augmentation([crop], min_visibility=0.3, sizes=[(512, 512), (600, 500)])


RARELY_WRONG: Sequence[Mapping[str, Any]] = (
    {"ToFloat": {"p": 0.001}},
    {"Normalize": {"p": 0.001}},
    {"ToGray": {"num_output_channels": 1, "p": 0.001}},
    {"RandomCrop": {"height": 500, "width": 500, "p": 0.001}},
)


@pytest.mark.parametrize("transform", RARELY_WRONG, ids=lambda transform: next(iter(transform)))
@pytest.mark.parametrize("around", ["nothing", "OneOf", "SomeOf", "OneOrOther", "Sequential", "RandomOrder"])
def test_a_pipeline_that_rarely_fails_is_refused_before_training_too(around: str, transform: Mapping[str, Any]) -> None:
    fine = {"HorizontalFlip": {"p": 0.5}}
    if around != "nothing":
        count = {"n": 1} if around in ("SomeOf", "RandomOrder") else {}
        transform = {around: {"transforms": [fine, transform], "p": 0.001, **count}}
    with pytest.raises(ConfigError, match=r"8-bit RGB|CropSizeError"):
        augmentation(fine, transform)


def test_trying_a_pipeline_does_not_change_its_probabilities() -> None:
    pipeline = augmentation(
        {"OneOf": {"transforms": [{"HorizontalFlip": {"p": 1.0}}, {"ToGray": {"p": 1.0}}], "p": 0.5}}
    )
    image = corner_image()
    unchanged = [np.array_equal(augmented(pipeline, image, NO_OBJECTS, seed=[i])[0], image) for i in range(200)]
    assert 60 < sum(unchanged) < 180, "half of them, and the grey ones, which were grey before"


def test_a_pipeline_that_fails_during_training_names_the_image() -> None:
    pipeline = Augmentation([{"RandomCrop": {"height": 100, "width": 100}}], min_visibility=0.3)
    with pytest.raises(ConfigError, match=r"fails on small\.png of 300 x 90 pixels: CropSizeError"):
        augmented(pipeline, np.zeros((90, 300, 3), np.uint8), NO_OBJECTS, seed=[0], name="small.png")


@pytest.mark.parametrize(
    "transform",
    [
        {"HorizontalFlip": {"p": 1.0}},
        {"VerticalFlip": {"p": 1.0}},
        {"RandomRotate90": {"p": 1.0}},
        {"Transpose": {"p": 1.0}},
        {"Affine": {"scale": [0.6, 1.2], "translate_percent": [-0.1, 0.1], "p": 1.0}},
        {"RandomCrop": {"height": 70, "width": 80, "p": 1.0}},
        {"RandomSizedBBoxSafeCrop": {"height": 90, "width": 110, "p": 1.0}},
        {"Resize": {"height": 200, "width": 90}},
        {"PadIfNeeded": {"min_height": 200, "min_width": 220}},
        {"LongestMaxSize": {"max_size": 70}},
        {"SomeOf": {"n": 2, "transforms": [{"HorizontalFlip": {"p": 1.0}}, {"Transpose": {"p": 1.0}}, {"ToGray": {}}]}},
        {"RandomOrder": {"n": 2, "transforms": [{"VerticalFlip": {"p": 1.0}}, {"Transpose": {"p": 1.0}}]}},
        {"Sequential": {"transforms": [{"VerticalFlip": {"p": 1.0}}, {"Transpose": {"p": 1.0}}], "p": 1.0}},
        {"OneOrOther": {"transforms": [{"VerticalFlip": {"p": 1.0}}, {"Transpose": {"p": 1.0}}]}},
    ],
    ids=lambda transform: next(iter(transform)),
)
def test_boxes_stay_on_what_they_bound(transform: Mapping[str, Mapping[str, Any]]) -> None:
    """A white rectangle on black is moved, and its box must move with it; the same box as ignore region too."""
    pipeline = augmentation(transform, min_visibility=0.0)
    image = np.zeros((100, 120, 3), np.uint8)
    image[30:70, 40:90] = 255
    box = np.array([[40, 30, 90, 70]], np.float32)
    seen = 0
    for index in range(12):
        pixels, moved = augmented(pipeline, image, Objects(box, np.array([5]), box), seed=[0, 0, index])
        assert pixels.dtype == np.uint8
        white = np.nonzero(pixels[..., 0] > 127)
        if not len(white[0]):
            continue
        at = [white[1].min(), white[0].min(), white[1].max() + 1, white[0].max() + 1]
        assert np.abs(moved.boxes[0] - at).max() <= 1.5, (moved.boxes, at)
        assert np.array_equal(moved.boxes, moved.ignore_boxes)
        assert moved.labels.tolist() == [5]
        assert moved.boxes.dtype == np.float32
        seen += 1
    assert seen >= 6


def test_labels_and_extras_stay_with_their_boxes_when_a_crop_drops_some() -> None:
    pipeline = augmentation({"Crop": {"x_min": 0, "y_min": 0, "x_max": 50, "y_max": 100, "p": 1.0}})
    boxes = np.array([[60, 10, 90, 40], [10, 10, 40, 40], [45, 50, 95, 90], [10, 60, 45, 95]], np.float32)
    ignored = np.array([[0, 0, 10, 10], [70, 70, 90, 90]], np.float32)
    mask = np.array([True, False, True, True])
    extras = {"ids": np.array([10, 11, 12, 13]), "points": np.arange(8).reshape(4, 2)}
    objects = Objects(boxes, np.array([0, 1, 2, 3]), ignored, extras, mask)
    _, left = augmented(pipeline, np.zeros((100, 100, 3), np.uint8), objects, seed=[1])
    assert left.labels.tolist() == [1, 3], "one is outside, of one only a tenth is left"
    assert left.extras["ids"].tolist() == [11, 13]
    assert left.extras["points"].tolist() == [[2, 3], [6, 7]]
    assert left.class_mask is mask
    assert np.allclose(left.boxes, [[10, 10, 40, 40], [10, 60, 45, 95]])
    assert left.ignore_boxes.tolist() == [[0, 0, 10, 10]]


def test_a_view_within_an_ignore_region_is_ignored_everywhere() -> None:
    """The objects are cut off too much to be kept, but no part of an ignore region may become background."""
    crop = {"Crop": {"x_min": 150, "y_min": 150, "x_max": 250, "y_max": 250, "p": 1.0}}
    everywhere = np.array([[0, 0, 400, 400], [0, 0, 200, 400], [300, 300, 310, 390]], np.float32)
    objects = Objects(everywhere, np.array([0, 1, 2]), everywhere)
    pipeline = Augmentation([crop], min_visibility=0.3, sizes=[(400, 400)])
    _, left = augmented(pipeline, np.zeros((400, 400, 3), np.uint8), objects, seed=[1])
    assert len(left.boxes) == 0
    np.testing.assert_allclose(left.ignore_boxes, [[0, 0, 100, 100], [0, 0, 50, 100]], atol=0.3 * 400 / 16)


@pytest.mark.parametrize(("visibility", "kept"), [(0.0, 1), (0.4, 1), (0.6, 0)])
def test_a_crop_drops_objects_that_are_less_visible_than_min_visibility(visibility: float, kept: int) -> None:
    crop = {"Crop": {"x_min": 0, "y_min": 0, "x_max": 50, "y_max": 100, "p": 1.0}}
    objects = Objects(np.array([[30, 20, 70, 60]], np.float32), np.array([0]), NONE)  # half of it
    pipeline = augmentation(crop, min_visibility=visibility)
    _, left = augmented(pipeline, np.zeros((100, 100, 3), np.uint8), objects, seed=[1])
    assert len(left.boxes) == kept


def test_a_box_that_rounding_put_outside_its_image_is_clipped() -> None:
    objects = Objects(
        np.array([[0, 0, np.nextafter(np.float32(33.3), np.float32(99)), 40]], np.float32), np.array([0]), NONE
    )
    pipeline = augmentation({"HorizontalFlip": {"p": 1.0}})
    _, left = augmented(pipeline, np.zeros((40, 33, 3), np.uint8), objects, seed=[1])
    assert left.boxes.tolist() == [[0, 0, 33, 40]]
