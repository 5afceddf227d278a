"""Load ImageNet weights into a backbone."""

from __future__ import annotations

import pickle
from collections.abc import Set as AbstractSet
from pathlib import Path

import torch
from torch import Tensor, nn

from detector.errors import WeightsError
from detector.models.convolution import FrozenBatchNorm2d
from detector.weights.load_report import LoadReport, abbreviate, match_tensors
from detector.weights.safe_load import READ_ERRORS, error_summary, read_tensors


def load_backbone_weights(backbone: nn.Module, name: str, weights: str) -> LoadReport | None:
    """Load ImageNet weights into a backbone, in place.

    Args:
        backbone: the network to fill.
        name: its architecture, e.g. "resnet50".
        weights: "imagenet" (torchvision's download, its first version: the one on which RetinaNet's published results
            rest), "none", or a file, which may hold only some of the layers.

    Returns:
        The report of what was loaded; None for "none".

    Raises:
        WeightsError: the file is unreadable; no tensor fits; or the weights lack a layer that is not trained or that
            normalises by frozen statistics.
    """
    if weights == "none":
        return None
    if weights == "imagenet":
        source, tensors = f"torchvision ({name}, ImageNet)", _download(name)
    else:
        source, tensors = weights, read_tensors(Path(weights))
    tensors = {key.removeprefix("backbone.body.").removeprefix("backbone."): value for key, value in tensors.items()}
    own = backbone.state_dict()
    # Batch norm's parameters are meaningless for group norm, although the shapes agree.
    group_norms = {key for key, module in backbone.named_modules() if isinstance(module, nn.GroupNorm)}
    usable = {k: v for k, v in tensors.items() if k in own and k.rpartition(".")[0] not in group_norms}
    unused = [k for k in tensors if k not in usable and not k.startswith("fc.") and "num_batches_tracked" not in k]
    fitting, row = match_tensors("backbone", own, usable, unused=unused)
    if not fitting:
        raise WeightsError(
            f"{source} must hold weights of {name} under torchvision's names (conv1.weight, layer1.0.conv1.weight, "
            f"...), got {abbreviate(list(tensors), 4)}"
        )
    backbone.load_state_dict({k: v for k, v in usable.items() if v.shape == own[k].shape}, strict=False)
    require_filled(backbone, own.keys() - fitting.keys(), source)
    return LoadReport(source, [row])


def require_filled(backbone: nn.Module, unfilled: AbstractSet[str], source: str) -> None:
    """Check that no layer without weights stays that way during training.

    Args:
        backbone: the network.
        unfilled: names of its tensors that were not loaded; counters of batch norm do not matter.
        source: origin of the weights, for the message.

    Raises:
        WeightsError: an unfilled layer is frozen, or normalises by frozen statistics.
    """
    frozen_norms = [
        key
        for key, module in backbone.named_modules()
        if isinstance(module, FrozenBatchNorm2d) and any(f"{key}.{p}" in unfilled for p in ("weight", "running_var"))
    ]
    if frozen_norms:
        raise WeightsError(
            f"model.norm must not be frozen_bn on layers without weights: {source} has no statistics for "
            f"{abbreviate(frozen_norms)}; set model.norm=bn (or gn)"
        )
    random_frozen = [k for k, p in backbone.named_parameters() if not p.requires_grad and k in unfilled]
    if random_frozen:
        raise WeightsError(
            f"model.trainable_layers must be higher: {source} has no weights for {abbreviate(random_frozen)}, which "
            "would stay random; set model.trainable_layers=5"
        )


def _download(name: str) -> dict[str, Tensor]:
    import torchvision  # here, because importing it takes longer than importing torch

    if name not in torchvision.models.list_models():
        raise WeightsError(
            f"torchvision has no ImageNet weights of {name}; set model.backbone_weights to a file, or to none (with "
            "model.norm=bn or gn) to train from scratch"
        )
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if target.exists():
        return read_tensors(target)  # may have been put there by hand, and may be damaged
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (pickle.UnpicklingError, *READ_ERRORS) as error:
        raise WeightsError(
            f"downloading the ImageNet weights of {name} failed ({error_summary(error)}).\n"
            f"  Download {weights.url} elsewhere and put it at {target},\n"
            "  or set model.backbone_weights to a file, or to none (with model.norm=bn or gn) to train from scratch."
        ) from None
    return state
