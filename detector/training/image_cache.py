"""The image cache that `data.cache_gb` asks for."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from detector import distributed
from detector.config import DataConfig
from detector.datasets.loader import DetectionDataset
from detector.errors import ConfigError
from detector.memory import SPARE, free_memory


def enable_image_cache(dataset: DetectionDataset, settings: DataConfig) -> str:
    """Give a dataset the cache of `data.cache_gb`, one for all processes of a machine.

    Returns:
        A line about its size and content for the log.

    Raises:
        ConfigError: there is no room for it.
    """
    node, first = socket.gethostname(), int(os.environ.get("LOCAL_RANK", "0")) == 0
    path, error = None, ""
    if first:
        try:
            path, error = _create_cache(dataset, settings)
        except OSError as os_error:
            where = "memory" if settings.cache_folder is None else settings.cache_folder
            error = (
                f"data.cache_gb must fit into data.cache_folder {where}, got {settings.cache_gb:g}: "
                f"{os_error.strerror}; set less, or another folder"
            )
    everywhere = distributed.gather((node, first, path, error))
    errors = [error for *_, error in everywhere if error]
    if errors:  # all processes end alike, and none waits for the others
        raise ConfigError(errors[0])
    if not first:
        shared = next((path for host, is_first, path, _ in everywhere if host == node and is_first), None)
        _create_cache(dataset, settings, shared=shared)
    cache = dataset.cache
    assert cache is not None
    what = "decoded" if dataset.caches_decoded else "resized"
    return (
        f"data.cache_gb: {cache.num_bytes / 1e9:.2f} GB of {settings.cache_folder or 'memory'} for "
        f"{cache.num_cached:,} of {cache.num_images:,} images, {what}"
    )


def _create_cache(
    dataset: DetectionDataset, settings: DataConfig, *, shared: str | None = None
) -> tuple[str | None, str]:
    """The path under which other processes find the cache, and an error message if there is no room for it."""
    folder = None if settings.cache_folder is None else Path(settings.cache_folder)
    cache = dataset.enable_cache(
        int(settings.cache_gb * 1e9), min_sizes=settings.train_sizes, folder=folder, shared=shared
    )
    free = free_memory()
    if folder is None and shared is None and free is not None and cache.num_bytes > (1 - SPARE) * free:
        return None, (
            f"data.cache_gb must leave room for the network, got {cache.num_bytes / 1e9:.1f} of {free / 1e9:.1f} GB of "
            "free memory; set less, or data.cache_folder to cache on a disk"
        )
    return cache.path, ""
