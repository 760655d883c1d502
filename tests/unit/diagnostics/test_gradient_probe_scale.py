"""Noise scale: a twin in plain Python, and simulations with a known answer."""

import math

import pytest
import torch

from poprisk_integrations.core.risk import risk_decrease_from_sums
from poprisk_integrations.diagnostics.noise_scale import noise_scale


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


@pytest.mark.parametrize("lags", [1, 3, 9])
def test_equals_twin(lags):
    gradients = torch.randn(10, 7).double() + 0.5
    signal, noise, error = twin(gradients.tolist(), lags)
    found = noise_scale(gradients @ gradients.T, lags)
    assert found.signal == pytest.approx(signal, rel=1e-12)
    assert found.noise == pytest.approx(noise, rel=1e-12)
    assert found.ratio == pytest.approx(signal / noise, rel=1e-12)
    assert found.ratio_se == pytest.approx(error, rel=1e-10)


def test_with_all_lags_it_is_the_population_risk_decrease():
    gradients = torch.randn(9, 5).double()
    sums = float(gradients.sum(0).square().sum()), float(gradients.square().sum())
    found = noise_scale(gradients @ gradients.T, lags=8)
    assert found.signal == pytest.approx(risk_decrease_from_sums(*sums, 9), rel=1e-12)
    assert found.noise == pytest.approx(float(gradients.var(0).sum()), rel=1e-12)


@pytest.mark.parametrize("snr_sq", [0.0, 0.01, 0.2, 2.0])
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
    gram = g @ g.T
    assert noise_scale(gram).ratio == pytest.approx(1.0, rel=0.15)
    assert noise_scale(gram, lags=steps - 1).ratio < 0.8


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


@pytest.mark.parametrize(("steps", "lags"), [(2, 1), (5, 0)])
def test_refusals(steps, lags):
    with pytest.raises(ValueError, match="Must be >= 3"):
        noise_scale(torch.eye(steps), lags)
