"""Post-processing against torchvision's, and its limits."""

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
from detector.inference.postprocess import _above, _best_candidates, as_detections, best_of_batch, postprocess
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


def test_nothing_above_the_threshold_gives_empty_detections() -> None:
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
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.boxes, theirs["boxes"], rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.scores, theirs["scores"], rtol=0, atol=1e-6)
        assert torch.equal(ours.labels, theirs["labels"])


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=50), st.floats(0, 1), st.booleans(), st.integers(1, 60)
)
@settings(max_examples=200, deadline=None)
def test_candidates_are_the_best_scores_above_the_threshold(
    logits: list[float], threshold: float, near: bool, topk: int
) -> None:
    everyone = torch.sigmoid(torch.tensor(logits))
    if near:  # between an entry's score and its neighbours
        threshold = everyone[0].item() * (1 + (threshold - 0.5) * 1e-6)
    scores, entries = _best_candidates(torch.tensor(logits).view(-1, 1), threshold, topk)
    # The last bit of a sigmoid may depend on its place in a tensor: some processors compute the rest of a vector otherwise.
    bit = 2.4e-7
    torch.testing.assert_close(scores, everyone[entries], rtol=bit, atol=0)
    assert bool((scores > threshold).all())
    assert bool((scores.diff() <= 0).all())
    assert len(set(entries.tolist())) == len(entries) <= topk
    left = torch.ones(len(everyone), dtype=torch.bool)
    left[entries] = False
    enough = scores.min() if len(scores) == topk else torch.tensor(threshold)
    assert bool((everyone[left] <= enough * (1 + bit)).all())


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


def test_overlapping_boxes_are_thinned_within_a_class_and_not_across_classes() -> None:
    boxes = [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 9.5]]
    outputs = single(boxes, [[2.0, -9.0], [1.0, -9.0], [-9.0, 0.0]])
    found = postprocess(outputs, torch.tensor([[60, 60]]))[0]
    assert found.labels.tolist() == [0, 1]
    torch.testing.assert_close(found.boxes, torch.tensor([boxes[0], boxes[2]]))


def test_detections_come_best_first_and_none_overlaps_a_better_one_of_its_class() -> None:
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


def test_clipping_before_or_after_suppression_can_keep_other_boxes() -> None:
    """Two boxes that reach far out of the picture: as they are they hardly overlap, what is in the picture is the same."""
    outputs = single([[0.0, 0.0, 20.0, 100.0], [0.0, 0.0, 100.0, 20.0]], [[2.0], [1.0]])
    size = torch.tensor([[20, 20]])
    (before,) = postprocess(outputs, size)
    (after,) = postprocess(outputs, size, clip="after_nms")
    assert before.boxes.tolist() == [[0, 0, 20, 20]]
    assert after.boxes.tolist() == [[0, 0, 20, 20]] * 2


@pytest.mark.parametrize("clip", ["before_nms", "after_nms"])
def test_boxes_outside_of_the_picture_are_dropped_if_told(clip: Any) -> None:
    outputs = single([[0.0, 0.0, 10.0, 10.0], [30.0, 0.0, 40.0, 10.0], [0.0, -9.0, 9.0, 0.0]], [[1.0], [2.0], [3.0]])
    size = torch.tensor([[20, 20]])
    (kept,) = postprocess(outputs, size, clip=clip)
    assert len(kept) == 3
    (dropped,) = postprocess(outputs, size, clip=clip, drop_empty=True)
    assert dropped.boxes.tolist() == [[0, 0, 10, 10]]
    assert len(dropped.scores) == len(dropped.labels) == 1


ODD: dict[str, dict[str, Any]] = {
    "as usual": {},
    "few candidates": {"topk_candidates": 20},
    "high threshold": {"score_thresh": 0.6},
    "few places": {"detections_per_img": 7},
    "clipped afterwards": {"clip": "after_nms"},
    "empty boxes dropped": {"drop_empty": True},
    "shrinking bounded": {"bound_shrinking": True},
}


def in_order(found: Detections) -> Detections:
    """Those of the same score from left to right and from top to bottom."""
    order = np.lexsort((found.boxes[:, 1], found.boxes[:, 0], -found.scores))
    return Detections(found.boxes[order], found.scores[order], found.labels[order])


def same_detections(ours: list[Detections], expected: list[Detections], *, atol: float = 1e-4) -> None:
    for mine, theirs in zip(map(in_order, ours), map(in_order, expected), strict=True):
        torch.testing.assert_close(mine.boxes, theirs.boxes, rtol=0, atol=atol)
        torch.testing.assert_close(mine.scores, theirs.scores, rtol=0, atol=1e-6)
        assert torch.equal(mine.labels, theirs.labels)


@pytest.mark.parametrize(
    ("classes", "changed"),
    [*((5, changed) for changed in ODD.values()), (2, {}), (1203, {})],
    ids=[*ODD, "one class or two", "many classes"],
)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_whole_batch_at_once_finds_the_same(classes: int, changed: dict[str, Any], activation: Any) -> None:
    """What a GPU without Triton does, on a CPU."""
    options = {**SETTINGS, "clip": "before_nms", "drop_empty": False, "bound_shrinking": False, **changed}
    outputs = random_outputs((256, 192), batch=3, classes=classes)._replace(activation=activation)
    sizes, originals = torch.tensor([[250, 190], [200, 131], [256, 192]]), torch.tensor([[500, 95], [100, 99], [7, 9]])
    expected = postprocess(outputs, sizes, original_sizes=originals, **options)
    found = as_detections(best_of_batch(outputs, sizes, **options), sizes, originals)
    assert min(map(len, expected)) > 0
    same_detections(found, expected, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("changed", ODD.values(), ids=ODD)
def test_a_gpu_finds_what_a_cpu_finds(changed: dict[str, Any]) -> None:
    options = {**SETTINGS, **changed}
    outputs = random_outputs((256, 192), batch=3)
    on_gpu = HeadOutputs(
        tuple(t.cuda() for t in outputs.cls_logits), tuple(t.cuda() for t in outputs.box_deltas), outputs.anchors.cuda()
    )
    sizes = torch.tensor([[250, 190], [200, 131], [256, 192]])
    same_detections(postprocess(on_gpu, sizes, **options), postprocess(outputs, sizes, **options), atol=1e-3)
