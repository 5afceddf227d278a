"""Benchmarks of inference: network and post-processing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detector.config import PostprocessConfig, Precision
from detector.inference.detector import Detector
from detector.inference.postprocess import postprocess
from detector.memory import Work
from detector.models import RetinaNet
from detector.precision import DTYPES, autocast
from detector.structures import Detections, HeadOutputs
from tools.benchmarks.measure import flops_of, interleaved, machine_peak
from tools.benchmarks.peers import Inputs, make_inputs, make_pair
from tools.benchmarks.rows import MismatchError, Options, Row, figures

MIN_AGREEMENT = 0.98
"""Share of the peer's detections that ours must have: rounding differs, and scores near the threshold may cross it."""


def infer(options: Options) -> list[Row]:
    """Time images on the device to detections in main memory."""
    device = options.device
    inputs = make_inputs(options.batch, options.size, options.boxes, options.classes, device)
    ours, peer = make_pair(options.backbone, options.classes, options.size, inputs)
    ours.eval()
    peer.eval()
    settings = PostprocessConfig().model_dump()
    facts = _check_same_detections(options, inputs, ours, peer) if options.peer else {}
    rows = []
    for precision in options.precisions:
        detector = Detector(ours, settings, precision=precision, device=device)

        def run_ours(detector: Detector = detector) -> list[Detections]:
            return detector(inputs.batch.images, inputs.image_sizes)

        @torch.inference_mode()
        def run_peer(precision: Precision = precision) -> list[dict[str, Tensor]]:
            with autocast(precision, device):
                detections = peer(inputs.peer_images)
            return [{key: value.cpu() for key, value in one.items()} for one in detections]

        works: dict[str, Work] = {"ours": run_ours}
        if options.peer:
            works["peer"] = run_peer
        operations = flops_of(run_peer)
        timings = interleaved(works, repeats=options.repeats, warmup=max(3, options.warmup), device=device)
        peak = machine_peak(device, DTYPES[precision])
        rows.append(
            {
                "case": "infer", "row": precision, **options.workload, **facts,
                "slowest": options.profile(run_ours, f"infer_{precision}"),
                **figures(timings, images=options.batch, operations=operations, peak=peak),
            }
        )  # fmt: skip
    return rows


def _check_same_detections(options: Options, inputs: Inputs, ours: RetinaNet, peer: Any) -> Row:
    """Compare the detections of the first image in fp32."""
    detector = Detector(ours, PostprocessConfig().model_dump(), precision="fp32", device=options.device)
    own = detector(inputs.batch.images[:1], inputs.image_sizes[:1])
    with torch.inference_mode():
        expected = [{key: value.cpu() for key, value in one.items()} for one in peer(inputs.peer_images[:1])]
    share = agreement(own, expected)
    if share < MIN_AGREEMENT or not len(own[0]):
        raise MismatchError(
            f"{MIN_AGREEMENT:.0%} of the detections must be the same in fp32, got {share:.1%} of {len(own[0])}"
        )
    return {"agreement_fp32": share, "detections": len(own[0])}


def agreement(ours: list[Detections], peer: list[dict[str, Tensor]]) -> float:
    """Share of the peer's detections that are among ours: the same class, and coordinates within 0.1 pixels."""
    same = total = 0
    for own, expected in zip(ours, peer, strict=True):
        distance = (own.boxes[:, None] - expected["boxes"].float()[None]).abs().amax(dim=2)
        same += int(((distance < 0.1) & (own.labels[:, None] == expected["labels"][None])).any(dim=0).sum())
        total += len(expected["labels"])
    return same / max(1, total)


def postprocessing(options: Options) -> list[Row]:
    """Time raw outputs, with about as many detections as a trained network gives, to detections."""
    device = options.device
    inputs = make_inputs(options.batch, options.size, options.boxes, options.classes, device)
    ours, peer = make_pair(options.backbone, options.classes, options.size, inputs)
    peer.eval()
    with torch.no_grad():
        outputs: HeadOutputs = ours.eval()(inputs.batch.images, inputs.batch.image_sizes)
    levels = list(outputs.level_anchors())
    heads = {"cls_logits": list(outputs.cls_logits), "bbox_regression": list(outputs.box_deltas)}
    settings = PostprocessConfig().model_dump()

    def run_ours() -> list[Detections]:
        return postprocess(outputs, inputs.image_sizes, **settings)

    @torch.no_grad()
    def run_peer() -> list[dict[str, Tensor]]:
        detections = peer.postprocess_detections(heads, [levels] * options.batch, [options.size] * options.batch)
        return [{key: value.cpu() for key, value in one.items()} for one in detections]

    facts = {"agreement": agreement(run_ours(), run_peer()), "detections": len(run_ours()[0])}
    if facts["agreement"] < 0.99:
        raise MismatchError(f"99 % of the detections must be the same, got {facts}")
    timings = interleaved(
        {"ours": run_ours, "peer": run_peer}, repeats=max(15, options.repeats), warmup=options.warmup, device=device
    )
    return [{"case": "postprocess", "row": "fp32", **options.workload, **facts, **figures(timings)}]
