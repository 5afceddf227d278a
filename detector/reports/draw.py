"""Draw ground truth and detections on images, readable at any image size and object density."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from detector.structures import Detections

Color = tuple[int, int, int]
Numbers = ArrayLike | Tensor
ImageLike = NDArray[np.uint8] | Image.Image
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MIN_SIDE = 560
"""Pixels: an image whose longer side is shorter is enlarged by an integer factor, to make its labels readable."""
MAX_COVER = 0.15
"""The share of an object that a label may hide before it is shortened or omitted."""
MAX_LABELS = 200
"""Objects beyond these get no label: nobody could read them all, and placing them takes quadratic time."""
PALETTE_SIZE = 128
INK: Color = (20, 20, 24)
PAPER: Color = (245, 245, 245)
GREY: Color = (150, 150, 150)


@lru_cache(maxsize=1)
def _palette() -> list[Color]:
    """Colours that are each the farthest in Oklab (Ottosson, 2020) from grey and from all before it.

    So the first n are well separated for every n, and none resembles an ignored region.
    """
    steps = np.linspace(0, 255, 18).round()
    rgb = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    linear = np.where(rgb <= 10, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    lms = linear @ np.array([[0.4122, 0.2119, 0.0883], [0.5363, 0.6807, 0.2817], [0.0514, 0.1074, 0.6300]])
    lab = np.cbrt(lms) @ np.array([[0.2105, 1.9780, 0.0259], [0.7936, -2.4286, 0.7828], [-0.0041, 0.4506, -0.8087]])
    lightness, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    clear = (lightness > 0.6) & (lightness < 0.92) & (chroma > 0.1) & (chroma < 0.22)
    rgb, lab = rgb[clear], lab[clear] * (0.7, 1, 1)  # on a photo, hue is easier to distinguish than lightness
    distance = np.linalg.norm(lab - (0.7 * 0.67, 0, 0), axis=1)
    colors: list[Color] = []
    for _ in range(PALETTE_SIZE):
        farthest = distance.argmax()
        colors.append(tuple(rgb[farthest].astype(int).tolist()))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[farthest], axis=1))
    return colors


def class_color(label: int) -> Color:
    """The RGB colour of a class, the same in every run and dataset; colours repeat after PALETTE_SIZE classes.

    Raises:
        ValueError: a negative label.
    """
    if label < 0:
        raise ValueError(f"label must be 0 or more, got {label}")
    return _palette()[label % PALETTE_SIZE]


def _text_color(background: Color) -> Color:
    """Dark or light, whichever has more contrast with the background (by Rec. 709 luma)."""
    return INK if np.dot(background, (0.2126, 0.7152, 0.0722)) > 120 else PAPER


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow's wheels come with FreeType"
    return font


def _to_ascii(text: str, fallback: str) -> str:
    """Convert text to ASCII, which is all that Pillow's own font draws: no accents, ? for other scripts.

    Returns `fallback` if no readable character is left.
    """
    plain = [c for c in unicodedata.normalize("NFKD", text[:200]) if not unicodedata.combining(c)]
    shown = "".join(c if c.isascii() and c.isprintable() else " " if c.isspace() else "?" for c in plain)
    return shown.strip() if any(c.isascii() and not c.isspace() for c in plain) else fallback


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Shorten text wider than `width` pixels with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _to_rgb(image: ImageLike) -> Image.Image:
    """Copy an image as RGB."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image must be uint8 (H, W, 3) and not empty, got {image.dtype} {image.shape}")
    return Image.fromarray(np.ascontiguousarray(image)).copy()


def _validated(what: str, values: Numbers, shape: tuple[int, ...]) -> Floats:
    """Convert finite values to float64 of this shape, where -1 is any length; else raise ValueError."""
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    array = array.reshape(0, *shape[1:]) if array.size == 0 else array
    if array.ndim != len(shape) or any(want not in (-1, got) for want, got in zip(shape, array.shape, strict=True)):
        raise ValueError(f"{what} must have the shape {shape} (-1: any length), got {array.shape}")
    bad = np.unique(np.argwhere(~np.isfinite(array))[:, 0])
    if len(bad):
        raise ValueError(f"{what} must be finite, got {array[bad[0]].tolist()} at index {bad[0]} ({len(bad)} such)")
    return array


def _visible(boxes: Floats, size: tuple[int, int]) -> tuple[Ints, Ints]:
    """The boxes that touch an image of this width and height, (N', 4) clipped and rounded, and their indices (N',)."""
    boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
    kept = np.flatnonzero(((boxes[:, :2] <= size) & (boxes[:, 2:] >= 0)).all(axis=1))
    return boxes[kept].clip(0, size * 2).round().astype(np.int64), kept


def _overlap(a: Floats, b: Floats) -> Floats:
    """(N, M): intersection areas of (N, 4) with (M, 4) boxes."""
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    return np.asarray(sides.clip(0).prod(axis=2))


def place_labels(boxes: Floats, widths: Floats, height: int, size: tuple[int, int]) -> tuple[Ints, Ints]:
    """Place each label, greedily in the given order: above its box, below, inside, or at its left or right.

    Args:
        boxes: (N, 4) xyxy, the objects.
        widths: (N, T) widths of the T alternative texts, preferred first.
        height: height of every label.
        size: width and height of the image, which no label exceeds.

    Returns:
        (N,) index of the text, -1 where none can be placed without covering another label or more than MAX_COVER of an
        object; and (N, 4) xyxy of the label, zeros where there is none.
    """
    choice = np.full(len(boxes), -1)
    placed = np.zeros((len(boxes), 4))
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1).clip(1)
    for i, (x1, y1, x2, y2) in enumerate(boxes[:MAX_LABELS]):
        for text, width in enumerate(widths[i]):
            if width > size[0] or height > size[1]:
                continue
            left, right, above, below = x1 - width, x2 - width, y1 - height, y2 - height
            outside = [[x1, above], [right, above], [x1, y2], [right, y2]]
            inside = [[x1, y1], [right, y1], [x1, below], [right, below]]
            next_to = [[x2, y1], [left, y1], [x2, below], [left, below]]
            corners = np.array([*outside, *inside, *next_to])
            corners = corners.clip(0, (size[0] - width, size[1] - height)).round()
            spots = np.concatenate([corners, corners + np.array([width, height])], axis=1)
            spots = spots[~(_overlap(spots, placed[:i]) > 0).any(axis=1)]
            covered = (_overlap(spots, boxes) / areas).max(axis=1)
            if len(spots) and covered.min() <= MAX_COVER:
                # the first spot that hides at most 2 % of any object, else the one that hides least
                choice[i], placed[i] = text, spots[covered.clip(0.02).argmin()]
                break
    return choice, placed.astype(np.int64)


def _hatch(canvas: Image.Image, box: list[int], line: int) -> None:
    """Draw grey stripes and a frame over an ignored region."""
    x1, y1, x2, y2 = box[0], box[1], max(box[2], box[0] + 1), max(box[3], box[1] + 1)
    stripes = np.add.outer(np.arange(y2 - y1), np.arange(x2 - x1)) % (10 * line) < 2 * line
    canvas.paste(GREY, (x1, y1), Image.fromarray((stripes * 120).astype(np.uint8)))
    ImageDraw.Draw(canvas).rectangle((x1, y1, x2 - 1, y2 - 1), outline=GREY, width=line)


def _draw_frames(canvas: Image.Image, objects: Ints, classes: Ints, line: int) -> Ints:
    """Draw frames around objects (N, 4), the first on top, and return their outer edges (N, 4).

    Lines are `line` pixels wide, and thinner on small objects, so that they do not cover the surroundings. Each has a
    dark line on both sides.
    """
    sides = objects[:, 2:] - objects[:, :2]
    lines = (sides.min(axis=1, initial=6 * line) // 6).clip(1)
    edges = (lines // 3).clip(1)
    outset = (lines + 2 * edges)[:, None]
    outer = np.concatenate([(objects[:, :2] - outset).clip(0), (objects[:, 2:] + outset).clip(0, canvas.size)], axis=1)
    draw = ImageDraw.Draw(canvas)
    for i in range(len(objects) - 1, -1, -1):
        (x1, y1, x2, y2), width, edge = outer[i].tolist(), int(lines[i]), int(edges[i])
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=INK, width=width + 2 * edge)
        if min(x2 - x1, y2 - y1) > 2 * edge:
            inner = (x1 + edge, y1 + edge, x2 - 1 - edge, y2 - 1 - edge)
            draw.rectangle(inner, outline=class_color(int(classes[i])), width=width)
    return outer


def _caption(text: str, width: int, size: int) -> Image.Image:
    """Create a strip with a line of text."""
    strip = Image.new("RGB", (width, 2 * size), INK)
    text = _fit(_to_ascii(text, ""), _font(size), width - size)
    ImageDraw.Draw(strip).text((size // 2, size), text, PAPER, _font(size), anchor="lm")
    return strip


def _legend(labels: Ints, names: dict[int, str], width: int, rows: int, size: int) -> Image.Image:
    """Create a strip of at most `rows` rows with colour, name and number of objects of the most frequent classes."""
    font, row = _font(size), round(1.6 * size)
    entries = [(class_color(k), f"{names[k]}  {n}") for k, n in Counter(labels.tolist()).most_common()]
    column = 3 * size + math.ceil(max(font.getlength(text) for _, text in entries))
    columns = max(1, width // column)
    hidden = len(entries) - rows * columns
    if hidden > 0:
        entries[rows * columns - 1 :] = [(INK, f"and {hidden + 1} more")]
    strip = Image.new("RGB", (width, math.ceil(len(entries) / columns) * row + size), INK)
    draw = ImageDraw.Draw(strip)
    for i, (color, text) in enumerate(entries):
        x, y = size // 2 + i % columns * column, size // 2 + i // columns * row + row // 2
        draw.rectangle((x, y - size // 2, x + size, y + size // 2), fill=color)
        draw.text((x + round(1.5 * size), y), text, PAPER, font, anchor="lm")
    return strip


def _concat(images: Sequence[Image.Image], *, down: bool, gap: int = 0) -> Image.Image:
    """Concatenate images horizontally or (`down`) vertically."""
    sizes = np.array([image.size for image in images])
    total, widest = sizes.sum(axis=0) + gap * (len(images) - 1), sizes.max(axis=0)
    size = (widest[0], total[1]) if down else (total[0], widest[1])
    sheet = Image.new("RGB", (int(size[0]), int(size[1])), INK)
    offset = 0
    for image in images:
        sheet.paste(image, (0, offset) if down else (offset, 0))
        offset += gap + (image.height if down else image.width)
    return sheet


def draw_boxes(
    image: ImageLike,
    boxes: Numbers,
    labels: Numbers,
    names: Sequence[str],
    *,
    scores: Numbers | None = None,
    ignore_boxes: Numbers | None = None,
    title: str | None = None,
) -> Image.Image:
    """Draw objects on a copy of an image; lines and letters scale with it.

    Without scores the boxes are ground truth: dark labels, smaller objects on top. With scores they are detections:
    labels filled with the class colour, higher scores on top. A label that would hide another or an object shows only
    its score or is omitted; a legend below the image then names the classes. Boxes outside the image are not drawn.

    Args:
        image: (H, W, 3) uint8 RGB, or a PIL image. Enlarged by an integer factor if smaller than MIN_SIDE.
        boxes: (N, 4) xyxy in the image's pixels.
        labels: (N,) integers in 0..len(names)-1.
        names: class names; one without a letter that the font can draw is shown as # and its label.
        scores: (N,), or None for ground truth.
        ignore_boxes: (R, 4) ignore regions, hatched grey.
        title: a line of text above the image.

    Returns:
        An RGB image; an unchanged copy if there is nothing to draw and no title.

    Raises:
        ValueError: mismatched shapes, numbers that are not finite, or labels without a name.
    """
    canvas = _to_rgb(image)
    boxes = _validated("boxes", boxes, (-1, 4))
    labels = _validated("labels", labels, (len(boxes),))
    bad = np.flatnonzero((labels < 0) | (labels >= len(names)) | (labels != labels.round()))
    if len(bad):
        rule = f"integers in 0..{len(names) - 1} (there are {len(names)} names)"
        raise ValueError(f"labels must be {rule}, got {labels[bad[0]]:g} at index {bad[0]} ({len(bad)} such)")
    scores = None if scores is None else _validated("scores", scores, (len(boxes),))
    ignored = _validated("ignore_boxes", () if ignore_boxes is None else ignore_boxes, (-1, 4))
    if not len(boxes) and not len(ignored) and title is None:
        return canvas

    factor = max(1, math.ceil(MIN_SIDE / max(canvas.size)))
    if factor > 1:
        canvas = canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.BICUBIC)
    unit = math.sqrt(canvas.width * canvas.height)
    size, line = max(12, round(unit / 54)), max(2, round(unit / 320))
    for box in _visible(ignored * factor, canvas.size)[0].tolist():
        _hatch(canvas, box, line)

    objects, kept = _visible(boxes * factor, canvas.size)
    areas = (objects[:, 2:] - objects[:, :2]).prod(axis=1)
    order = np.argsort(areas if scores is None else -scores[kept], kind="stable")
    objects, kept = objects[order], kept[order]
    classes = labels[kept].astype(np.int64)
    outer = _draw_frames(canvas, objects, classes, line)

    font, pad = _font(size), max(3, size // 4)
    short = {k: _fit(_to_ascii(names[k], f"#{k}"), font, canvas.width / 3) for k in classes.tolist()}
    texts = [[short[k]] for k in classes.tolist()]
    if scores is not None:
        texts = [[f"{name} {score:.2f}", f"{score:.2f}"] for (name,), score in zip(texts, scores[kept], strict=True)]
    widths = np.array([[math.ceil(font.getlength(t)) + 2 * pad for t in choices] for choices in texts], dtype=float)
    choice, places = place_labels(outer.astype(np.float64), widths, sum(font.getmetrics()), canvas.size)
    draw = ImageDraw.Draw(canvas)
    for i in np.flatnonzero(choice >= 0).tolist():
        color, (x1, y1, x2, y2) = class_color(int(classes[i])), places[i].tolist()
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), INK if scores is None else color, color, line // 2)
        draw.text((x1 + pad, y1), texts[i][choice[i]], PAPER if scores is None else _text_color(color), font)

    strips = [] if title is None else [_caption(title, canvas.width, size)]
    strips.append(canvas)
    if (choice != 0).any():
        strips.append(_legend(classes, short, canvas.width, max(2, canvas.height // (6 * size)), size))
    return _concat(strips, down=True)


def draw_detections(
    image: ImageLike,
    detections: Detections,
    names: Sequence[str],
    *,
    score_thresh: float = 0.0,
    ignore_boxes: Numbers | None = None,
    title: str | None = None,
) -> Image.Image:
    """Draw the detections that score at least `score_thresh`; see `draw_boxes`."""
    kept = ~(detections.scores < score_thresh)  # written so that NaN is kept, and refused by draw_boxes
    boxes, labels, scores = detections.boxes[kept], detections.labels[kept], detections.scores[kept]
    return draw_boxes(image, boxes, labels, names, scores=scores, ignore_boxes=ignore_boxes, title=title)


def side_by_side(
    image: ImageLike,
    detections: Detections,
    gt_boxes: Numbers,
    gt_labels: Numbers,
    names: Sequence[str],
    *,
    ignore_boxes: Numbers | None = None,
    score_thresh: float = 0.3,
) -> Image.Image:
    """Draw ground truth on the left and detections that score at least `score_thresh` on the right, with titles.

    Shapes and errors as in `draw_boxes`.
    """
    gt_boxes = _validated("gt_boxes", gt_boxes, (-1, 4))
    title = f"ground truth: {len(gt_boxes)}"
    left = draw_boxes(image, gt_boxes, gt_labels, names, ignore_boxes=ignore_boxes, title=title)
    title = f"detections: {int((detections.scores >= score_thresh).sum())} (score >= {score_thresh:g})"
    right = draw_detections(image, detections, names, score_thresh=score_thresh, ignore_boxes=ignore_boxes, title=title)
    return _concat([left, right], down=False, gap=max(2, left.width // 100))
