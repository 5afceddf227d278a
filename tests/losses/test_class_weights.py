"""Class weights against their formulas and limits."""

from __future__ import annotations

import pytest
import torch

from detector.losses import effective_number, inverse_frequency


def test_inverse_frequencies_have_mean_1_and_the_right_ratios() -> None:
    counts = torch.tensor([11, 1, 0, 4])
    weights = inverse_frequency(counts)
    assert weights.mean().item() == pytest.approx(1)
    torch.testing.assert_close(weights / weights[0], torch.tensor([1, 11, 11, 11 / 4]))
    torch.testing.assert_close(
        inverse_frequency(counts, exponent=0.5) / inverse_frequency(counts, exponent=0.5)[0],
        torch.tensor([1, 11, 11, 11 / 4]).sqrt(),
    )
    assert inverse_frequency(counts, exponent=0.0).tolist() == [1.0] * 4


def test_effective_number_weights_lie_between_equal_and_inverse_frequency_weights() -> None:
    counts = torch.tensor([1000, 10, 1])
    expected = (1 - 0.99) / (1 - 0.99 ** counts.double())
    torch.testing.assert_close(
        effective_number(counts, beta=0.99).double(), expected / expected.mean(), rtol=1e-5, atol=0
    )
    assert effective_number(counts, beta=0.0).tolist() == [1.0] * 3
    torch.testing.assert_close(effective_number(counts, beta=1 - 1e-9), inverse_frequency(counts), rtol=1e-4, atol=0)


def test_class_weights_need_an_example() -> None:
    for class_weights in (inverse_frequency, effective_number):
        with pytest.raises(ValueError, match="at least one class with an example"):
            class_weights(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="beta must be"):
        effective_number(torch.ones(3), beta=1.0)
