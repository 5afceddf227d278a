"""All tests of this folder use tiny runs."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _tiny_runs(one_thread: None, short_network: None) -> None:
    """One thread, and a ResNet-18 with one block per layer."""
