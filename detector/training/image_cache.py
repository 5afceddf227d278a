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


def keep_pictures(dataset: DetectionDataset, settings: DataConfig) -> str:
    """Give a dataset the cache that the settings ask for, one for all processes of a machine; returns what it holds, in words.

    Raises:
        ConfigError: there is no room for it.
    """
    node, first = socket.gethostname(), int(os.environ.get("LOCAL_RANK", "0")) == 0
    path, mistake = None, ""
    if first:
        try:
            path, mistake = _make_cache(dataset, settings)
        except OSError as error:
            where = "memory" if settings.cache_folder is None else settings.cache_folder
            mistake = (
                f"data.cache_gb must fit into data.cache_folder {where}, got {settings.cache_gb:g}: {error.strerror}; set less, or "
                "another folder"
            )
    told = distributed.gather((node, first, path, mistake))
    mistakes = [mistake for *_, mistake in told if mistake]
    if mistakes:  # all end alike, and none waits for the others
        raise ConfigError(mistakes[0])
    if not first:
        shared = next((path for host, is_first, path, _ in told if host == node and is_first), None)
        _make_cache(dataset, settings, shared=shared)
    cache = dataset.cache
    assert cache is not None
    what = "decoded" if dataset.keeps_whole else "resized"
    return (
        f"data.cache_gb: {cache.num_bytes / 1e9:.2f} GB of {settings.cache_folder or 'memory'} keep {cache.num_kept:,} of "
        f"{cache.num_pictures:,} pictures, {what}"
    )


def _make_cache(
    dataset: DetectionDataset, settings: DataConfig, *, shared: str | None = None
) -> tuple[str | None, str]:
    """By which path others find it, and what is wrong with it."""
    folder = None if settings.cache_folder is None else Path(settings.cache_folder)
    cache = dataset.keep_pictures(
        int(settings.cache_gb * 1e9), min_sizes=settings.train_sizes, folder=folder, shared=shared
    )
    free = free_memory()
    if folder is None and shared is None and free is not None and cache.num_bytes > (1 - SPARE) * free:
        return None, (
            f"data.cache_gb must leave room for the network, got {cache.num_bytes / 1e9:.1f} of {free / 1e9:.1f} GB of free memory; "
            "set less, or data.cache_folder to keep them on a disk"
        )
    return cache.path, ""
