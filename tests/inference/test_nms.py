"""NMS of one image and of a whole batch against torchvision's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from detector.inference import nms
from detector.inference.nms import class_nms, suppress

with_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with torch for CUDA on Linux")

CASES = {
    # batch, boxes, candidates among them, classes, limit
    "no candidates": (2, 300, [0, 0], 3, 10),
    "one box": (1, 1, [1], 1, 5),
    "more than the limit": (3, 150, [150, 60, 0], 4, 20),
    "fewer than the limit": (2, 64, [64, 10], 2, 100),
    "a single class": (1, 250, [250], 1, 150),
}


def candidates(batch: int, count: int, live: list[int], classes: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(batch, count, 2, generator=random) * 200
    boxes = torch.cat([corner, corner + 5 + torch.rand(batch, count, 2, generator=random) * 60], dim=2)
    scores = torch.rand(batch, count, generator=random).sort(dim=1, descending=True).values
    for row, number in zip(scores, live, strict=True):
        row[number:] = -torch.inf
    return boxes, scores, torch.randint(0, classes, (batch, count), generator=random)


def check(suppress: Callable[..., Tensor], device: str) -> None:
    """Every case equals torchvision's result."""
    for batch, count, live, classes, limit in CASES.values():
        boxes, scores, labels = candidates(batch, count, live, classes)
        kept = suppress(boxes.to(device), scores.to(device), labels.to(device), nms_thresh=0.5, limit=limit).cpu()
        assert kept.shape == (batch, limit)
        for i, number in enumerate(live):
            expected = batched_nms(boxes[i, :number], scores[i, :number], labels[i, :number], 0.5)[:limit]
            assert torch.equal(kept[i], torch.nn.functional.pad(expected, (0, limit - len(expected)), value=-1))


def check_kernel(device: str) -> None:
    from detector.inference.nms_kernel import suppress_in_one_kernel

    check(suppress_in_one_kernel, device)


def test_the_plain_path_keeps_what_torchvision_keeps() -> None:
    check(suppress, "cpu")


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 3000])
def test_class_nms_equals_torchvisions(count: int) -> None:
    boxes, scores, labels = (part[0] for part in candidates(1, count, [count], 7))
    kept = class_nms(boxes, scores, labels, nms_thresh=0.5)
    assert kept.dtype == torch.int64
    assert torch.equal(kept, batched_nms(boxes, scores, labels, 0.5))


def test_an_iou_equal_to_the_threshold_suppresses_nothing() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0], [0.0, 0.0, 10.0, 5.1]]])
    kept = suppress(
        boxes, torch.tensor([[0.9, 0.8, 0.7]]), torch.zeros(1, 3, dtype=torch.int64), nms_thresh=0.5, limit=3
    )
    assert kept.tolist() == [[0, 1, -1]]


@with_triton
def test_the_kernel_keeps_what_torchvision_keeps() -> None:
    """In Triton's interpreter, which must be selected before the kernel is imported."""
    code = "from tests.inference.test_nms import check_kernel; check_kernel('cpu')"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@with_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("block", "warps"), [(128, 4), (8192, 16)])
def test_the_kernel_can_be_compiled_without_a_gpu(
    capability: int, block: int, warps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code of an A100 and an H100."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pytest.importorskip("triton.backends.nvidia")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from detector.inference.nms_kernel import _suppress

    types = {
        "boxes": "*fp32",
        "scores": "*fp32",
        "labels": "*i64",
        "kept": "*i64",
        "count": "i32",
        "nms_thresh": "fp32",
    }
    source = ASTSource(_suppress, {**types, "LIMIT": "constexpr", "BLOCK": "constexpr"}, {"LIMIT": 100, "BLOCK": block})
    options = {"num_warps": warps, "enable_fp_fusion": False}
    assert compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("way", [check_kernel, partial(check, suppress)])
def test_a_gpu_keeps_what_torchvision_keeps(way: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nms, "has_triton", lambda _: False)  # check_kernel does not call it
    way("cuda")
