"""COCO's 80 classes, and matching class names between datasets."""

from __future__ import annotations

from collections.abc import Sequence

from detector.structures import Categories

_NAMES_BY_ID = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant - stop_sign "
    "parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe - backpack umbrella - - handbag "
    "tie suitcase frisbee skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard "
    "tennis_racket bottle - wine_glass cup fork knife spoon bowl banana apple sandwich orange broccoli carrot "
    "hot_dog pizza donut cake chair couch potted_plant bed - dining_table - - toilet - tv laptop mouse remote "
    "keyboard cell_phone microwave oven toaster sink refrigerator - book clock vase scissors teddy_bear hair_drier "
    "toothbrush"
)  # from id 1; "-" where an id is unused

COCO = Categories(
    tuple(i for i, name in enumerate(_NAMES_BY_ID.split(), start=1) if name != "-"),
    tuple(name.replace("_", " ") for name in _NAMES_BY_ID.split() if name != "-"),
)
"""The 80 classes of COCO's 2017 annotations, with their ids in 1..90."""
COCO_OUTPUTS = 91
"""Outputs per anchor of a torchvision model for COCO: one for each number in 0..90, used as an id or not."""

SYNONYMS = {
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv", "television": "tv",
    "mobilephone": "cellphone", "bike": "bicycle", "people": "person", "pedestrian": "person", "doughnut": "donut",
    "hairdryer": "hairdrier",
}  # fmt: skip
"""Other datasets' name of a COCO class -> COCO's; both without case, spaces and punctuation."""


def canonical_name(name: str) -> str:
    """Return a class name without case, spaces and punctuation, and with COCO's word for its synonyms."""
    plain = "".join(char for char in name.casefold() if char.isalnum()) or name
    return SYNONYMS.get(plain, plain)


def match_classes(names: Sequence[str], source_names: Sequence[str]) -> list[tuple[int, int]]:
    """Return the pairs (label, source label) of classes that mean the same.

    An identical name takes precedence over a canonical one, so that a source with both "people" and "person" keeps them
    apart.
    """
    source_labels = {canonical_name(name): k for k, name in reversed([*enumerate(source_names)])}
    source_labels |= {name: k for k, name in enumerate(source_names)}
    matches = [source_labels.get(name, source_labels.get(canonical_name(name))) for name in names]
    return [(label, source) for label, source in enumerate(matches) if source is not None]
