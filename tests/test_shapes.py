"""The embedded dataset: the generator reproduces it, it is valid COCO, and only shape distinguishes its classes."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from data.shapes import make as make_shapes
from data.shapes.make import CATEGORY_IDS, PLANS, Item, Scene, Split

SHAPES = Path(__file__).resolve().parents[1] / "data" / "shapes"
SPLITS: tuple[Split, ...] = ("train", "val")
Coco = dict[str, Any]


@pytest.fixture(scope="module")
def committed() -> dict[Split, Coco]:
    return {split: json.loads((SHAPES / "annotations" / f"{split}.json").read_text()) for split in SPLITS}


@pytest.fixture(scope="module")
def generated() -> dict[Split, tuple[Coco, list[Scene]]]:
    return {split: make_shapes.generate(0, split) for split in SPLITS}


def ordinary(coco: Coco) -> list[Coco]:
    return [record for record in coco["annotations"] if not record["iscrowd"]]


def class_counts(coco: Coco) -> NDArray[np.int64]:
    ids = [record["category_id"] for record in ordinary(coco)]
    return np.array([ids.count(category["id"]) for category in coco["categories"]])


def empty_scene(width: int = 30, height: int = 20) -> Scene:
    return Scene(width, height, "stripes", clutter=0, owner=np.full((height, width), -1, dtype=np.int32))


def add_block(scene: Scene, x: int, y: int, width: int, height: int) -> None:
    scene.instances.append(make_shapes.Instance("square", is_crowd=False))
    coverage = np.full((height, width), 255, dtype=np.uint8)
    make_shapes.add(scene, Item(coverage, x, y, "stripes", instance=len(scene.instances) - 1))


def test_an_empty_scene_has_no_annotations() -> None:
    assert list(make_shapes.annotate(empty_scene(), image_id=1)) == []


def test_box_and_area_are_those_of_the_visible_pixels() -> None:
    scene = empty_scene()
    add_block(scene, x=-2, y=3, width=12, height=10)  # two columns lie outside the image
    add_block(scene, x=6, y=0, width=8, height=20)  # hides columns 6 to 9 of the first
    boxes = [(record["bbox"], record["area"]) for record in make_shapes.annotate(scene, image_id=1)]
    assert boxes == [([0, 3, 6, 10], 60), ([6, 0, 8, 20], 160)]


def block(x: int, side: int) -> Item:
    return Item(np.full((side, side), 255, dtype=np.uint8), x, 0, "stripes", instance=0)


@pytest.mark.parametrize(("x", "expected"), [(0, True), (-3, True), (-4, False)])
def test_a_shape_fits_when_seven_tenths_of_it_are_inside_the_image(x: int, expected: bool) -> None:
    assert make_shapes.fits(empty_scene(), block(x, side=10), may_overlap=True) is expected


@pytest.mark.parametrize(
    ("x", "may_overlap", "expected"), [(30, False, True), (12, False, False), (12, True, True), (11, True, False)]
)
def test_a_shape_fits_when_it_leaves_two_fifths_of_the_other_visible(x: int, may_overlap: bool, expected: bool) -> None:
    scene = empty_scene(60, 30)
    add_block(scene, x=0, y=0, width=30, height=30)
    assert make_shapes.fits(scene, block(x, side=30), may_overlap) is expected


@pytest.mark.parametrize("category", CATEGORY_IDS)
@pytest.mark.parametrize(("width", "height"), [(40, 40), (60, 35), (25, 80)])
def test_every_shape_fills_its_box(category: str, width: int, height: int) -> None:
    for seed in range(5):
        solid = make_shapes.rasterize(np.random.default_rng(seed), category, width, height) >= 128
        assert solid.shape == (height, width)
        # A sharp tip may cover less than half of its last pixels.
        assert np.ptp(np.flatnonzero(solid.any(axis=0))) + 1 >= 0.9 * width
        assert np.ptp(np.flatnonzero(solid.any(axis=1))) + 1 >= 0.9 * height


@pytest.mark.parametrize(("category", "low", "high"), [("disc", 1, 1), ("ring", 1 - 0.62**2, 1 - 0.5**2)])
def test_disc_and_ring_have_the_area_of_an_ellipse_minus_its_hole(category: str, low: float, high: float) -> None:
    coverage = make_shapes.rasterize(np.random.default_rng(0), category, 80, 50)
    assert 0.99 * low <= coverage.sum() / 255 / (np.pi / 4 * 80 * 50) <= 1.01 * high


@pytest.mark.parametrize("fill", [0.0, 1.0, 0.5])
def test_pycocotools_decodes_the_run_lengths(fill: float) -> None:
    mask = np.random.default_rng(0).random((7, 5)) < fill
    rle = make_shapes.run_lengths(mask)
    decoded = coco_mask.decode(coco_mask.frPyObjects(rle, *rle["size"]))
    np.testing.assert_array_equal(decoded.astype(bool), mask)


@pytest.mark.parametrize("split", SPLITS)
def test_the_generator_reproduces_the_committed_annotations_to_the_byte(
    split: Split, generated: dict[Split, tuple[Coco, list[Scene]]]
) -> None:
    assert make_shapes.to_json(generated[split][0]) == (SHAPES / "annotations" / f"{split}.json").read_text()


def decoded(split: Split, image: Coco) -> NDArray[np.int16]:
    with Image.open(SHAPES / "images" / split / image["file_name"]) as file:
        return np.asarray(file.convert("RGB"), dtype=np.int16)


@pytest.mark.parametrize("split", SPLITS)
def test_the_generator_reproduces_the_committed_images(
    split: Split, generated: dict[Split, tuple[Coco, list[Scene]]]
) -> None:
    coco, scenes = generated[split]
    for index in (0, 17, 42, 89):
        repainted = Image.fromarray(make_shapes.paint(0, split, index, scenes[index]))
        buffer = io.BytesIO()
        repainted.save(buffer, "JPEG", quality=make_shapes.JPEG_QUALITY)
        generated_pixels = np.asarray(Image.open(buffer), dtype=np.int16)
        difference = np.abs(generated_pixels - decoded(split, coco["images"][index]))
        # JPEG libraries and vector units round differently, by a level or two; another random colour differs by dozens.
        assert difference.mean() < 1.0
        assert np.percentile(difference, 99) <= 8


def test_the_same_seed_gives_the_same_bytes_and_another_seed_gives_others(tmp_path: Path) -> None:
    contents = []
    for name, seed in (("first", "3"), ("again", "3"), ("other", "4")):
        folder = tmp_path / name
        arguments = ["--output-dir", str(folder), "--seed", seed, "--limit", "2", "--preview", str(tmp_path / "p.png")]
        assert make_shapes.main(arguments) == 0
        contents.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")})
    first, again, other = contents
    assert len(first) == 6
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[path] != other[path] for path in first)


def test_a_folder_with_other_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    (folder / "holiday.jpg").touch()
    assert make_shapes.main(["--output-dir", str(tmp_path), "--limit", "1"]) == 2
    assert "holiday.jpg" in capsys.readouterr().err


@pytest.mark.parametrize("split", SPLITS)
def test_the_set_is_valid_coco(split: Split, committed: dict[Split, Coco], capsys: pytest.CaptureFixture[str]) -> None:
    api = COCO(str(SHAPES / "annotations" / f"{split}.json"))
    coco = committed[split]
    for table in ("images", "annotations", "categories", "licenses"):
        ids = [record["id"] for record in coco[table]]
        assert ids
        assert len(set(ids)) == len(ids)
    assert set(coco["info"]) == {"description", "version", "year", "contributor", "url", "date_created"}
    assert {category["name"]: category["id"] for category in coco["categories"]} == CATEGORY_IDS
    assert {image["license"] for image in coco["images"]} == {coco["licenses"][0]["id"]}
    for record in coco["annotations"]:
        image = api.imgs[record["image_id"]]
        x, y, w, h = record["bbox"]
        assert record["category_id"] in api.cats
        assert x >= 0
        assert y >= 0
        assert x + w <= image["width"]
        assert y + h <= image["height"]
        assert 0 < record["area"] <= w * h


@pytest.mark.parametrize("split", SPLITS)
def test_every_image_exists_with_the_stated_size_and_there_are_no_other_files(
    split: Split, committed: dict[Split, Coco]
) -> None:
    folder = SHAPES / "images" / split
    images = committed[split]["images"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(image["file_name"] for image in images)
    for image in images:
        with Image.open(folder / image["file_name"]) as file:
            assert file.format == "JPEG"
            assert file.mode == "RGB"
            assert file.size == (image["width"], image["height"])
    assert any(image["width"] > image["height"] for image in images)
    assert any(image["width"] < image["height"] for image in images)


def test_the_splits_share_no_ids_and_category_ids_have_gaps(committed: dict[Split, Coco]) -> None:
    for table in ("images", "annotations"):
        train, val = ({record["id"] for record in committed[split][table]} for split in SPLITS)
        assert not train & val
    ids = [category["id"] for category in committed["train"]["categories"]]
    assert committed["train"]["categories"] == committed["val"]["categories"]
    assert ids != list(range(min(ids), min(ids) + len(ids)))


@pytest.mark.parametrize("split", SPLITS)
def test_masks_of_crowds_agree_with_their_boxes_and_areas(split: Split, committed: dict[Split, Coco]) -> None:
    api_images = {image["id"]: image for image in committed[split]["images"]}
    crowds = [record for record in committed[split]["annotations"] if record["iscrowd"]]
    assert len(crowds) == PLANS[split].crowds >= 2
    for record in crowds:
        image = api_images[record["image_id"]]
        assert record["segmentation"]["size"] == [image["height"], image["width"]]
        rle = coco_mask.frPyObjects(record["segmentation"], image["height"], image["width"])
        assert coco_mask.toBbox(rle).tolist() == record["bbox"]
        assert coco_mask.area(rle) == record["area"]
    assert not any("segmentation" in record for record in ordinary(committed[split]))


@pytest.mark.parametrize(("split", "fewest"), [("train", 45), ("val", 12)])
def test_classes_form_a_long_tail_with_enough_objects_of_the_rarest(
    split: Split, fewest: int, committed: dict[Split, Coco]
) -> None:
    counts = class_counts(committed[split])
    assert counts.min() >= fewest
    assert 14 <= counts.max() / counts.min() <= 22
    assert counts.max() / counts.sum() < 0.31


@pytest.mark.parametrize("split", SPLITS)
def test_some_images_are_empty_and_most_objects_are_of_medium_size(split: Split, committed: dict[Split, Coco]) -> None:
    coco = committed[split]
    used = {record["image_id"] for record in coco["annotations"]}
    empty = [image for image in coco["images"] if image["id"] not in used]
    assert 0.04 < len(empty) / len(coco["images"]) < 0.09
    sides = np.sqrt([record["bbox"][2] * record["bbox"][3] for record in ordinary(coco)])
    assert np.mean((sides >= 20) & (sides <= 120)) > 0.8
    assert sides.min() < 12
    assert sides.max() > 120


def test_the_set_takes_at_most_four_megabytes() -> None:
    assert sum(path.stat().st_size for path in SHAPES.rglob("*") if path.is_file()) <= 4_000_000


def test_val_has_no_texture_or_colour_of_train(committed: dict[Split, Coco]) -> None:
    seen = {split: {name for image in committed[split]["images"] for name in image["textures"]} for split in SPLITS}
    for split in SPLITS:
        assert seen[split] == set(PLANS[split].textures)
    assert not seen["train"] & seen["val"]
    assert not set(PLANS["train"].palette) & set(PLANS["val"].palette)


def trivial_features(split: Split, coco: Coco) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Features without the shape: mean RGB of the crop, log width, height and aspect ratio (N, 6); class index (N,)."""
    images = {image["id"]: decoded(split, image) for image in coco["images"]}
    index = {category["id"]: i for i, category in enumerate(coco["categories"])}
    rows = []
    for record in ordinary(coco):
        x, y, w, h = record["bbox"]
        color = images[record["image_id"]][y : y + h, x : x + w].mean(axis=(0, 1)) / 64
        rows.append([*color, np.log(w), np.log(h), np.log(w / h)])
    return np.array(rows), np.array([index[record["category_id"]] for record in ordinary(coco)])


def nearest_neighbors_accuracy(
    x: NDArray[np.float64], y: NDArray[np.int64], val_x: NDArray[np.float64], val_y: NDArray[np.int64], k: int
) -> float:
    """Accuracy on val of the majority vote of the k nearest training examples."""
    scale = x.std(axis=0)
    distances = np.linalg.norm((val_x / scale)[:, None] - (x / scale)[None], axis=2)
    votes = np.eye(len(CATEGORY_IDS))[y[np.argpartition(distances, k, axis=1)[:, :k]]].sum(axis=1)
    return float(np.mean(votes.argmax(axis=1) == val_y))


def logistic_regression_accuracy(
    x: NDArray[np.float64], y: NDArray[np.int64], val_x: NDArray[np.float64], val_y: NDArray[np.int64]
) -> float:
    """Accuracy on val of multinomial logistic regression on all products of two features."""
    pairs = np.triu_indices(x.shape[1] + 1)
    mean, std = x.mean(axis=0), x.std(axis=0)

    def expand(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        with_one = np.concatenate([np.ones((len(rows), 1)), (rows - mean) / std], axis=1)
        return np.asarray(with_one[:, pairs[0]] * with_one[:, pairs[1]])

    features, target = expand(x), np.eye(len(CATEGORY_IDS))[y]
    weights = np.zeros((features.shape[1], target.shape[1]))
    for _ in range(400):
        logits = features @ weights
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights -= 0.1 * features.T @ (odds / odds.sum(axis=1, keepdims=True) - target) / len(x)
    return float(np.mean((expand(val_x) @ weights).argmax(axis=1) == val_y))


def test_colour_and_box_size_do_not_reveal_the_class(committed: dict[Split, Coco]) -> None:
    x, y = trivial_features("train", committed["train"])
    val_x, val_y = trivial_features("val", committed["val"])
    accuracies = {f"{k} neighbors": nearest_neighbors_accuracy(x, y, val_x, val_y, k) for k in (1, 15, 50)}
    accuracies["logistic regression"] = logistic_regression_accuracy(x, y, val_x, val_y)
    majority = np.bincount(val_y).max() / len(val_y)
    print(f"always the most frequent class: {majority:.3f}", *(f"{name}: {a:.3f}" for name, a in accuracies.items()))
    assert max(accuracies.values()) < 0.40

    # The same classifiers detect a leak if there is one: colours and box sizes that grow with the class index.
    leak, val_leak = x.copy(), val_x.copy()
    leak[:, :5] += y[:, None]
    val_leak[:, :5] += val_y[:, None]
    assert nearest_neighbors_accuracy(leak, y, val_leak, val_y, k=15) > 0.6
    assert logistic_regression_accuracy(leak, y, val_leak, val_y) > 0.6
