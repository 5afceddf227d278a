"""Whether a checkpoint's network can be fine-tuned with a config."""

from __future__ import annotations

from collections.abc import Sequence

from detector.config import Config, flatten
from detector.errors import ConfigError

BUILD = (
    "backbone", "norm_eps", "stride_in", "channel_order", "p6_from", "relu_before_p7", "head.norm", "head.bias_before_norm",
    "head.activation",
)  # fmt: skip
"""Settings of `model` without which weights mean nothing: the same names and shapes elsewhere are accidents."""
INPUT = ("pixel_mean", "pixel_std", "resize")
"""Settings of `model` that weights are used to, but can get used to otherwise."""


def _require_same_build(config: Config, source: Config, path: str) -> list[str]:
    """Refuse weights of a network of another build; returns what is only unusual."""
    ours, theirs = flatten(config.model.model_dump()), flatten(source.model.model_dump())
    norms = ["norm"] if "gn" in (ours["norm"], theirs["norm"]) else []

    def differing(keys: Sequence[str]) -> list[str]:
        return [
            f"  model.{key}: {ours[key]} in the config, {theirs[key]} in the checkpoint"
            for key in keys
            if ours[key] != theirs[key]
        ]

    different = differing([*BUILD, *norms])
    if different:
        raise ConfigError(
            "\n".join(
                [
                    f"fine-tuning must keep the build of the network in {path}, got:",
                    *different,
                    "Leave these settings out of the config (configs/finetune.yaml does): what it does not say of the model is "
                    "the checkpoint's.",
                ]
            )
        )
    unusual = differing(INPUT)
    return ["\n".join([f"the network in {path} has seen its pictures otherwise:", *unusual])] if unusual else []
