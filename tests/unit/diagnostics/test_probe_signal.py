"""Noise scale and distribution of the SNR: twins, and simulations with a known answer."""

import math

import pytest
import torch
from scipy import special, stats

from poprisk_integrations.diagnostics.probe.signal import (
    _EDGES,
    SNR_GRID,
    GroupSums,
    abs_t_probabilities,
    noise_scale,
)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def near_pairs(steps, lags):
    return [(t, s) for t in range(steps) for s in range(steps) if 0 < abs(t - s) <= lags]


def twin(gradients, lags):
    """|G|^2, tr(S) and the error of their ratio, by loops in float64."""
    steps = len(gradients)

    def ratio_of(rows, lags):
        pairs = near_pairs(len(rows), lags)
        signal = sum(dot(rows[t], rows[s]) for t, s in pairs) / len(pairs)
        return signal, sum(dot(g, g) for g in rows) / len(rows) - signal

    signal, noise = ratio_of(gradients, lags)
    ratios = []
    for out in range(steps):
        s, n = ratio_of([g for t, g in enumerate(gradients) if t != out], steps)
        ratios.append(s / n)
    mean = sum(ratios) / steps
    jackknife = (steps - 1) / steps * sum((r - mean) ** 2 for r in ratios)
    centre = [sum(column) / steps for column in zip(*gradients, strict=True)]
    noises = [[x - c for x, c in zip(g, centre, strict=True)] for g in gradients]
    products = [dot(noises[t], noises[s]) for t, s in near_pairs(steps, steps)]
    average = sum(products) / len(products)
    pair = sum((p - average) ** 2 for p in products) / (len(products) - 1)
    pair *= ((1 + signal / noise) / noise) ** 2
    linear = max(0.0, jackknife - 2 * pair / (steps * (steps - 1) / 2))
    return signal, noise, math.sqrt(linear + pair / (len(near_pairs(steps, lags)) / 2))


@pytest.mark.parametrize("steps", [8, 13, 31])
def test_equals_twin(steps):
    gradients = torch.randn(steps, 7).double() + 0.5
    signal, noise, error = twin(gradients.tolist(), steps // 6)
    found = noise_scale(gradients @ gradients.T)
    assert found.signal == pytest.approx(signal, rel=1e-12)
    assert found.noise == pytest.approx(noise, rel=1e-12)
    assert found.ratio == pytest.approx(signal / noise, rel=1e-12)
    assert found.ratio_se == pytest.approx(error, rel=1e-10)


@pytest.mark.parametrize("snr_sq", [0.0, 0.2, 2.0])
def test_is_unbiased_and_its_error_is_right(snr_sq):
    """400 probes of 30 steps: mean and spread of the ratio against its own error."""
    steps, size, runs = 30, 100, 400
    mean = torch.zeros(size).double()
    mean[:10] = math.sqrt(snr_sq * size / 10)  # |G|^2 / tr(S) = snr_sq
    found = []
    for _ in range(runs):
        g = mean + torch.randn(steps, size).double()
        found.append(noise_scale(g @ g.T))
    ratios = torch.tensor([f.ratio for f in found])
    errors = torch.tensor([f.ratio_se for f in found])
    assert float(ratios.mean()) == pytest.approx(
        snr_sq, abs=4 * float(ratios.std()) / runs**0.5 + 0.01 * snr_sq
    )
    assert float(errors.mean()) == pytest.approx(float(ratios.std()), rel=0.2)
    inside = ((ratios - snr_sq).abs() < 2 * errors).double().mean()
    assert float(inside) > 0.88


def test_a_turning_gradient_does_not_pass_for_noise():
    """|G| = 1 and turning by a quarter; tr(S) = 1. All pairs see half of the signal as noise."""
    steps, size = 60, 400
    angle = torch.linspace(0, math.pi / 2, steps).double()
    mean = torch.zeros(steps, size).double()
    mean[:, 0], mean[:, 1] = angle.cos(), angle.sin()
    g = mean + torch.randn(steps, size).double() / size**0.5
    assert noise_scale(g @ g.T).ratio == pytest.approx(1.0, rel=0.15)


def test_interval_and_significance():
    g = torch.randn(30, 50).double()
    noise = noise_scale(g @ g.T)
    assert not noise.is_significant()
    assert noise.interval()[1] == math.inf
    if noise.ratio <= 0:
        assert noise.batches == noise.batches_se == math.inf
    signal = noise_scale((g + 1) @ (g + 1).T)
    low, high = signal.interval()
    assert signal.is_significant()
    assert 0 < low < signal.batches < high < math.inf


def test_constant_gradients_have_no_noise():
    g = torch.ones(8, 3).double()
    found = noise_scale(g @ g.T)
    assert (found.ratio, found.ratio_se, found.batches) == (math.inf, 0.0, 0.0)
    assert found.is_significant()


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
    sums = GroupSums(steps)
    sums.add(snr + torch.randn(steps, len(snr)), 1.0, len(snr))
    return sums.finish("all").snr


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
