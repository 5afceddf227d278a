"""Generate the shapes dataset: small synthetic images in COCO format whose classes differ by shape alone.

examples:
  python data/shapes/make.py
  python data/shapes/make.py --output-dir /tmp/shapes --seed 7 --preview /tmp/shapes.png

The first command reproduces the committed dataset (seed 0).
"""

# Each image has two random streams: `compose` draws the geometry, on which alone the annotations depend; `paint` draws
# colours and light, whose pixels another version of OpenCV or libjpeg may round differently.

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Split = Literal["train", "val"]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Contours = list[NDArray[np.float64]]

# Ids have gaps, as in COCO, so that code that confuses ids with indices fails here first.
CATEGORY_IDS = {
    "disc": 1,
    "square": 2,
    "triangle": 4,
    "star": 7,
    "ring": 8,
    "cross": 11,
    "heart": 13,
    "crescent": 17,
}


@dataclass(frozen=True)
class SplitPlan:
    """The counts of one split, and its textures and colours."""

    code: int  # distinguishes the splits' random streams and image ids
    images: int
    empty: int
    crowds: int
    instances: dict[str, int]  # ordinary objects per class; a long tail of about 1:17
    textures: tuple[str, ...]
    palette: tuple[str, ...]


PLANS: dict[Split, SplitPlan] = {
    "train": SplitPlan(
        code=0,
        images=360,
        empty=22,
        crowds=7,
        instances=dict(zip(CATEGORY_IDS, (790, 540, 410, 310, 250, 190, 130, 46), strict=True)),
        textures=("gradient", "stripes", "checkers", "clouds", "dots", "wood"),
        palette=(
            *("#c0392b", "#e67e22", "#f1c40f", "#27ae60", "#16a085", "#2980b9", "#8e44ad", "#2c3e50"),
            *("#ecf0f1", "#95a5a6", "#6d4c41", "#f8bbd0", "#1b5e20", "#aed581"),
        ),
    ),
    "val": SplitPlan(
        code=1,
        images=90,
        empty=6,
        crowds=3,
        instances=dict(zip(CATEGORY_IDS, (198, 135, 102, 78, 62, 47, 32, 13), strict=True)),
        textures=("marble", "chevrons", "cells", "plaid", "bricks", "camouflage"),
        palette=(
            *("#a8324a", "#d9622b", "#d4a017", "#6b8e23", "#00897b", "#4169b0", "#b565a7", "#30343f"),
            *("#f5efe0", "#8d8778", "#7b3f00", "#ffccaa", "#17456b", "#9fd8df"),
        ),
    ),
}

IMAGE_SIZES = (
    (256, 192),
    (192, 256),
    (224, 224),
    (240, 192),
    (192, 240),
    (288, 216),
    (216, 288),
    (256, 224),
    (240, 240),
)
MIN_VISIBLE = 0.4  # share of the whole shape's area; a smaller visible part may be impossible to classify
MIN_VISIBLE_TINY = 0.75  # for shapes under TINY pixels, which are recognized by their corners alone
TINY = 22
MIN_INSIDE = 0.7  # share of the shape's area inside the image
SUPERSAMPLE = 4
JPEG_QUALITY = 77


@dataclass(frozen=True)
class Item:
    """One shape to paint: its coverage (h, w) in 0..255, the image position of its first pixel, and its texture."""

    coverage: Bytes
    x: int
    y: int
    texture: str
    instance: int  # index into Scene.instances; the copies of a crowd share one


@dataclass(frozen=True)
class Instance:
    """One annotated object or crowd."""

    category: str
    is_crowd: bool


@dataclass
class Scene:
    """Everything about an image but its colours; items are ordered back to front.

    `owner` (height, width) is the index of the visible item at each pixel, -1 for background.
    """

    width: int
    height: int
    background: str
    clutter: int  # distracting lines and smears that belong to no class
    owner: NDArray[np.int32]
    items: list[Item] = field(default_factory=list)
    instances: list[Instance] = field(default_factory=list)


@dataclass(frozen=True)
class Content:
    """The classes of one image's objects, and the class of its crowd if it has one."""

    categories: tuple[str, ...]
    crowd: str | None


def distribute(seed: int, split: Split) -> list[Content]:
    """Distribute a split's objects over its images, so that the class counts are exact for every seed."""
    plan = PLANS[split]
    rng = np.random.default_rng([seed, plan.code])
    objects = [name for name, count in plan.instances.items() for _ in range(count)]
    shuffled = iter([objects[i] for i in rng.permutation(len(objects))])
    order = rng.permutation(plan.images)
    filled = plan.images - plan.empty
    extra = rng.multinomial(len(objects) - 3 * filled, np.full(filled, 1 / filled))
    contents = [Content((), None)] * plan.images
    for rank, index in enumerate(order[plan.empty :]):
        crowd = str(rng.choice(list(CATEGORY_IDS))) if rank < plan.crowds else None
        contents[index] = Content(tuple(itertools.islice(shuffled, 3 + int(extra[rank]))), crowd)
    return contents


def arc(radius: float = 1.0, x: float = 0.0, start: float = 0.0, stop: float = 2 * np.pi) -> NDArray[np.float64]:
    """Return points (96, 2) of a circle around (x, 0) from angle `start` up to `stop` (exclusive), in radians."""
    t = np.linspace(start, stop, 96, endpoint=False)
    return np.stack([x + radius * np.cos(t), radius * np.sin(t)], axis=1)


def outline(rng: np.random.Generator, category: str) -> Contours:
    """Return the contours [(N, 2)] of a class's shape, y downwards, at any scale; an inner contour is a hole."""
    if category == "disc":
        return [arc()]
    if category == "ring":
        return [arc(), arc(rng.uniform(0.5, 0.62))]
    if category == "square":
        return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=np.float64)]
    if category == "triangle":
        return [np.array([[rng.uniform(-0.15, 0.15), -1], [1, 0.8], [-1, 0.8]], dtype=np.float64)]
    if category == "star":
        t = np.linspace(-np.pi / 2, 3 * np.pi / 2, 10, endpoint=False)
        radii = np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.38, 0.46))
        return [radii[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1)]
    if category == "cross":
        a = rng.uniform(0.28, 0.38)
        quarter = np.array([[-a, -1.0], [a, -1.0], [a, -a]])
        turns = [np.array([[np.cos(k), np.sin(k)], [-np.sin(k), np.cos(k)]]) for k in np.arange(4) * np.pi / 2]
        return [np.concatenate([quarter @ turn for turn in turns])]
    if category == "heart":
        t = np.linspace(0, 2 * np.pi, 96, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return [np.stack([16 * np.sin(t) ** 3, -y], axis=1)]
    if category == "crescent":
        # The unit circle minus a circle of radius r around (d, 0); they intersect at x = c.
        r, d = rng.uniform(0.8, 0.9), rng.uniform(0.4, 0.5)
        c = (1 + d * d - r * r) / (2 * d)
        outer, inner = float(np.arccos(c)), float(np.arctan2(np.sqrt(1 - c * c), c - d))
        points = np.concatenate([arc(1, 0, outer, 2 * np.pi - outer), arc(r, d, 2 * np.pi - inner, inner)])
        return [points * [rng.choice([-1, 1]), 1]]
    raise ValueError(f"category must be one of {', '.join(CATEGORY_IDS)}, got {category!r}")


def rasterize(rng: np.random.Generator, category: str, width: int, height: int) -> Bytes:
    """Return the coverage (height, width) in 0..255 of a slightly rotated shape that exactly fills the box.

    The rotated shape is stretched to a box drawn before, so neither size nor aspect ratio reveals the class.
    """
    angle = np.deg2rad(rng.uniform(-22, 22))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    contours = [points @ turn for points in outline(rng, category)]
    low, high = contours[0].min(axis=0), contours[0].max(axis=0)
    rows, columns = height * SUPERSAMPLE, width * SUPERSAMPLE
    centers = np.arange(rows) + 0.5
    # Even-odd scan lines in numpy, since polygons of OpenCV and Pillow differ between versions.
    crossings = np.zeros((rows, columns + 1), dtype=np.int64)
    for points in contours:
        start = (points - low) * [columns, rows] / (high - low)
        step = np.roll(start, -1, axis=0) - start
        above = start[:, 1] <= centers[:, None]
        row, edge = np.nonzero(above != np.roll(above, -1, axis=1))
        x = start[edge, 0] + (centers[row] - start[edge, 1]) * step[edge, 0] / step[edge, 1]
        np.add.at(crossings, (row, np.clip(np.ceil(x - 0.5), 0, columns).astype(np.int64)), 1)
    inside = crossings[:, :-1].cumsum(axis=1) % 2
    blocks = inside.reshape(height, SUPERSAMPLE, width, SUPERSAMPLE).mean(axis=(1, 3))
    return np.asarray(255 * blocks, dtype=np.uint8)


def window(item: Item, width: int, height: int) -> tuple[tuple[slice, slice], Bytes]:
    """Return the image region of an item, and its coverage there (its array cropped at the image's border)."""
    x0, y0 = max(item.x, 0), max(item.y, 0)
    h, w = item.coverage.shape
    x1, y1 = min(item.x + w, width), min(item.y + h, height)
    return (slice(y0, y1), slice(x0, x1)), item.coverage[y0 - item.y : y1 - item.y, x0 - item.x : x1 - item.x]


def solid_area(item: Item) -> int:
    """Return the number of pixels of the whole shape, hidden or not."""
    return int((item.coverage >= 128).sum())


def fits(scene: Scene, item: Item, may_overlap: bool) -> bool:
    """Return whether `item` may be put on top: inside the image, not hiding others too much, and not on a crowd."""
    at, coverage = window(item, scene.width, scene.height)
    solid = coverage >= 128
    area = int(solid.sum())
    if area < MIN_INSIDE * solid_area(item):
        return False
    crowd = [i for i, other in enumerate(scene.items) if scene.instances[other.instance].is_crowd]
    if np.isin(scene.owner[at], crowd).any():
        return False
    below, hidden = np.unique(scene.owner[at][solid], return_counts=True)
    for index, count in zip(below.tolist(), hidden.tolist(), strict=True):
        if index < 0:
            continue
        other = scene.items[index]
        whole = solid_area(other)
        left = int((scene.owner == index).sum()) - count
        if left < (MIN_VISIBLE_TINY if min(other.coverage.shape) < TINY else MIN_VISIBLE) * whole:
            return False
        if count > 0.8 * area and area > 0.15 * whole:  # a shape inside another looks like a ring
            return False
        if not may_overlap and count > 0.02 * area:
            return False
    return True


def add(scene: Scene, item: Item) -> None:
    """Put `item` on top."""
    at, coverage = window(item, scene.width, scene.height)
    scene.owner[at][coverage >= 128] = len(scene.items)
    scene.items.append(item)


def add_crowd(scene: Scene, rng: np.random.Generator, category: str, textures: tuple[str, ...]) -> None:
    """Scatter 25 to 40 tiny copies of one class over an ellipse, as a single crowd instance."""
    scene.instances.append(Instance(category, is_crowd=True))
    rx, ry = rng.uniform(34, 50, size=2)
    cx, cy = rng.uniform(rx + 8, scene.width - rx - 8), rng.uniform(ry + 8, scene.height - ry - 8)
    for _ in range(int(rng.integers(25, 41))):
        r, t = np.sqrt(rng.uniform()), rng.uniform(0, 2 * np.pi)
        w, h = rng.integers(9, 14, size=2).tolist()
        x, y = round(cx + rx * r * np.cos(t) - w / 2), round(cy + ry * r * np.sin(t) - h / 2)
        texture = str(rng.choice(textures))
        add(scene, Item(rasterize(rng, category, w, h), x, y, texture, instance=len(scene.instances) - 1))


def draw_side(rng: np.random.Generator, longest: float) -> float:
    """Draw the geometric mean of a box's sides in pixels: mostly 22 to 64, with tails to 11 and to `longest`."""
    kind = rng.random()
    low, high = (11.0, 22.0) if kind < 0.12 else (22.0, 64.0) if kind < 0.82 else (64.0, longest)
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def compose(seed: int, split: Split, index: int, content: Content) -> Scene:
    """Lay out one image: its size, and the position of each shape of its content."""
    plan = PLANS[split]
    rng = np.random.default_rng([seed, plan.code, index, 0])
    width, height = IMAGE_SIZES[int(rng.integers(len(IMAGE_SIZES)))]
    scene = Scene(
        width=width,
        height=height,
        background=str(rng.choice(plan.textures)),
        clutter=int(rng.integers(3, 9)) if rng.random() < (0.3 if content.categories else 0.6) else 0,
        owner=np.full((height, width), -1, dtype=np.int32),
    )
    if content.crowd:
        add_crowd(scene, rng, content.crowd, plan.textures)
    sides = [draw_side(rng, 0.58 * min(width, height)) for _ in content.categories]
    # Larger shapes are roughly further back: otherwise they would hide the small ones.
    sides.sort(key=lambda side: -side * rng.uniform(0.6, 1.6))
    for category, side in zip(content.categories, sides, strict=True):
        place(scene, rng, category, side, str(rng.choice(plan.textures)))
    return scene


def place(scene: Scene, rng: np.random.Generator, category: str, side: float, texture: str) -> None:
    """Add one shape of about `side` pixels where it fits; shrink it until it does.

    Raises:
        RuntimeError: even a tiny shape does not fit.
    """
    scene.instances.append(Instance(category, is_crowd=False))
    while side >= 8:
        stretch = np.exp(rng.uniform(-0.16, 0.16))
        w, h = max(10, round(side * stretch)), max(10, round(side / stretch))
        coverage = rasterize(rng, category, w, h)
        may_overlap = bool(rng.random() < 0.5)
        reach = rng.choice([0.0, 0.25], p=[0.8, 0.2])  # how far beyond the image's border
        for _ in range(30):
            x = int(rng.integers(round(-reach * w), scene.width - w + round(reach * w) + 1))
            y = int(rng.integers(round(-reach * h), scene.height - h + round(reach * h) + 1))
            item = Item(coverage, x, y, texture, instance=len(scene.instances) - 1)
            if fits(scene, item, may_overlap):
                add(scene, item)
                return
        side *= 0.8
    raise RuntimeError(f"a {category} must fit somewhere into {scene.width}x{scene.height}; lower the plan's counts")


def hex_color(text: str) -> Floats:
    """Return RGB (3,) in 0..255 of "#rrggbb"."""
    return np.array(list(bytes.fromhex(text[1:])), dtype=np.float32)


def noise(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> Floats:
    """Return value noise (h, w) in about 0..1: random values every `cell` pixels, interpolated; two octaves."""
    h, w = shape
    total = np.zeros(shape, dtype=np.float32)
    for weight, size in ((0.7, cell), (0.3, cell / 2)):
        grid = rng.random((int(h / size) + 3, int(w / size) + 3), dtype=np.float32)
        total += weight * cv2.resize(grid, (w, h), interpolation=cv2.INTER_CUBIC)
    return np.clip(total, 0, 1)


def cells(rng: np.random.Generator, shape: tuple[int, int], period: float) -> Floats:
    """Return a Voronoi mosaic (h, w) in 0..1: each cell, about `period` pixels wide, has its own shade."""
    h, w = shape
    gx, gy = np.meshgrid(np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32))
    # One center per lattice square, so that no cell is much larger than the others.
    rows, columns = int(h / period) + 2, int(w / period) + 2
    centers = rng.random((rows, columns, 2)) - 0.5 + np.moveaxis(np.mgrid[:rows, :columns], 0, -1)
    nearest = np.full(shape, np.inf, dtype=np.float32)
    shade = np.zeros(shape, dtype=np.float32)
    for cy, cx in centers.reshape(-1, 2) * period:
        distance = (gx - cx) ** 2 + (gy - cy) ** 2
        np.copyto(shade, rng.random(dtype=np.float32), where=distance < nearest)
        np.minimum(nearest, distance, out=nearest)
    return shade


def wave(phase: Floats, sharpness: float = 2.5) -> Floats:
    """Return a 0..1 wave of period 1 with soft edges, which alias less and need fewer JPEG bytes than hard ones."""
    return np.asarray(0.5 + 0.5 * np.tanh(sharpness * np.sin(2 * np.pi * phase)), dtype=np.float32)


def texture_field(rng: np.random.Generator, family: str, shape: tuple[int, int], period: float) -> Floats:
    """Return a texture (h, w) in 0..1, the share of its second colour; `period` is its grain in pixels."""
    h, w = shape
    angle = rng.uniform(0, np.pi)
    gx, gy = np.meshgrid(np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32))
    x: Floats = (gx * np.cos(angle) + gy * np.sin(angle)).astype(np.float32) / period + rng.random(dtype=np.float32)
    y: Floats = (gy * np.cos(angle) - gx * np.sin(angle)).astype(np.float32) / period + rng.random(dtype=np.float32)
    share: Any
    match family:
        case "gradient":
            ramp = (x - x.min()) / max(float(np.ptp(x)), 1e-6)
            share = ramp + 0.2 * noise(rng, shape, period) - 0.1
        case "stripes":
            share = wave(x)
        case "checkers":
            share = 0.5 + 0.5 * np.tanh(4 * np.sin(np.pi * x) * np.sin(np.pi * y))
        case "clouds":
            share = noise(rng, shape, 1.5 * period)
        case "dots":
            share = 0.5 + 0.5 * np.tanh(3 * (np.cos(2 * np.pi * x) + np.cos(2 * np.pi * y) - 0.7))
        case "wood":
            share = wave(x + 0.1 * y + 1.6 * noise(rng, shape, 3 * period), 1.0)
        case "marble":
            share = np.abs(np.sin(np.pi * (0.5 * x + 2.5 * noise(rng, shape, 2.5 * period))))
        case "chevrons":
            share = wave(y + np.abs(x / 2 % 2 - 1))
        case "cells":
            share = cells(rng, shape, period)
        case "plaid":
            share = 0.5 * wave(x) + 0.3 * wave(y) + 0.2 * wave(3 * y, 1.0)
        case "bricks":
            u, v = (x / 2 + 0.5 * (np.floor(y) % 2)) % 1, y % 1
            share = np.minimum(np.minimum(u, 1 - u) * 2, np.minimum(v, 1 - v)) * period - 0.4
        case "camouflage":
            share = 0.5 + 0.5 * np.tanh(10 * (noise(rng, shape, 1.4 * period) - 0.5))
        case _:
            known = ", ".join(PLANS["train"].textures + PLANS["val"].textures)
            raise ValueError(f"texture must be one of {known}, got {family!r}")
    return np.asarray(np.clip(share, 0, 1), dtype=np.float32)


def shades(rng: np.random.Generator, palette: tuple[str, ...], contrast: float) -> tuple[Floats, Floats]:
    """Return two colours (3,) of one texture: a palette colour, and one `contrast` levels lighter or darker."""
    base = hex_color(palette[int(rng.integers(len(palette)))]) + rng.normal(0, 8, 3).astype(np.float32)
    toward = 255.0 if base.mean() < 128 else 0.0
    return base, base + (toward - base) * np.float32(contrast / 128)


def difference(a: Floats, b: Floats) -> float:
    """Return the visual difference of two RGB colours (3,), in levels: luminance counts most, as it does at edges."""
    luma = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    delta = a - b
    light = float(delta @ luma)
    return abs(light) + 0.35 * float(np.abs(delta - light).sum())


def fill(
    rng: np.random.Generator, family: str, shape: tuple[int, int], period: float, tones: tuple[Floats, Floats]
) -> Floats:
    """Return a texture in colour (h, w, 3)."""
    share = texture_field(rng, family, shape, period)[..., None]
    return np.asarray(tones[0] * (1 - share) + tones[1] * share, dtype=np.float32)


def paint_clutter(rng: np.random.Generator, canvas: Floats, count: int, palette: tuple[str, ...]) -> None:
    """Draw open lines and soft smears into `canvas` (h, w, 3): edges and colours that belong to no object."""
    h, w = canvas.shape[:2]
    for _ in range(count):
        start = rng.uniform([0, 0], [w, h])
        steps = np.cumsum(rng.normal(0, 0.13 * min(h, w), (int(rng.integers(2, 6)), 2)), axis=0)
        points = np.rint(np.concatenate([start[None], start + steps])).astype(np.int32)
        smear = rng.random() < 0.5
        thickness = int(rng.integers(14, 30)) if smear else int(rng.integers(1, 4))
        mask = np.zeros((h, w), dtype=np.uint8)
        cv2.polylines(mask, [points], isClosed=False, color=255, thickness=thickness, lineType=cv2.LINE_AA)
        alpha = mask.astype(np.float32) / 255
        if smear:
            alpha = 0.6 * cv2.GaussianBlur(alpha, (0, 0), 7)
        color = hex_color(palette[int(rng.integers(len(palette)))])
        canvas += alpha[..., None] * (color - canvas)


def paint_item(rng: np.random.Generator, canvas: Floats, item: Item, palette: tuple[str, ...]) -> None:
    """Paint one shape into `canvas` (h, w, 3), in a colour that contrasts with its background."""
    height, width = canvas.shape[:2]
    at, coverage = window(item, width, height)
    alpha = coverage.astype(np.float32)[..., None] / 255
    side = float(np.sqrt(item.coverage.size))
    behind = canvas[at].mean(axis=(0, 1))
    options = [shades(rng, palette, contrast=rng.uniform(18, 48)) for _ in range(12)]
    gaps = [difference((a + b) / np.float32(2), behind) for a, b in options]
    tones = options[next((i for i, gap in enumerate(gaps) if gap > 70), int(np.argmax(gaps)))]

    if rng.random() < 0.45:  # a soft shadow
        shift = rng.uniform(-0.06, 0.06, 2) * side + [0, 1]
        mask = np.zeros((height, width), dtype=np.float32)
        mask[at] = alpha[..., 0]
        moved = cv2.warpAffine(mask, np.array([[1, 0, shift[0]], [0, 1, shift[1]]]), (width, height))
        canvas *= 1 - 0.4 * cv2.GaussianBlur(moved, (0, 0), 1 + 0.03 * side)[..., None]

    texture = fill(rng, item.texture, alpha.shape[:2], period=rng.uniform(5, 9) + 0.06 * side, tones=tones)
    if rng.random() < 0.6 and side > 16:  # a thin line inside the border, so the box stays tight
        inner = cv2.erode(coverage, np.ones((3, 3), dtype=np.uint8)).astype(np.float32)[..., None] / 255
        ink = np.float32(20 if tones[0].mean() > 110 else 235)
        texture += (alpha - inner) * 0.75 * (ink - texture)
    canvas[at] += alpha * (texture - canvas[at])


def paint(seed: int, split: Split, index: int, scene: Scene) -> Bytes:
    """Return the image of a scene: RGB (height, width, 3) in 0..255."""
    plan = PLANS[split]
    rng = np.random.default_rng([seed, plan.code, index, 1])
    shape = (scene.height, scene.width)
    tones = shades(rng, plan.palette, contrast=rng.uniform(12, 36))
    canvas = fill(rng, scene.background, shape, period=rng.uniform(12, 30), tones=tones)
    paint_clutter(rng, canvas, scene.clutter, plan.palette)
    for item in scene.items:
        paint_item(rng, canvas, item, plan.palette)

    gy, gx = np.mgrid[-1 : 1 : scene.height * 1j, -1 : 1 : scene.width * 1j]
    light = 1 + rng.uniform(-0.15, 0.06) + rng.uniform(-0.15, 0.15) * gx + rng.uniform(-0.15, 0.15) * gy
    canvas *= light[..., None].astype(np.float32)
    if rng.random() < 0.5:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 0.9))
    canvas += rng.normal(0, rng.uniform(0, 3.5), canvas.shape).astype(np.float32)
    return np.rint(np.clip(canvas, 0, 255)).astype(np.uint8)


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, list[int]]:
    """Return COCO's uncompressed RLE of a mask (h, w), as COCO uses it for crowds: by columns, zeros first."""
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(pixels, prepend=False, append=not pixels[-1]))
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0).tolist()}


def annotate(scene: Scene, image_id: int) -> Iterator[dict[str, Any]]:
    """Yield the COCO annotations of a scene, without ids; box and area are those of the visible pixels."""
    for number, instance in enumerate(scene.instances):
        mask = np.isin(scene.owner, [i for i, item in enumerate(scene.items) if item.instance == number])
        ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x, y = int(xs[0]), int(ys[0])
        record = {
            "image_id": image_id,
            "category_id": CATEGORY_IDS[instance.category],
            "bbox": [x, y, int(xs[-1]) + 1 - x, int(ys[-1]) + 1 - y],
            "area": int(mask.sum()),
            "iscrowd": int(instance.is_crowd),
        }
        yield record | ({"segmentation": run_lengths(mask)} if instance.is_crowd else {})


def generate(seed: int, split: Split, limit: int | None = None) -> tuple[dict[str, Any], list[Scene]]:
    """Return one split's COCO dictionary and the scenes of its images; `limit`: only the first images."""
    scenes = [compose(seed, split, index, content) for index, content in enumerate(distribute(seed, split)[:limit])]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, scene in enumerate(scenes):
        image_id = PLANS[split].code * 1000 + index + 1
        textures = sorted({scene.background, *(item.texture for item in scene.items)})
        size = {"width": scene.width, "height": scene.height}
        images.append({"id": image_id, "file_name": f"{image_id:06d}.jpg", **size, "license": 1, "textures": textures})
        for record in annotate(scene, image_id):
            annotations.append({"id": PLANS[split].code * 10000 + len(annotations) + 1, **record})
    coco = {
        "info": {
            "description": f"shapes, {split}: textured shapes made by data/shapes/make.py --seed {seed}",
            "version": "1.0",
            "year": 2026,
            "contributor": "the detector project",
            "url": "",
            "date_created": "2026-01-01",
        },
        "licenses": [{"id": 1, "name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}],
        "categories": [{"id": i, "name": name, "supercategory": "shape"} for name, i in CATEGORY_IDS.items()],
        "images": images,
        "annotations": annotations,
    }
    return coco, scenes


def to_json(coco: dict[str, Any]) -> str:
    """Return compact JSON with one record per line, for readable diffs."""
    parts = []
    for key, value in coco.items():
        rows = [json.dumps(row, separators=(",", ":")) for row in (value if isinstance(value, list) else [])]
        body = "[\n" + ",\n".join(rows) + "\n]" if isinstance(value, list) else json.dumps(value)
        parts.append(f"{json.dumps(key)}:{body}")
    return "{" + ",\n".join(parts) + "}\n"


def contact_sheet(images: list[Bytes], cocos: list[dict[str, Any]], columns: int = 6) -> Image.Image:
    """Return all images with their boxes (crowds in red) on one sheet; `cocos` list the same images in this order."""
    tile = max(max(size) for size in IMAGE_SIZES)
    sheet = Image.new("RGB", (tile * columns, tile * -(-len(images) // columns)), "white")
    names = {i: name for name, i in CATEGORY_IDS.items()}
    records = [(record, coco["annotations"]) for coco in cocos for record in coco["images"]]
    for number, (pixels, (image, annotations)) in enumerate(zip(images, records, strict=True)):
        shown = Image.fromarray(pixels)
        draw = ImageDraw.Draw(shown)
        for record in (a for a in annotations if a["image_id"] == image["id"]):
            x, y, w, h = record["bbox"]
            draw.rectangle((x, y, x + w - 1, y + h - 1), outline="red" if record["iscrowd"] else "lime")
            draw.text((x + 2, y), names[record["category_id"]], fill="white", stroke_width=1, stroke_fill="black")
        sheet.paste(shown, (number % columns * tile, number // columns * tile))
    return sheet


def main(argv: list[str] | None = None) -> int:
    """Write the dataset; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("data/shapes"),
        metavar="DIR",
        help="folder to write (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the dataset (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="write only N images per split (default: all)")
    parser.add_argument(
        "--preview",
        type=Path,
        metavar="FILE",
        help="also write a contact sheet of 24 images per split with boxes (default: none)",
    )
    args = parser.parse_args(argv)
    shown: list[Bytes] = []
    shown_cocos: list[dict[str, Any]] = []
    total = 0
    for split in PLANS:
        coco, scenes = generate(args.seed, split, args.limit)
        folder = args.output_dir / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        stale = sorted({path.name for path in folder.iterdir()} - {image["file_name"] for image in coco["images"]})
        if stale:
            print(
                f"error: {folder} must contain only files of this split, got {', '.join(stale[:5])}; remove them",
                file=sys.stderr,
            )
            return 2
        for index, (scene, image) in enumerate(zip(scenes, coco["images"], strict=True)):
            pixels = paint(args.seed, split, index, scene)
            path = folder / image["file_name"]
            Image.fromarray(pixels).save(path, quality=JPEG_QUALITY, optimize=True)
            total += path.stat().st_size
            if args.preview and index < 24:
                shown.append(pixels)
        shown_cocos.append(coco | {"images": coco["images"][:24]})
        path = args.output_dir / "annotations" / f"{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(to_json(coco), encoding="utf-8")
        total += path.stat().st_size
        print(f"{split}: {len(scenes)} images, {len(coco['annotations'])} annotations")
    print(f"{args.output_dir}: {total / 1e6:.2f} MB")
    if args.preview:
        contact_sheet(shown, shown_cocos).save(args.preview)
    return 0


if __name__ == "__main__":
    sys.exit(main())
