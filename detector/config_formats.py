"""Formats of stored configs: which keys moved between them, and reading old ones.

Format 1: no `model.compat`; the settings of imported networks were spread over `model`, `model.head`, `model.anchors`
and `postprocess`. Format 2: the current one.
"""

from __future__ import annotations

import copy
from typing import Any

from detector.errors import ConfigError, UserError
from detector.text import shown

FORMAT = 2

KeyPath = tuple[str, ...]

_MOVED = {
    "model.norm_eps": "norm_eps",
    "model.stride_in": "stride_in",
    "model.p6_from": "p6_from",
    "model.relu_before_p7": "relu_before_p7",
    "model.head.bias_before_norm": "bias_before_norm",
    "model.anchors.strides": "anchor_spacing",
    "model.anchors.center_offset": "anchor_center_offset",
    "model.anchors.rounding": "anchor_rounding",
    "model.channel_order": "channel_order",
    "model.resize": "resize",
    "postprocess.clip": "clip",
    "postprocess.drop_empty": "drop_empty",
    "postprocess.bound_shrinking": "bound_shrinking",
}
MOVED: dict[KeyPath, KeyPath] = {tuple(old.split(".")): ("model", "compat", new) for old, new in _MOVED.items()}
"""Keys of format 1 and their current place. Files and overrides may use either."""


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Move the settings of an older format to their current keys; a setting under its current key takes precedence."""
    values = copy.deepcopy(values)
    for old, new in MOVED.items():
        section: Any = values
        for name in old[:-1]:
            section = section.get(name) if isinstance(section, dict) else None
        model = values.get("model", {})
        compat = model.get("compat", {}) if isinstance(model, dict) else None
        if not isinstance(section, dict) or old[-1] not in section or not isinstance(compat, dict):
            continue
        value = section.pop(old[-1])
        if new[-1] == "anchor_spacing" and value == [8, 16, 32, 64, 128]:
            value = "fixed"
        compat.setdefault(new[-1], value)
        model["compat"] = compat
        values["model"] = model
    return values


def require_known(stored: object, what: str, *, newest: int = FORMAT, error: type[UserError] = ConfigError) -> None:
    """Refuse a file of a newer format than this version of the program reads.

    Args:
        stored: the `format` in the file.
        what: the kind and path of the file, for the message.
        newest: the newest format that can be read.
        error: the exception to raise.

    Raises:
        UserError: `stored` is newer, or is not a format number.
    """
    if not isinstance(stored, int) or isinstance(stored, bool) or stored < 1:
        raise error(f"{what} must have a format of 1 to {newest}, got {shown(stored)}")
    if stored > newest:
        raise error(f"{what} has format {shown(stored)}, this version reads up to {newest}; update retinanet-detector")
