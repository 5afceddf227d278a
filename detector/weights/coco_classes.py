"""COCO's 80 categories with their ids."""

from __future__ import annotations

from detector.structures import Categories

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
