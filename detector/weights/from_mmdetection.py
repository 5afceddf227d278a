"""Import of mmdetection's RetinaNet.

mmdetection's files may contain the text of their config, which is searched for settings; the Python in it is not run.

References: mmdetection's configs/_base_/models/retinanet_r50_fpn.py, models/dense_heads/anchor_head.py,
models/necks/fpn.py, models/task_modules/coders/delta_xywh_bbox_coder.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from detector.errors import WeightsError
from detector.text import shown
from detector.weights.import_facts import BGR_MEAN, ImportedFacts, SourceFormat, Style
from detector.weights.name_maps import DROP, DROP_STEP_COUNTS, WEIGHT_BIAS, RenameRules, hidden_layer

MAX_CONFIG = 500_000
"""Characters of the config's text that are searched; mmdetection's have some ten thousand."""
_RENAME: RenameRules = (
    DROP_STEP_COUNTS,  # mmdetection trains with norm_eval: the statistics are constant
    (r"backbone\.(.+)", r"backbone.\1"),
    (rf"neck\.lateral_convs\.([012])\.conv\.{WEIGHT_BIAS}", r"fpn.lateral.\1.\2"),
    (rf"neck\.fpn_convs\.([012])\.conv\.{WEIGHT_BIAS}", r"fpn.output.\1.\2"),
    (rf"neck\.fpn_convs\.([34])\.conv\.{WEIGHT_BIAS}", lambda m: f"fpn.p{int(m[1]) + 3}.{m[2]}"),
    (rf"bbox_head\.retina_cls\.{WEIGHT_BIAS}", r"cls_subnet.predictor.\1"),
    (rf"bbox_head\.retina_reg\.{WEIGHT_BIAS}", r"box_subnet.predictor.\1"),
    (rf"bbox_head\.(cls|reg)_convs\.(\d+)\.conv\.{WEIGHT_BIAS}", lambda m: hidden_layer(m[1], "conv", m[2], m[3])),
    (rf"bbox_head\.(cls|reg)_convs\.(\d+)\.gn\.{WEIGHT_BIAS}", lambda m: hidden_layer(m[1], "norm", m[2], m[3])),
    (r"data_preprocessor\..+", DROP),
    (r"bbox_head\.loss_(cls|bbox)\..+", DROP),  # GHM's gradient statistics
)


def _collect_facts(_: Mapping[str, Tensor], __: dict[str, Tensor], facts: ImportedFacts) -> None:
    meta = facts.content.get("meta") if isinstance(facts.content, dict) else None
    meta = meta if isinstance(meta, dict) else {}
    # The config is under "config" in 2.x, "cfg" in 3.x.
    text = " ".join(value for key in ("config", "cfg") if isinstance(value := meta.get(key), str))[:MAX_CONFIG]
    version = meta.get("mmdet_version")
    _check_supported(text, version if isinstance(version, str) else "", facts)
    style = facts.options.style or _style(text, facts)
    order = re.search(r"\b(?:bgr_to_rgb|to_rgb)['\"]?\s*[=:]\s*(True|False|true|false)", text)
    is_rgb = order[1].lower() == "true" if order else style == "pytorch"
    mean = BGR_MEAN if style == "caffe" else BGR_MEAN[::-1]
    std = (1.0, 1.0, 1.0) if style == "caffe" else (58.395, 57.12, 57.375)
    facts.model |= {
        "norm": "frozen_bn",
        "pixel_mean": tuple(_config_numbers(text, "mean", 3, facts) or mean),
        "pixel_std": tuple(_config_numbers(text, "std", 3, facts) or std),
        "pad": "batch_max_32",
    }
    facts.compat |= {
        "norm_eps": 1e-5 if facts.options.norm_eps is None else facts.options.norm_eps,
        "stride_in": "1x1" if style == "caffe" else "3x3",
        "relu_before_p7": bool(re.search(r"relu_before_extra_convs['\"]?\s*[=:]\s*[Tt]rue", text)),
        "anchor_center_offset": 0.0,
        "channel_order": "rgb" if is_rgb else "bgr",
        "resize": "cv2_bilinear",
        "drop_empty": True,
        "bound_shrinking": True,
    }
    facts.postprocess |= _postprocess_settings(text, facts)
    scale = r"scale['\"]?\s*[=:]\s*[\[(]\s*(\d{1,6}),\s*(\d{1,6})\s*,?\s*[\])]"
    if size := re.search(scale, text.partition("test_pipeline")[2]):
        short, long = sorted(map(int, size.groups()))
        facts.min_max_size = (short, long)
    if deviations := _config_numbers(text, "target_stds", 4, facts):
        facts.box_weights = [1 / x for x in deviations]
    facts.class_names = _class_names(meta)


def _style(text: str, facts: ImportedFacts) -> Style:
    stated = re.search(r"""style['"]?\s*[=:]\s*['"](pytorch|caffe)['"]""", text)
    if stated:
        return "caffe" if stated[1] == "caffe" else "pytorch"
    style: Style = "caffe" if "caffe" in facts.path.name else "pytorch"
    facts.notes.append(
        f"the {style} style is assumed from the file name, because the file contains no config that states it "
        "(override: tools/convert_weights.py --style pytorch|caffe)"
    )
    return style


def _check_supported(text: str, version: str, facts: ImportedFacts) -> None:
    """Check that the config, as far as the file contains it, describes a network that can be imported."""
    if version.startswith(("0.", "1.")) or re.search(r"Legacy(AnchorGenerator|DeltaXYWHBBoxCoder)", text):
        raise WeightsError(
            f"{facts.path} must be of mmdetection 2.x or 3.x, got a network of mmdetection 1.x, whose boxes are one "
            "pixel larger and whose anchors are placed differently; it cannot be imported"
        )
    if re.search(r"add_extra_convs['\"]?\s*[=:]\s*['\"]on_lateral", text):
        raise WeightsError(f"{facts.path}: P6 must come from C5 or P5, got add_extra_convs='on_lateral'")
    anchors = text.partition("anchor_generator")[2][:500]
    defaults: dict[str, list[float]] = {
        "octave_base_scale": [4], "scales_per_octave": [3], "ratios": [0.5, 1, 2], "strides": [8, 16, 32, 64, 128],
        "center_offset": [0],
    }  # fmt: skip
    for key, default in defaults.items():
        stated = _config_numbers(anchors, key, None, facts)
        if stated is not None and stated != default:
            raise WeightsError(f"{facts.path}: {key} of the anchors must be {default}, got {stated}")
    means = _config_numbers(text, "target_means", 4, facts) or [0.0]
    if any(means):
        raise WeightsError(f"{facts.path}: target_means must be 0, got {means}")
    deviations = _config_numbers(text, "target_stds", 4, facts) or [1.0]
    if min(deviations) <= 0:
        raise WeightsError(f"{facts.path}: target_stds must be positive, got {deviations}")


def _postprocess_settings(text: str, facts: ImportedFacts) -> dict[str, float]:
    test_config = text.partition("test_cfg")[2][:500]
    settings: dict[str, float] = {}
    for key, setting, number in (
        ("score_thr", "score_thresh", float), ("iou_threshold", "nms_thresh", float), ("iou_thr", "nms_thresh", float),
        ("nms_pre", "topk_candidates", int), ("max_per_img", "detections_per_img", int),
    ):  # fmt: skip
        stated = _config_numbers(test_config, key, 1, facts)
        if stated is not None:
            settings[setting] = number(stated[0])
    return settings


def _class_names(meta: Mapping[str, Any]) -> list[str] | None:
    """Class names under meta.CLASSES (2.x) or meta.dataset_meta.classes (3.x)."""
    dataset = meta.get("dataset_meta")
    for section in (meta, dataset if isinstance(dataset, dict) else {}):
        for key in ("CLASSES", "classes"):
            names = section.get(key)
            if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                return list(names)
    return None


def _config_numbers(text: str, key: str, count: int | None, facts: ImportedFacts) -> list[float] | None:
    """Return the numbers of `key=[1, 2.5, 1e-3]` or `key=3` in a config's text; None if the key is absent.

    Raises:
        WeightsError: the value is not a list of numbers, `count` of them if that is given.
    """
    found = re.search(rf"\b{key}['\"]?\s*[=:]\s*(?:[\[(]([^\])]{{0,1000}})[\])]|([-+\w.]{{1,50}}))", text)
    if found is None:
        return None
    try:
        numbers = [float(part) for part in (found[1] or found[2] or "").split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or len(numbers) != (count or len(numbers)) or not all(map(math.isfinite, numbers)):
        raise WeightsError(f"{facts.path}: the config in the file must give {key} as numbers, got {shown(found[0])}")
    return numbers


MMDETECTION = SourceFormat(
    marker="bbox_head.retina_cls.weight",
    rename=_RENAME,
    collect_facts=_collect_facts,
    anchor_axes="ratio, scale",
)
