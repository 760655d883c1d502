"""Distribution of the SNR: a twin of the law of t, and simulations with known SNRs."""

import math

import pytest
import torch
from scipy import special, stats

from poprisk_integrations.diagnostics.snr_distribution import (
    _EDGES,
    SNR_GRID,
    abs_t_histogram,
    abs_t_probabilities,
    deconvolve,
)


def twin_cdf(x, steps, snr):
    """P(t^2 <= x^2) of a non-central F, as a Poisson mixture of beta functions."""
    half = steps * snr**2 / 2
    y = x**2 / (x**2 + steps - 1)
    count = range(int(half + 10 * half**0.5 + 20))
    return sum(
        stats.poisson(half).pmf(j) * special.betainc(0.5 + j, (steps - 1) / 2, y) for j in count
    )


@pytest.mark.parametrize(("steps", "column"), [(8, 0), (8, 30), (30, 10), (30, 25), (100, 0)])
def test_law_of_abs_t_equals_twin(steps, column):
    found = abs_t_probabilities(steps)
    assert found.shape == (len(_EDGES), len(SNR_GRID))
    assert torch.allclose(found.sum(0), torch.ones(len(SNR_GRID)).double(), atol=1e-12)
    below = found[:, column].cumsum(0)  # of the upper edge of each bin
    for place in (0, 5, 20, 50, 79, 90):
        expected = twin_cdf(float(_EDGES[place + 1]), steps, float(SNR_GRID[column]))
        assert float(below[place]) == pytest.approx(expected, abs=1e-4)


def measured(snr, steps=30):
    g = snr + torch.randn(steps, len(snr)).double()
    t = g.mean(0).abs() / g.std(0) * math.sqrt(steps)
    return deconvolve(abs_t_histogram(t, torch.ones_like(t)), abs_t_probabilities(steps))


def test_pure_noise_shows_no_signal():
    found = measured(torch.zeros(20_000))
    assert found.share_above(0.2) < 0.005
    assert found.mean(SNR_GRID.square()) < 0.003


def test_known_mixture_is_recovered():
    """70 % noise, 20 % of SNR 0.5, 10 % of SNR 1.5."""
    snr = torch.cat([torch.zeros(28_000), torch.full((8_000,), 0.5), torch.full((4_000,), 1.5)])
    found = measured(snr)
    assert found.share_above(0.25) == pytest.approx(0.3, abs=0.02)
    assert found.share_above(1.0) == pytest.approx(0.1, abs=0.01)
    assert found.mean(SNR_GRID) == pytest.approx(0.25, abs=0.04)  # weak signals are hard to place
    assert found.mean(SNR_GRID.square()) == pytest.approx(0.275, rel=0.05)
    assert found.quantile(0.5) < 0.15
    assert found.quantile(0.95) == pytest.approx(1.5, rel=0.15)


def test_histogram_of_measured_values_would_not_do():
    """Of pure noise, 27 % of the measured SNRs exceed 0.2: the scatter that is taken off."""
    g = torch.randn(30, 20_000)
    raw = g.mean(0).abs() / g.std(0)
    assert float((raw > 0.2).double().mean()) == pytest.approx(0.28, abs=0.03)


def test_weights_count_coordinates():
    t = torch.tensor([0.05, 0.05, 7.0, 1e9, math.inf])
    counts = abs_t_histogram(t, torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))
    assert counts[0] == 3
    assert counts[-1] == 24
    assert float(counts.sum()) == 31
