"""Rename another framework's tensors to this project's names by rules of regular expressions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

RenameRules = Iterable[tuple[str, "str | Callable[[re.Match[str]], str]"]]
"""(pattern of the whole old name, template or function for the new name)."""

DROP = ""
"""New name of tensors that are not needed, because settings contain the same facts."""

WEIGHT_BIAS = r"(weight|bias)"
BATCH_NORM = r"(weight|bias|running_mean|running_var)"
DROP_STEP_COUNTS = (r".+\.num_batches_tracked", DROP)
"""Rule for frameworks whose batch norms are imported as frozen: their counters of training steps have no effect."""


def rename_tensors(tensors: Mapping[str, Tensor], rules: RenameRules) -> tuple[dict[str, Tensor], list[str]]:
    """Apply to each name the first rule that matches.

    Returns:
        The tensors under their new names, and the names that no rule matches.
    """
    renamed, unmatched = {}, []
    for name, tensor in tensors.items():
        for pattern, new in rules:
            match = re.fullmatch(pattern, name)
            if match:
                target = new(match) if callable(new) else match.expand(new)
                if target != DROP:
                    renamed[target] = tensor
                break
        else:
            unmatched.append(name)
    return renamed, unmatched


def hidden_layer(subnet: str, kind: str, index: int | str, parameter: str) -> str:
    """Return the provisional name of a subnet's hidden layer, e.g. `cls_subnet.conv.0.weight`.

    Args:
        subnet: "cls", "classification", or anything else for the box subnet.
        kind: "conv" or "norm".
        index: number among the subnet's layers of this kind.
        parameter: "weight" or "bias".
    """
    return f"{'cls_subnet' if subnet.startswith('cl') else 'box_subnet'}.{kind}.{index}.{parameter}"


def place_hidden_layers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace names of `hidden_layer` by those of `Subnet.tower`, where convolution, norm (if any), ReLU alternate."""
    layers_per_conv = 3 if any(".norm." in name for name in weights) else 2

    def place(match: re.Match[str]) -> str:
        index = int(match[3]) * layers_per_conv + (match[2] == "norm")
        return f"{match[1]}_subnet.tower.{index}.{match[4]}"

    return {re.sub(r"^(cls|box)_subnet\.(conv|norm)\.(\d+)\.(\w+)$", place, k): v for k, v in weights.items()}
