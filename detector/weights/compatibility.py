"""Check whether a checkpoint's weights are meaningful in the network of a config."""

from __future__ import annotations

from collections.abc import Sequence

from detector.config import Config, config_differences
from detector.errors import ConfigError

ARCHITECTURE_SETTINGS = (
    "backbone", "head.norm", "head.activation", "compat.norm_eps", "compat.stride_in", "compat.channel_order",
    "compat.p6_from", "compat.relu_before_p7", "compat.bias_before_norm",
)  # fmt: skip
"""Settings of `model` whose change makes weights meaningless, even where names and shapes agree."""
INPUT_SETTINGS = ("pixel_mean", "pixel_std", "compat.resize")
"""Settings of `model` to which fine-tuning can adapt the weights."""


def require_same_build(config: Config, source: Config, path: str) -> list[str]:
    """Check that the network of a config computes what a checkpoint's network computes.

    Args:
        config: of the model to fine-tune.
        source: of the checkpoint.
        path: the checkpoint's, for messages.

    Returns:
        Warnings about inputs that are processed differently; none if everything agrees.

    Raises:
        ConfigError: the architectures differ; the message lists the settings with both values.
    """

    def differences(keys: Sequence[str]) -> list[str]:
        return [
            f"  {key}: {wanted} in the config, {stored} in the checkpoint"
            for key, wanted, stored in config_differences(config, source, [f"model.{key}" for key in keys])
        ]

    norm = ["norm"] if "gn" in (config.model.norm, source.model.norm) else []
    if different := differences([*ARCHITECTURE_SETTINGS, *norm]):
        raise ConfigError(
            "\n".join(
                [
                    f"fine-tuning must keep the architecture of {path}, got:",
                    *different,
                    "Remove these settings from the config (as in configs/finetune.yaml): missing model settings "
                    "come from the checkpoint.",
                ]
            )
        )
    different = differences(INPUT_SETTINGS)
    return ["\n".join([f"{path} was trained with other input processing:", *different])] if different else []
