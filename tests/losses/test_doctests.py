"""The examples in the docstrings of the losses run, and every public loss has one."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import detector.losses

MODULES = [f"detector.losses.{module.name}" for module in pkgutil.iter_modules(detector.losses.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_give_what_they_show(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", detector.losses.__all__)
def test_every_public_loss_has_an_example(name: str) -> None:
    examples = doctest.DocTestFinder(recurse=False).find(getattr(detector.losses, name))
    assert any(test.examples for test in examples)
