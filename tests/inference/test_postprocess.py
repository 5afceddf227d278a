"""Post-processing against torchvision's and a written-out formula, and its limits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet

from detector.anchors import pyramid_grids
from detector.boxes import pairwise_iou
from detector.config import ModelConfig
from detector.inference.postprocess import _above, _best_candidates, postprocess, postprocess_batched
from detector.models import build_anchors
from detector.structures import Detections, HeadOutputs

SETTINGS: dict[str, Any] = {
    "score_thresh": 0.05,
    "topk_candidates": 1000,
    "nms_thresh": 0.5,
    "detections_per_img": 300,
}


def random_outputs(size: tuple[int, int], batch: int = 2, classes: int = 5, bias: float = -3.0) -> HeadOutputs:
    random = torch.Generator().manual_seed(0)
    grids = pyramid_grids(size)
    anchors = build_anchors(ModelConfig())(size, grids, torch.device("cpu"))
    counts = [h * w * 9 for h, w in grids]
    logits = tuple(torch.randn(batch, n, classes, generator=random) * 1.5 + bias for n in counts)
    deltas = tuple(torch.randn(batch, n, 4, generator=random) * 0.5 for n in counts)
    return HeadOutputs(logits, deltas, anchors)


def no_detections(batch: int = 1) -> HeadOutputs:
    return random_outputs((128, 128), batch, bias=-100.0)


def single(boxes: list[list[float]], logits: list[list[float]]) -> HeadOutputs:
    """One level whose anchors are the boxes themselves."""
    return HeadOutputs((torch.tensor([logits]),), (torch.zeros(1, len(boxes), 4),), torch.tensor(boxes))


def test_no_score_above_the_threshold_gives_empty_detections() -> None:
    found = postprocess(no_detections(2), torch.tensor([[128, 128]] * 2))
    assert [len(d) for d in found] == [0, 0]
    assert found[0].boxes.shape == (0, 4)
    assert found[0].labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("classes", "changed"),
    [
        (5, {}),
        (5, {"topk_candidates": 20}),
        (5, {"score_thresh": 0.3}),
        (5, {"detections_per_img": 7}),
        (1, {}),
        (1203, {}),
    ],
)
def test_detections_equal_torchvisions(classes: int, changed: dict[str, Any]) -> None:
    options = {**SETTINGS, **changed}
    outputs, sizes = random_outputs((256, 192), classes=classes), [(250, 190), (200, 131)]
    model = SimpleNamespace(box_coder=BoxCoder((1.0, 1.0, 1.0, 1.0)), **options)
    levels = list(torch.split(outputs.anchors, [d.shape[1] for d in outputs.box_deltas]))
    heads = {"cls_logits": list(outputs.cls_logits), "bbox_regression": list(outputs.box_deltas)}
    expected = TorchvisionRetinaNet.postprocess_detections(model, heads, [levels] * 2, sizes)
    found = postprocess(outputs, torch.tensor(sizes), **options)
    assert min(len(d) for d in found) >= min(options["detections_per_img"], 70)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.boxes, reference["boxes"], rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.scores, reference["scores"], rtol=0, atol=1e-6)
        assert torch.equal(ours.labels, reference["labels"])


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=50), st.floats(0, 1), st.booleans(), st.integers(1, 60)
)
@settings(max_examples=200, deadline=None)
def test_candidates_are_the_best_scores_above_the_threshold(
    logits: list[float], threshold: float, near: bool, topk: int
) -> None:
    all_scores = torch.sigmoid(torch.tensor(logits))
    if near:  # between an entry's score and its neighbours
        threshold = all_scores[0].item() * (1 + (threshold - 0.5) * 1e-6)
    scores, entries = _best_candidates(torch.tensor(logits).view(-1, 1), threshold, topk)
    # The last bit of a sigmoid may depend on its position: some processors compute a vector's remainder differently.
    bit = 2.4e-7
    torch.testing.assert_close(scores, all_scores[entries], rtol=bit, atol=0)
    assert bool((scores > threshold).all())
    assert bool((scores.diff() <= 0).all())
    assert len(set(entries.tolist())) == len(entries) <= topk
    left = torch.ones(len(all_scores), dtype=torch.bool)
    left[entries] = False
    enough = scores.min() if len(scores) == topk else torch.tensor(threshold)
    assert bool((all_scores[left] <= enough * (1 + bit)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 5, 16, 1000, 1003])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_entries_above_a_threshold_are_found_by_blocks(
    dtype: torch.dtype, length: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detector.inference.postprocess.BLOCK", 8)
    random = torch.Generator().manual_seed(0)
    flat = torch.where(torch.rand(length, generator=random) < share, 1.0, -3.0).to(dtype)
    flat[::100], flat[1::200] = float("nan"), 1.0  # is above nothing, and hides no neighbour
    assert _above(flat, 0.1).tolist() == [i for i, x in enumerate(flat.tolist()) if x > 0.1]


@pytest.mark.parametrize(("threshold", "count"), [(0.0, 3), (0.5, 1), (1.0, 0)])
def test_threshold_is_exclusive_and_may_be_zero_or_one(threshold: float, count: int) -> None:
    boxes = [[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0], [40.0, 40.0, 50.0, 50.0]]
    outputs = single(boxes, [[3.0], [0.0], [-3.0]])  # sigmoid(0) is exactly 0.5
    assert len(postprocess(outputs, torch.tensor([[60, 60]]), score_thresh=threshold)[0]) == count


def test_overlapping_boxes_are_suppressed_within_a_class_and_not_across_classes() -> None:
    boxes = [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 9.5]]
    outputs = single(boxes, [[2.0, -9.0], [1.0, -9.0], [-9.0, 0.0]])
    found = postprocess(outputs, torch.tensor([[60, 60]]))[0]
    assert found.labels.tolist() == [0, 1]
    torch.testing.assert_close(found.boxes, torch.tensor([boxes[0], boxes[2]]))


def test_detections_are_sorted_and_none_overlaps_a_better_one_of_its_class() -> None:
    found = postprocess(random_outputs((256, 256), 1), torch.tensor([[256, 256]]), **SETTINGS)[0]
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)
    same = found.labels[:, None] == found.labels[None]
    assert (pairwise_iou(found.boxes, found.boxes) * same).fill_diagonal_(0).max() <= 0.5


def test_boxes_are_clipped_to_each_image_and_scaled_to_its_original_size() -> None:
    outputs = random_outputs((256, 256))
    sizes = torch.tensor([[256, 200], [128, 256]])
    originals = torch.tensor([[512, 400], [64, 64]])
    plain = postprocess(outputs, sizes, **SETTINGS)
    scaled = postprocess(outputs, sizes, original_sizes=originals, **SETTINGS)
    for one, other, (height, width), factors in zip(
        plain, scaled, sizes.tolist(), ([2.0, 2.0, 2.0, 2.0], [0.25, 0.5, 0.25, 0.5]), strict=True
    ):
        assert (one.boxes >= 0).all()
        assert (one.boxes[:, 2] <= width).all()
        assert (one.boxes[:, 3] <= height).all()
        torch.testing.assert_close(other.boxes, one.boxes * torch.tensor(factors))
        assert torch.equal(other.scores, one.scores)


def test_half_precision_outputs_give_fp32_detections() -> None:
    outputs = random_outputs((128, 128), 1)
    half = HeadOutputs(
        tuple(t.bfloat16() for t in outputs.cls_logits),
        tuple(t.bfloat16() for t in outputs.box_deltas),
        outputs.anchors,
    )
    found = postprocess(half, torch.tensor([[128, 128]]))[0]
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert len(found) == 100


def test_detections_refuse_parts_of_different_lengths() -> None:
    with pytest.raises(ValueError, match=r"must have boxes \(N, 4\), scores \(N,\) and labels \(N,\), got"):
        Detections(torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, dtype=torch.int64))


def test_clipping_before_or_after_nms_can_keep_other_boxes() -> None:
    """Two boxes mostly outside the image: they hardly overlap before clipping, and are equal after it."""
    outputs = single([[0.0, 0.0, 20.0, 100.0], [0.0, 0.0, 100.0, 20.0]], [[2.0], [1.0]])
    size = torch.tensor([[20, 20]])
    (before,) = postprocess(outputs, size)
    (after,) = postprocess(outputs, size, clip="after_nms")
    assert before.boxes.tolist() == [[0, 0, 20, 20]]
    assert after.boxes.tolist() == [[0, 0, 20, 20]] * 2


@pytest.mark.parametrize("clip", ["before_nms", "after_nms"])
def test_boxes_outside_the_image_are_dropped_with_drop_empty(clip: Any) -> None:
    outputs = single([[0.0, 0.0, 10.0, 10.0], [30.0, 0.0, 40.0, 10.0], [0.0, -9.0, 9.0, 0.0]], [[1.0], [2.0], [3.0]])
    size = torch.tensor([[20, 20]])
    (kept,) = postprocess(outputs, size, clip=clip)
    assert len(kept) == 3
    (dropped,) = postprocess(outputs, size, clip=clip, drop_empty=True)
    assert dropped.boxes.tolist() == [[0, 0, 10, 10]]
    assert len(dropped.scores) == len(dropped.labels) == 1


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "few candidates": {"topk_candidates": 20},
    "high threshold": {"score_thresh": 0.6},
    "few detections": {"detections_per_img": 7},
    "clipped after NMS": {"clip": "after_nms"},
    "empty boxes dropped": {"drop_empty": True},
    "shrinking is bounded": {"bound_shrinking": True},
}


def in_order(found: Detections) -> Detections:
    """Sort detections of equal score from left to right and from top to bottom."""
    order = np.lexsort((found.boxes[:, 1], found.boxes[:, 0], -found.scores))
    return Detections(found.boxes[order], found.scores[order], found.labels[order])


def same_detections(ours: list[Detections], expected: list[Detections], *, atol: float = 1e-4) -> None:
    for a, b in zip(map(in_order, ours), map(in_order, expected), strict=True):
        torch.testing.assert_close(a.boxes, b.boxes, rtol=0, atol=atol)
        torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-6)
        assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize(
    ("classes", "changed"),
    [*((5, changed) for changed in VARIANTS.values()), (2, {}), (1203, {})],
    ids=[*VARIANTS, "one class or two", "many classes"],
)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_batched_path_gives_the_same_detections(classes: int, changed: dict[str, Any], activation: Any) -> None:
    """The code for a GPU without Triton, on a CPU."""
    options = {**SETTINGS, "clip": "before_nms", "drop_empty": False, "bound_shrinking": False, **changed}
    outputs = random_outputs((256, 192), batch=3, classes=classes)._replace(activation=activation)
    sizes, originals = torch.tensor([[250, 190], [200, 131], [256, 192]]), torch.tensor([[500, 95], [100, 99], [7, 9]])
    expected = postprocess(outputs, sizes, original_sizes=originals, **options)
    found = postprocess_batched(outputs, sizes, **options).unpack(sizes, originals)
    assert min(map(len, expected)) > 0
    same_detections(found, expected, atol=1e-3)


def written_out(outputs: HeadOutputs, image: int, size: tuple[int, int], *, score_thresh: float) -> list[list[float]]:
    """Scores, labels and boxes by the formulas, one anchor at a time, before NMS, best first.

    The class probability is p = sigmoid(x), or the softmax without its last class; the score is p * sigmoid(quality).
    A side lies at the expected value of its softmax over 0, 1, 2, ..., in eighths of the anchor's size from its centre.
    """
    found = []
    assert outputs.quality is not None
    logits, deltas = outputs.all_cls_logits()[image].double(), outputs.all_box_deltas()[image].double()
    quality = torch.cat(outputs.quality, dim=1)[image].double()
    p = logits.softmax(dim=1)[:, :-1] if outputs.activation == "softmax" else logits.sigmoid()
    scores = p * quality.sigmoid()
    for anchor, label in (scores > score_thresh).nonzero().tolist():
        x1, y1, x2, y2 = outputs.anchors[anchor].double().tolist()
        sides = deltas[anchor].view(4, -1).softmax(dim=1)
        left, top, right, bottom = (sides * torch.arange(sides.shape[1])).sum(dim=1).tolist()
        x, y, w, h = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 8, (y2 - y1) / 8
        box = [
            min(max(x - left * w, 0), size[1]), min(max(y - top * h, 0), size[0]),
            min(max(x + right * w, 0), size[1]), min(max(y + bottom * h, 0), size[0]),
        ]  # fmt: skip
        found.append([scores[anchor, label].item(), label, *box])
    return sorted(found, reverse=True)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_quality_and_distributions_are_used_on_both_paths_as_written_out(activation: Any) -> None:
    random = torch.Generator().manual_seed(1)
    plain = random_outputs((64, 64), batch=2, classes=4, bias=-2.0)
    counts = [level.shape[1] for level in plain.cls_logits]
    outputs = plain._replace(
        box_deltas=tuple(torch.randn(2, n, 4 * 9, generator=random) * 2 for n in counts),
        quality=tuple(torch.randn(2, n, 1, generator=random) for n in counts),
        activation=activation,
    )
    sizes = torch.tensor([[60, 64], [64, 50]])
    options: dict[str, Any] = {"score_thresh": 0.1, "topk_candidates": 10_000, "detections_per_img": 10_000}
    found = postprocess(outputs, sizes, **options, nms_thresh=1.0)  # suppresses nothing
    for image, size in enumerate([(60, 64), (64, 50)]):
        expected = torch.tensor(written_out(outputs, image, size, score_thresh=0.1))
        assert len(found[image]) == len(expected) > 100
        torch.testing.assert_close(found[image].scores, expected[:, 0], rtol=1e-5, atol=1e-6)
        assert (found[image].labels == expected[:, 1]).float().mean() > 0.99  # near-ties may be in another order
        same = (found[image].labels == expected[:, 1])[:, None]
        torch.testing.assert_close(found[image].boxes * same, expected[:, 2:] * same, rtol=0, atol=1e-3)
    options["detections_per_img"] = 50
    batched = postprocess_batched(outputs, sizes, **options, nms_thresh=0.5).unpack(sizes, None)
    same_detections(batched, postprocess(outputs, sizes, **options, nms_thresh=0.5), atol=1e-3)
    without = postprocess(outputs._replace(quality=None), sizes, **options, nms_thresh=0.5)
    assert without[0].scores[0] > batched[0].scores[0], "a product with a probability is lower"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("changed", VARIANTS.values(), ids=VARIANTS)
def test_a_gpu_gives_the_detections_of_a_cpu(changed: dict[str, Any]) -> None:
    options = {**SETTINGS, **changed}
    outputs = random_outputs((256, 192), batch=3)
    on_gpu = HeadOutputs(
        tuple(t.cuda() for t in outputs.cls_logits), tuple(t.cuda() for t in outputs.box_deltas), outputs.anchors.cuda()
    )
    sizes = torch.tensor([[250, 190], [200, 131], [256, 192]])
    same_detections(postprocess(on_gpu, sizes, **options), postprocess(outputs, sizes, **options), atol=1e-3)
