"""Detectors that other programs trained: torchvision's, detectron2's and mmdetection's RetinaNets.

A file of theirs is recognised by the names of its tensors. These are renamed to ours, the rows of the last convolutions
are put in our order of anchors and classes, and everything in which the networks differ is written into a `ModelConfig`,
so that the same pictures give the same detections. What a file does not say (the epsilon of a frozen batch norm,
mmdetection's two styles) is taken from what is usual, said in a note, and can be given.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from pydantic import ValidationError
from torch import Tensor

from detector.config import AnchorConfig, HeadConfig, ModelConfig, PostprocessConfig
from detector.models.reading import WeightsError, named, read_content, short, tensors_in
from detector.models.retinanet import build_model
from detector.structures import Categories

Source = Literal["torchvision", "detectron2", "mmdet"]
Style = Literal["pytorch", "caffe"]

PUBLISHED_WITHOUT_EPS = "eeacb38b"
"""Start of the SHA-256 of torchvision's RetinaNet_ResNet50_FPN_Weights.COCO_V1, whose frozen batch norms have eps 0."""

NEVER = -100.0
"""Bias of classes that a network does not have: no score in floating point."""


@dataclass
class Said:
    """What the user says about a file that does not say it itself."""

    source: Source | None = None
    categories: str | None = None
    """A COCO file, or names separated by commas."""
    norm_eps: float | None = None
    style: Style | None = None
    box_weights: tuple[float, float, float, float] | None = None
    """What the box subnet's numbers are to be divided by: detectron2's BBOX_REG_WEIGHTS, the inverse of mmdetection's
    target_stds."""


class Imported(NamedTuple):
    """A detector in our terms."""

    source: Source
    model: ModelConfig
    postprocess: PostprocessConfig
    categories: Categories
    weights: dict[str, Tensor]
    sizes: tuple[int, int] | None
    """Short side of pictures and bound of the long one, where the file says it."""
    notes: list[str]
    """What was assumed, dropped or converted."""


@dataclass
class _Facts:
    """What is found out about a file on the way."""

    path: Path
    content: Any
    said: Said
    notes: list[str] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    """Settings of `ModelConfig` that the file or its kind decides."""
    postprocess: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[int, int] | None = None
    box_weights: Sequence[float] | None = None


def is_foreign(content: Any) -> bool:
    """Whether a file's content looks like another program's RetinaNet."""
    return any(marker in named(content) for marker in MARKERS.values())


def import_detector(path: Path, content: Any = None, said: Said | None = None) -> Imported:
    """Read another program's RetinaNet.

    Args:
        path: .pt, .pth, .pkl, .npz or .safetensors.
        content: of the file, if it was read already.
        said: about it.

    Raises:
        WeightsError: unreadable; not a RetinaNet of a known build; or it does not say something that nobody said.
    """
    said = said or Said()
    facts = _Facts(path, read_content(path) if content is None else content, said)
    tensors = tensors_in(facts.content, path)
    source = said.source or _recognise(tensors, path)
    layout = LAYOUTS[source]
    renamed, unknown = _renamed(tensors, layout.rename)
    _require_parts(renamed, unknown, source, facts)
    _check_numbers(renamed, facts)
    layout.describe(tensors, renamed, facts)
    _describe_build(renamed, facts)
    weights = _in_towers(renamed)
    weights = _in_our_order(weights, layout.anchor_axes)
    _divide_boxes(weights, said.box_weights or facts.box_weights, facts)
    weights, categories = _with_our_classes(weights, source, facts)
    try:
        model = ModelConfig(**facts.model)
    except ValidationError as error:
        (first, *_) = error.errors()
        told = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise WeightsError(f"{path} holds tensors of shapes that no RetinaNet has ({told})") from None
    _require_whole(weights, unknown, model, len(categories), facts)
    return Imported(
        source, model, PostprocessConfig(**facts.postprocess), categories, weights, facts.sizes, facts.notes
    )


# ---- recognising ------------------------------------------------------------------------------------------------

MARKERS: dict[Source, str] = {
    "torchvision": "head.classification_head.cls_logits.weight",
    "detectron2": "head.cls_score.weight",
    "mmdet": "bbox_head.retina_cls.weight",
}
"""A tensor that only this program's RetinaNet has."""


def require_no_backbone(content: Any, path: Path) -> None:
    """Send an image classifier to where it belongs.

    Raises:
        WeightsError: it is one.
    """
    if "layer1.0.conv1.weight" in named(content):
        raise WeightsError(
            f"{path} holds a backbone (an image classifier), not a detector; start a training from it by "
            f"model.backbone_weights={path}"
        )


def _recognise(tensors: Mapping[str, Tensor], path: Path) -> Source:
    for source, marker in MARKERS.items():
        if marker in tensors:
            return source
    require_no_backbone(tensors, path)
    raise WeightsError(
        f"{path} must be a RetinaNet of torchvision, detectron2 or mmdetection, recognised by "
        f"{', '.join(MARKERS.values())}; got {short(sorted(tensors))}"
    )


# ---- names ------------------------------------------------------------------------------------------------------

DROP = ""
"""What becomes of tensors that say nothing that a config does not."""

Rename = Iterable[tuple[str, "str | Callable[[re.Match[str]], str]"]]


def _renamed(tensors: Mapping[str, Tensor], rules: Rename) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under our names, but the towers' as `cls_subnet.conv.0.weight` or `cls_subnet.norm.0.weight`; and the
    names that no rule knows."""
    renamed, unknown = {}, []
    compiled = [(re.compile(pattern), new) for pattern, new in rules]
    for name, tensor in tensors.items():
        for pattern, new in compiled:
            match = pattern.fullmatch(name)
            if match:
                target = new(match) if callable(new) else match.expand(new)
                if target != DROP:
                    renamed[target] = tensor
                break
        else:
            unknown.append(name)
    return renamed, unknown


_WB = r"(weight|bias)"

TORCHVISION: Rename = (
    (r"backbone\.body\.(.+)", r"backbone.\1"),
    (rf"backbone\.fpn\.inner_blocks\.(\d)\.(?:0\.)?{_WB}", r"fpn.lateral.\1.\2"),
    (rf"backbone\.fpn\.layer_blocks\.(\d)\.(?:0\.)?{_WB}", r"fpn.output.\1.\2"),
    (rf"backbone\.fpn\.extra_blocks\.(p[67])\.{_WB}", r"fpn.\1.\2"),
    (rf"head\.classification_head\.cls_logits\.{_WB}", r"cls_subnet.predictor.\1"),
    (rf"head\.regression_head\.bbox_reg\.{_WB}", r"box_subnet.predictor.\1"),
    (rf"head\.(classification|regression)_head\.conv\.(\d+)\.0\.{_WB}", lambda m: _tower(m[1], "conv", m[2], m[3])),
    (rf"head\.(classification|regression)_head\.conv\.(\d+)\.1\.{_WB}", lambda m: _tower(m[1], "norm", m[2], m[3])),
    # before torchvision 0.12: convolutions and ReLUs in turn
    (
        rf"head\.(classification|regression)_head\.conv\.(\d+)\.{_WB}",
        lambda m: _tower(m[1], "conv", int(m[2]) // 2, m[3]),
    ),
)


def _tower(kind: str, what: str, place: int | str, end: str) -> str:
    subnet = "cls_subnet" if kind.startswith("cl") else "box_subnet"
    return f"{subnet}.{what}.{place}.{end}"


_BN = r"(weight|bias|running_mean|running_var|num_batches_tracked)"

DETECTRON2: Rename = (
    (r"backbone\.bottom_up\.stem\.conv1\.weight", "backbone.conv1.weight"),
    (rf"backbone\.bottom_up\.stem\.conv1\.norm\.{_BN}", r"backbone.bn1.\1"),
    (
        r"backbone\.bottom_up\.res([2-5])\.(\d+)\.conv([123])\.weight",
        lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.conv{m[3]}.weight",
    ),
    (
        rf"backbone\.bottom_up\.res([2-5])\.(\d+)\.conv([123])\.norm\.{_BN}",
        lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.bn{m[3]}.{m[4]}",
    ),
    (
        r"backbone\.bottom_up\.res([2-5])\.(\d+)\.shortcut\.weight",
        lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.downsample.0.weight",
    ),
    (
        rf"backbone\.bottom_up\.res([2-5])\.(\d+)\.shortcut\.norm\.{_BN}",
        lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.downsample.1.{m[3]}",
    ),
    (rf"backbone\.fpn_lateral([345])\.{_WB}", lambda m: f"fpn.lateral.{int(m[1]) - 3}.{m[2]}"),
    (rf"backbone\.fpn_output([345])\.{_WB}", lambda m: f"fpn.output.{int(m[1]) - 3}.{m[2]}"),
    (rf"backbone\.top_block\.(p[67])\.{_WB}", r"fpn.\1.\2"),
    (rf"head\.cls_score\.{_WB}", r"cls_subnet.predictor.\1"),
    (rf"head\.bbox_pred\.{_WB}", r"box_subnet.predictor.\1"),
    # which of these are norms shows in their shape, see _describe_detectron2
    (rf"head\.(cls|bbox)_subnet\.(\d+)\.{_WB}", lambda m: _tower(m[1], "layer", m[2], m[3])),
    (r"anchor_generator\.cell_anchors\.\d", DROP),
    (r"pixel_mean|pixel_std", DROP),
)

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


def _in_towers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`cls_subnet.conv.1.weight` to its place in the tower, where convolutions, norms (if any) and ReLUs take turns."""
    with_norm = any(".norm." in name for name in weights)
    placed = {}
    for name, tensor in weights.items():
        match = re.fullmatch(r"(cls|box)_subnet\.(conv|norm)\.(\d+)\.(\w+)", name)
        if match:
            place = int(match[3]) * (3 if with_norm else 2) + (match[2] == "norm")
            name = f"{match[1]}_subnet.tower.{place}.{match[4]}"
        placed[name] = tensor
    return placed


# ---- what the kinds of file decide ------------------------------------------------------------------------------


TORCHVISION_ANCHORS = AnchorConfig(
    sizes=tuple(
        (float(x), float(int(x * 2 ** (1 / 3))), float(int(x * 2 ** (2 / 3)))) for x in (32, 64, 128, 256, 512)
    ),
    octave_scales=(1.0,),
    strides="grid",
    center_offset=0.0,
    rounding="integer",
)
PIXEL_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
PIXEL_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


def _describe_torchvision(_: Mapping[str, Tensor], renamed: dict[str, Tensor], facts: _Facts) -> None:
    """References: torchvision/models/detection/{retinanet,transform,anchor_utils}.py."""
    plain = any(name.endswith("num_batches_tracked") for name in renamed)
    facts.model |= {
        "norm": "bn" if plain else "frozen_bn",
        "norm_eps": _torchvision_eps(plain, renamed, facts),
        "relu_before_p7": True,
        "anchors": TORCHVISION_ANCHORS,
        "pixel_mean": PIXEL_MEAN,
        "pixel_std": PIXEL_STD,
        "resize": "float_bilinear",
        "pad": "batch_max_32",
    }
    facts.postprocess |= {"detections_per_img": 300}


def _torchvision_eps(plain: bool, renamed: Mapping[str, Tensor], facts: _Facts) -> float:
    if facts.said.norm_eps is not None:
        return facts.said.norm_eps
    if plain:
        return 1e-5
    with facts.path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest().startswith(PUBLISHED_WITHOUT_EPS):
            return 0.0
    coco = len(renamed["cls_subnet.predictor.bias"]) % 91 == 0
    eps = 0.0 if coco else 1e-5
    facts.notes.append(
        f"norm_eps {eps:g} is assumed: frozen batch norms do not say their epsilon. torchvision's published COCO weights, and "
        "what was trained from them, have 0; models that began with an ImageNet backbone have 1e-5 "
        "(tools/convert_weights.py --norm-eps)"
    )
    return eps


def _describe_detectron2(tensors: Mapping[str, Tensor], renamed: dict[str, Tensor], facts: _Facts) -> None:
    """References: detectron2's modeling/meta_arch/retinanet.py, modeling/anchor_generator.py, config/defaults.py."""
    for subnet in ("cls_subnet", "box_subnet"):
        layers = [k for k in renamed if k.startswith(f"{subnet}.layer.") and k.endswith(".weight")]
        places = sorted(int(k.split(".")[2]) for k in layers)
        counts = {"conv": 0, "norm": 0}
        for place in places:
            what = "conv" if renamed[f"{subnet}.layer.{place}.weight"].dim() == 4 else "norm"
            for end in ("weight", "bias"):
                tensor = renamed.pop(f"{subnet}.layer.{place}.{end}", None)
                if tensor is not None:
                    renamed[f"{subnet}.{what}.{counts[what]}.{end}"] = tensor
            counts[what] += 1
    norms = [k.removesuffix(".weight") for k in renamed if re.search(r"backbone.*(bn\d|downsample\.1)\.weight", k)]
    if norms and not any(f"{k}.running_mean" in renamed for k in norms):
        facts.notes.append("batch norms without statistics: mean 0 and variance 1 are assumed, as detectron2 does")
        for k in norms:
            renamed[f"{k}.running_mean"] = torch.zeros_like(renamed[f"{k}.weight"])
            renamed[f"{k}.running_var"] = torch.ones_like(renamed[f"{k}.weight"])
    for name in [k for k in renamed if k.endswith("num_batches_tracked")]:
        del renamed[name]  # frozen here
    mean = tensors.get("pixel_mean", torch.tensor([103.53, 116.28, 123.675])).flatten().tolist()
    std = tensors.get("pixel_std", torch.ones(3)).flatten().tolist()
    anchors = AnchorConfig(center_offset=0.0)
    _check_cell_anchors(tensors, facts)
    facts.model |= {
        "norm": "frozen_bn",
        "norm_eps": facts.said.norm_eps if facts.said.norm_eps is not None else 1e-5,
        "stride_in": "1x1",
        "relu_before_p7": True,
        "anchors": anchors,
        "channel_order": "bgr",
        "pixel_mean": tuple(mean),
        "pixel_std": tuple(std),
        "resize": "pil_bilinear",
        "pad": "batch_max_32",
    }
    facts.postprocess |= {"clip": "after_nms", "drop_empty": True}


def _check_cell_anchors(tensors: Mapping[str, Tensor], facts: _Facts) -> None:
    """Older files carry their anchors: they must be the usual ones."""
    for level, side in enumerate((32, 64, 128, 256, 512)):
        stored = tensors.get(f"anchor_generator.cell_anchors.{level}")
        if stored is None:
            continue
        sides = torch.tensor([side * 2 ** (i / 3) for i in range(3)]).repeat_interleave(3)
        ratios = torch.tensor([0.5, 1.0, 2.0]).repeat(3)
        half = torch.stack([sides / ratios.sqrt(), sides * ratios.sqrt()], dim=1) / 2
        expected = torch.cat([-half, half], dim=1)
        if stored.shape != expected.shape or not torch.allclose(stored.float(), expected, atol=0.01):
            raise WeightsError(
                f"{facts.path}: the anchors of P{level + 3} must be detectron2's usual ones (sizes {side} x 2^(0, 1/3, 2/3), "
                f"ratios 0.5, 1, 2), got {stored.tolist()}"
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


NEEDED = {
    "backbone.layer1.0.conv2.weight": 4, "fpn.lateral.0.weight": 4, "fpn.lateral.2.weight": 4, "fpn.p6.weight": 4,
    "cls_subnet.predictor.weight": 4, "cls_subnet.predictor.bias": 1,
    "box_subnet.predictor.weight": 4, "box_subnet.predictor.bias": 1,
}  # fmt: skip
"""What everything else is deduced from, and its number of axes."""


def _require_parts(renamed: Mapping[str, Tensor], unknown: list[str], source: Source, facts: _Facts) -> None:
    absent = [name for name in NEEDED if name not in renamed]
    if absent:
        others = f"; it has {short(sorted(unknown))}" if unknown else ""
        raise WeightsError(
            f"{facts.path} lacks what every RetinaNet of {source} has: {short(absent)} (in our names){others}"
        )
    odd = [f"{name} {tuple(renamed[name].shape)}" for name, axes in NEEDED.items() if renamed[name].dim() != axes]
    for subnet, outputs in (("cls_subnet", 1), ("box_subnet", 4)):
        rows = [len(renamed[f"{subnet}.predictor.{kind}"]) for kind in ("weight", "bias")] if not odd else []
        if len(set(rows)) > 1 or any(r % outputs for r in rows):
            odd.append(f"{subnet}.predictor with {rows[0]} rows of weights and {rows[1]} biases")
    if odd:
        raise WeightsError(f"{facts.path} holds tensors of shapes that no RetinaNet has: {short(odd)} (in our names)")


# ---- what the tensors show --------------------------------------------------------------------------------------

# Blocks per layer, whether they are bottlenecks, and the width and the inputs per group of the first 3x3 convolution.
BUILDS: dict[tuple[tuple[int, ...], bool, int, int], str] = {
    ((2, 2, 2, 2), False, 64, 64): "resnet18",
    ((3, 4, 6, 3), False, 64, 64): "resnet34",
    ((3, 4, 6, 3), True, 64, 64): "resnet50",
    ((3, 4, 23, 3), True, 64, 64): "resnet101",
    ((3, 8, 36, 3), True, 64, 64): "resnet152",
    ((3, 4, 6, 3), True, 128, 4): "resnext50_32x4d",
    ((3, 4, 23, 3), True, 128, 4): "resnext101_32x4d",
    ((3, 4, 23, 3), True, 256, 8): "resnext101_32x8d",
    ((3, 4, 23, 3), True, 256, 4): "resnext101_64x4d",
}


def _describe_build(renamed: Mapping[str, Tensor], facts: _Facts) -> None:
    """Sizes of everything, from the shapes."""
    blocks = tuple(_count(renamed, rf"backbone\.layer{layer}\.(\d+)\.conv1\.weight") for layer in (1, 2, 3, 4))
    first = renamed["backbone.layer1.0.conv2.weight"]
    bottleneck = "backbone.layer1.0.conv3.weight" in renamed
    build = (blocks, bottleneck, first.shape[0], first.shape[1])
    if build not in BUILDS:
        raise WeightsError(
            f"{facts.path}: the backbone must be one of {', '.join(BUILDS.values())}, got {blocks} "
            f"{'bottlenecks' if bottleneck else 'basic blocks'} whose first has {first.shape[0]} channels in groups of {first.shape[1]}"
        )
    lateral, p6 = renamed["fpn.lateral.2.weight"], renamed["fpn.p6.weight"]
    channels = lateral.shape[0]
    num_anchors = len(renamed["box_subnet.predictor.bias"]) // 4
    if num_anchors != 9 or len(renamed["cls_subnet.predictor.bias"]) % 9:
        raise WeightsError(
            f"{facts.path}: a cell must have 9 anchors (3 sizes, 3 ratios), got {num_anchors}; the file does not say what "
            "other anchors look like, so they cannot be taken over"
        )
    depth = _count(renamed, r"cls_subnet\.conv\.(\d+)\.weight")
    with_norm = "cls_subnet.norm.0.weight" in renamed
    head_channels = renamed["cls_subnet.predictor.weight"].shape[1]
    facts.model |= {
        "backbone": BUILDS[build],
        "fpn_channels": channels,
        "p6_from": "p5" if p6.shape[1] == channels != lateral.shape[1] else "c5",
        "head": HeadConfig(
            depth=depth,
            channels=None if head_channels == channels else head_channels,
            norm="gn" if with_norm else "none",
            bias_before_norm=with_norm and "cls_subnet.conv.0.bias" in renamed,
        ),
    }


def _count(names: Iterable[str], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in names)


def _check_numbers(weights: dict[str, Tensor], facts: _Facts) -> None:
    """Everything is float32 afterwards."""
    problems, narrowed = [], set()
    for name, tensor in weights.items():
        if name.endswith("num_batches_tracked"):
            continue
        if not tensor.is_floating_point():
            problems.append(
                f"  {name} must hold floating-point numbers, got {str(tensor.dtype).removeprefix('torch.')}"
            )
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(f"  {name} holds {int((~torch.isfinite(tensor)).sum())} numbers that are not finite")
        elif tensor.dtype != torch.float32:
            narrowed.add(str(tensor.dtype).removeprefix("torch."))
            weights[name] = tensor.float()
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise WeightsError("\n".join([f"{facts.path} cannot be used (names are ours):", *problems[:8]]) + more)
    if narrowed:
        facts.notes.append(f"converted from {', '.join(sorted(narrowed))} to float32")


def _require_whole(
    weights: Mapping[str, Tensor], unknown: list[str], model: ModelConfig, num_classes: int, facts: _Facts
) -> None:
    with torch.device("meta"):
        own = build_model(model, num_classes).state_dict()
    missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
    surplus = [*unknown, *(k for k in weights if k not in own)]
    misshapen = [
        f"{k} {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    found = (("missing", missing), ("not part of a RetinaNet", surplus), ("of another shape", misshapen))
    if any(names for _, names in found):
        raise WeightsError(
            "\n".join(
                [
                    f"{facts.path} is not a RetinaNet of a known build ({model.backbone}, {num_classes} classes), got tensors",
                    *(f"  {what}: {short(names)}" for what, names in found if names),
                ]
            )
        )


# ---- anchors and classes ----------------------------------------------------------------------------------------


def _in_our_order(weights: dict[str, Tensor], axes: Literal["ratio, scale", "scale, ratio"]) -> dict[str, Tensor]:
    """Rows of the last convolutions by a = ratio * 3 + scale."""
    if axes == "scale, ratio":
        for name in [k for k in weights if ".predictor." in k]:
            rows = torch.unflatten(weights[name], 0, (3, 3, -1))
            weights[name] = rows.transpose(0, 1).flatten(0, 2).contiguous()
    return weights


def _divide_boxes(weights: dict[str, Tensor], divisors: Sequence[float] | None, facts: _Facts) -> None:
    """Our boxes are coded with weights of 1; others' go into the rows of the last convolution."""
    if divisors is None or all(abs(divisor - 1) < 1e-9 for divisor in divisors):
        return
    factors = 1 / torch.tensor(divisors, dtype=torch.float64)
    for kind in ("weight", "bias"):
        rows = torch.unflatten(weights[f"box_subnet.predictor.{kind}"], 0, (9, 4))
        shape = (1, 4, *[1] * (rows.dim() - 2))
        weights[f"box_subnet.predictor.{kind}"] = (rows * factors.view(shape)).float().flatten(0, 1)
    facts.notes.append(
        f"boxes coded with weights {', '.join(f'{d:g}' for d in divisors)}: put into the last convolution"
    )


def _with_our_classes(
    weights: dict[str, Tensor], source: Source, facts: _Facts
) -> tuple[dict[str, Tensor], Categories]:
    """Only rows of real classes, and what these are."""
    num_outputs = len(weights["cls_subnet.predictor.bias"]) // 9
    if facts.said.categories is not None:
        rows, categories = _told_classes(facts.said.categories, num_outputs, source, facts)
    elif source == "torchvision" and num_outputs == 91:
        rows, categories = list(COCO.ids), COCO
    else:
        rows, categories = list(range(num_outputs)), _known_classes(num_outputs, source, facts)
    if rows != list(range(num_outputs)):
        dropped = num_outputs - len(rows)
        facts.notes.append(
            f"{dropped} of {num_outputs} outputs removed, which stand for no class (background, gaps in the ids)"
        )
        for kind in ("weight", "bias"):
            name = f"cls_subnet.predictor.{kind}"
            weights[name] = torch.unflatten(weights[name], 0, (9, num_outputs))[:, rows].flatten(0, 1).contiguous()
    return weights, categories


def _known_classes(num_outputs: int, source: Source, facts: _Facts) -> Categories:
    names = _stored_names(facts)
    if names is not None and len(names) == num_outputs:
        if len(set(names)) != len(names):
            raise WeightsError(f"{facts.path} gives several classes the same name; say them with --categories")
        if tuple(names) == COCO.names:
            return COCO
        return Categories(tuple(range(1, num_outputs + 1)), tuple(names))
    if source != "torchvision" and num_outputs == 80:
        return COCO
    raise WeightsError(
        f"{facts.path} has {num_outputs} outputs and does not say which classes they are; convert it by tools/convert_weights.py "
        "with --categories FILE.json (a COCO file) or --categories NAME,NAME,..."
    )


def _stored_names(facts: _Facts) -> list[str] | None:
    """mmdetection's files name their classes: meta.CLASSES (2.x), meta.dataset_meta.classes (3.x)."""
    dataset = _meta(facts).get("dataset_meta")
    for place in (_meta(facts), dataset if isinstance(dataset, dict) else {}):
        for key in ("CLASSES", "classes"):
            names = place.get(key)
            if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                return list(names)
    return None


def _told_classes(said: str, num_outputs: int, source: Source, facts: _Facts) -> tuple[list[int], Categories]:
    """Which output stands for which of the classes that the user named."""
    if said.endswith(".json"):
        categories = _categories_of(Path(said))
        # torchvision's reference scripts take COCO's category ids for labels
        if source == "torchvision" and num_outputs == max(categories.ids) + 1 and min(categories.ids) >= 0:
            return list(categories.ids), categories
    elif Path(said).exists():
        raise WeightsError(
            f"--categories must be a .json file or names separated by commas, got {said}, which is neither"
        )
    else:
        names = tuple(name.strip() for name in said.split(","))
        if not all(names) or len(set(names)) != len(names):
            raise WeightsError(f"--categories must be a COCO file or different names separated by commas, got {said!r}")
        categories = Categories(tuple(range(1, len(names) + 1)), names)
    if len(categories) == num_outputs:
        return list(range(num_outputs)), categories
    if source == "torchvision" and len(categories) == num_outputs - 1:  # the first output is the background
        return list(range(1, num_outputs)), categories
    background = ", or one less, the first output being the background" if source == "torchvision" else ""
    raise WeightsError(
        f"--categories must name {num_outputs} classes for {facts.path}{background}, got {len(categories)}"
    )


def _categories_of(path: Path) -> Categories:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["categories"]
        pairs = sorted((int(c["id"]), str(c["name"])) for c in listed)
        return Categories(tuple(i for i, _ in pairs), tuple(name for _, name in pairs))
    except OSError as error:
        raise WeightsError(f"--categories {path} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise WeightsError(
            f"--categories {path} must be a COCO file with categories of different ids: {error}"
        ) from None


class _Layout(NamedTuple):
    rename: Rename
    describe: Callable[[Mapping[str, Tensor], dict[str, Tensor], _Facts], None]
    anchor_axes: Literal["ratio, scale", "scale, ratio"]


LAYOUTS: dict[Source, _Layout] = {
    "torchvision": _Layout(TORCHVISION, _describe_torchvision, "ratio, scale"),
    "detectron2": _Layout(DETECTRON2, _describe_detectron2, "scale, ratio"),
    "mmdet": _Layout(MMDET, _describe_mmdet, "ratio, scale"),
}
SOURCES: tuple[Source, ...] = get_args(Source)


# ---- the way back -----------------------------------------------------------------------------------------------


def to_torchvision(weights: Mapping[str, Tensor], model: ModelConfig, categories: Categories) -> dict[str, Tensor]:
    """A state dict that torchvision's RetinaNet loads strictly (`retinanet_resnet50_fpn` or `_v2`, or its class around
    another ResNet), with COCO's 91 outputs where the classes are COCO's, else one for the background before ours.

    Raises:
        WeightsError: torchvision cannot build this network; says what stands in the way.
    """
    anchors = model.anchors
    rules = {
        "model.anchors.center_offset": (anchors.center_offset, 0.0),
        "model.anchors.rounding": (anchors.rounding, "integer"),
        "model.anchors.strides": (anchors.strides, "grid"),
        "model.relu_before_p7": (model.relu_before_p7, True),
        "model.stride_in": (model.stride_in, "3x3"),
        "model.channel_order": (model.channel_order, "rgb"),
        "model.head.bias_before_norm": (model.head.bias_before_norm, False),
        "model.head.activation": (model.head.activation, "sigmoid"),
        "model.head.channels": (model.head.channels or model.fpn_channels, model.fpn_channels),
        "model.head.depth": (model.head.depth, 4),
        "model.fpn_channels": (model.fpn_channels, 256),
        "model.norm": (model.norm if model.norm == "gn" else "batch norm", "batch norm"),
        "model.p6_from": (model.p6_from, "c5" if model.head.norm == "gn" else "p5"),
        "model.anchors": (_sides(anchors), _sides(TORCHVISION_ANCHORS)),
        "model.anchors.ratios": (anchors.ratios, TORCHVISION_ANCHORS.ratios),
        "model.pixel_mean": (_rounded(model.pixel_mean), _rounded(PIXEL_MEAN)),
        "model.pixel_std": (_rounded(model.pixel_std), _rounded(PIXEL_STD)),
    }
    odd = [f"  {key} is {has}, there it is always {wants}" for key, (has, wants) in rules.items() if has != wants]
    if odd:
        raise WeightsError("\n".join(["this network cannot be written for torchvision:", *odd]))
    out: dict[str, Tensor] = {}
    step = 3 if model.head.norm == "gn" else 2
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        if part == "backbone":
            out[f"backbone.body.{rest}"] = tensor
        elif part == "fpn":
            kind, _, end = rest.partition(".")
            if kind in ("p6", "p7"):
                out[f"backbone.fpn.extra_blocks.{rest}"] = tensor
            else:
                level, _, what = end.partition(".")
                blocks = {"lateral": "inner_blocks", "output": "layer_blocks"}[kind]
                out[f"backbone.fpn.{blocks}.{level}.0.{what}"] = tensor
        else:
            head, last = {
                "cls_subnet": ("classification_head", "cls_logits"),
                "box_subnet": ("regression_head", "bbox_reg"),
            }[part]
            kind, *places, what = rest.split(".")
            if kind == "predictor":
                out[f"head.{head}.{last}.{what}"] = tensor
            else:
                layer, within = divmod(int(places[0]), step)
                out[f"head.{head}.conv.{layer}.{within}.{what}"] = tensor
    rows, num_outputs = _torchvision_rows(categories)
    num_anchors = len(weights["box_subnet.predictor.bias"]) // 4
    for kind, fill in (("weight", 0.0), ("bias", NEVER)):
        name = f"head.classification_head.cls_logits.{kind}"
        own = torch.unflatten(out[name], 0, (num_anchors, len(categories)))
        wide = own.new_full((num_anchors, num_outputs, *own.shape[2:]), fill)
        wide[:, rows] = own
        out[name] = wide.flatten(0, 1)
    return out


def _sides(anchors: AnchorConfig) -> list[list[float]]:
    """Of each level."""
    sizes = [size if isinstance(size, tuple) else (size,) for size in anchors.sizes]
    return [[round(side * scale, 3) for side in level for scale in anchors.octave_scales] for level in sizes]


def _rounded(numbers: Iterable[float]) -> list[float]:
    return [round(number, 2) for number in numbers]


def advice_for_torchvision(model: ModelConfig, categories: Categories) -> list[str]:
    """How torchvision has to build the network for such a state dict, and what it will do differently."""
    second = model.head.norm == "gn" and model.p6_from == "c5"
    name = "retinanet_resnet50_fpn_v2" if second else "retinanet_resnet50_fpn"
    _, num_outputs = _torchvision_rows(categories)
    lines = [f"build it by {name}(weights=None, weights_backbone=None, num_classes={num_outputs})"]
    if model.backbone != "resnet50":
        lines = [f"build it as torchvision does in {name}, around {model.backbone}, num_classes={num_outputs}"]
    if model.norm_eps != 1e-5:
        lines.append(f"and set eps of its norms to {model.norm_eps} (torchvision's overwrite_eps does)")
    if model.resize != "float_bilinear":
        lines.append(f"its pictures will look otherwise: it resizes in floating point, not by {model.resize}")
    if categories != COCO:
        lines.append(
            f"labels: 0 the background, then {', '.join(categories.names[:4])}{', ...' * (len(categories) > 4)}"
        )
    return lines


def _torchvision_rows(categories: Categories) -> tuple[list[int], int]:
    if categories == COCO:
        return list(COCO.ids), 91
    return list(range(1, len(categories) + 1)), len(categories) + 1


# ---- COCO's classes ---------------------------------------------------------------------------------------------

_COCO_NAMES = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant - stop_sign parking_meter bench "
    "bird cat dog horse sheep cow elephant bear zebra giraffe - backpack umbrella - - handbag tie suitcase frisbee skis "
    "snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle - wine_glass cup fork "
    "knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch potted_plant bed - "
    "dining_table - - toilet - tv laptop mouse remote keyboard cell_phone microwave oven toaster sink refrigerator - book "
    "clock vase scissors teddy_bear hair_drier toothbrush"
)  # by id from 1; "-" where an id is not used

COCO = Categories(
    tuple(i for i, name in enumerate(_COCO_NAMES.split(), start=1) if name != "-"),
    tuple(name.replace("_", " ") for name in _COCO_NAMES.split() if name != "-"),
)
"""The 80 classes of COCO's 2017 annotations, with their ids of 1..90."""
