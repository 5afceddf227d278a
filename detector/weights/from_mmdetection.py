"""Import of mmdetection's RetinaNet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from detector.config import AnchorConfig
from detector.errors import WeightsError
from detector.weights.name_maps import _WB, DROP, Rename, Style, _Facts, _tower

MMDET: Rename = (
    (r"backbone\.(.+)", r"backbone.\1"),
    (rf"neck\.lateral_convs\.([012])\.conv\.{_WB}", r"fpn.lateral.\1.\2"),
    (rf"neck\.fpn_convs\.([012])\.conv\.{_WB}", r"fpn.output.\1.\2"),
    (rf"neck\.fpn_convs\.([34])\.conv\.{_WB}", lambda m: f"fpn.p{int(m[1]) + 3}.{m[2]}"),
    (rf"bbox_head\.retina_cls\.{_WB}", r"cls_subnet.predictor.\1"),
    (rf"bbox_head\.retina_reg\.{_WB}", r"box_subnet.predictor.\1"),
    (rf"bbox_head\.(cls|reg)_convs\.(\d+)\.conv\.{_WB}", lambda m: _tower(m[1], "conv", m[2], m[3])),
    (rf"bbox_head\.(cls|reg)_convs\.(\d+)\.gn\.{_WB}", lambda m: _tower(m[1], "norm", m[2], m[3])),
    (r"data_preprocessor\..+", DROP),
    (r"bbox_head\.loss_(cls|bbox)\..+", DROP),  # what GHM remembers of gradients
)


def _describe_mmdet(_: Mapping[str, Tensor], renamed: dict[str, Tensor], facts: _Facts) -> None:
    """References: mmdetection's configs/_base_/models/retinanet_r50_fpn.py, models/dense_heads/anchor_head.py,
    models/necks/fpn.py, models/task_modules/coders/delta_xywh_bbox_coder.py."""
    text = _mmdet_config(facts)
    style = facts.said.style or _mmdet_style(text, facts)
    caffe = style == "caffe"
    for name in [k for k in renamed if k.endswith("num_batches_tracked")]:
        del renamed[name]  # mmdetection trains with norm_eval: the statistics stand still
    facts.model |= {
        "norm": "frozen_bn",
        "norm_eps": facts.said.norm_eps if facts.said.norm_eps is not None else 1e-5,
        "stride_in": "1x1" if caffe else "3x3",
        "relu_before_p7": False,
        "anchors": AnchorConfig(center_offset=0.0),
        "channel_order": "bgr" if caffe else "rgb",
        "pixel_mean": (103.53, 116.28, 123.675) if caffe else (123.675, 116.28, 103.53),
        "pixel_std": (1.0, 1.0, 1.0) if caffe else (58.395, 57.12, 57.375),
        "resize": "cv2_bilinear",
        "pad": "batch_max_32",
    }
    facts.postprocess |= {"drop_empty": True, "bound_shrinking": True}
    _read_mmdet_pictures(text, facts)
    _read_mmdet_boxes(text, facts)


def _meta(facts: _Facts) -> Mapping[str, Any]:
    meta = facts.content.get("meta") if isinstance(facts.content, dict) else None
    return meta if isinstance(meta, dict) else {}


def _mmdet_config(facts: _Facts) -> str:
    """The text of the config that such a file may carry (`config` in 2.x, `cfg` in 3.x)."""
    return " ".join(text for key in ("config", "cfg") if isinstance(text := _meta(facts).get(key), str))


def _mmdet_style(text: str, facts: _Facts) -> Style:
    stated = re.search(r"""style['"]?\s*[=:]\s*['"](pytorch|caffe)['"]""", text)
    if stated:
        return "caffe" if stated[1] == "caffe" else "pytorch"
    style: Style = "caffe" if "caffe" in facts.path.name else "pytorch"
    facts.notes.append(
        f"the {style} style is assumed from the file's name: mmdetection's files do not always say it "
        "(tools/convert_weights.py --style pytorch|caffe)"
    )
    return style


def _said_numbers(text: str, key: str, count: int | None, facts: _Facts) -> list[float] | None:
    """`key=[1, 2.5, 1e-3]` or `key=3` in a config's text: its numbers; None if it is not there.

    Raises:
        WeightsError: it is there and is no list of so many numbers.
    """
    found = re.search(rf"\b{key}['\"]?\s*[=:]\s*(?:[\[(]([^\])]*)[\])]|([-+\w.]+))", text)
    if found is None:
        return None
    try:
        numbers = [float(part) for part in (found[1] or found[2] or "").split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or (count is not None and len(numbers) != count):
        raise WeightsError(f"{facts.path}: the config in the file must give {key} as numbers, got {found[0]!r:.80}")
    return numbers


def _read_mmdet_pictures(text: str, facts: _Facts) -> None:
    """Mean, deviation, order of channels and test size, as far as the config in the file says them."""
    for key, setting in (("mean", "pixel_mean"), ("std", "pixel_std")):
        stated = _said_numbers(text, key, 3, facts)
        if stated is not None:
            facts.model[setting] = tuple(stated)
    order = re.search(r"\b(?:bgr_to_rgb|to_rgb)['\"]?\s*[=:]\s*(True|False|true|false)", text)
    if order:
        facts.model["channel_order"] = "rgb" if order[1].lower() == "true" else "bgr"
    _, _, pipeline = text.partition("test_pipeline")
    size = re.search(r"scale['\"]?\s*[=:]\s*[\[(]\s*(\d+),\s*(\d+)\s*,?\s*[\])]", pipeline)
    if size:
        shorter, longer = sorted((int(size[1]), int(size[2])))
        facts.sizes = (shorter, longer)


def _read_mmdet_boxes(text: str, facts: _Facts) -> None:
    """Anchors, how boxes are coded and post-processing, as far as the config in the file says them."""
    version = str(_meta(facts).get("mmdet_version", ""))
    if version.startswith(("0.", "1.")) or re.search(r"Legacy(AnchorGenerator|DeltaXYWHBBoxCoder)", text):
        raise WeightsError(
            f"{facts.path} is a network of mmdetection 1.x, whose boxes are a pixel larger and whose anchors lie otherwise; "
            "it cannot be taken over"
        )
    if re.search(r"add_extra_convs['\"]?\s*[=:]\s*['\"]on_lateral", text):
        raise WeightsError(f"{facts.path}: P6 must come from C5 or P5, got add_extra_convs='on_lateral'")
    if re.search(r"relu_before_extra_convs['\"]?\s*[=:]\s*[Tt]rue", text):
        facts.model["relu_before_p7"] = True
    anchors = text.partition("anchor_generator")[2][:500]
    usual: dict[str, list[float]] = {
        "octave_base_scale": [4], "scales_per_octave": [3], "ratios": [0.5, 1, 2], "strides": [8, 16, 32, 64, 128],
        "center_offset": [0],
    }  # fmt: skip
    for key, numbers in usual.items():
        stated = _said_numbers(anchors, key, None, facts)
        if stated is not None and stated != numbers:
            raise WeightsError(
                f"{facts.path}: {key} of the anchors must be {numbers}, got {stated}: it cannot be taken over"
            )
    if any(_said_numbers(text, "target_means", 4, facts) or []):
        raise WeightsError(f"{facts.path}: target_means must be 0, got others; such boxes cannot be taken over")
    deviations = _said_numbers(text, "target_stds", 4, facts)
    if deviations is not None:
        if min(deviations) <= 0:
            raise WeightsError(f"{facts.path}: target_stds must be positive, got {deviations}")
        facts.box_weights = [1 / x for x in deviations]
    tail = text.partition("test_cfg")[2][:500]
    for key, setting in (("score_thr", "score_thresh"), ("iou_threshold", "nms_thresh"), ("iou_thr", "nms_thresh"),
                         ("nms_pre", "topk_candidates"), ("max_per_img", "detections_per_img")):  # fmt: skip
        stated = _said_numbers(tail, key, 1, facts)
        if stated is not None:
            whole = setting in ("topk_candidates", "detections_per_img")
            facts.postprocess[setting] = int(stated[0]) if whole else stated[0]
