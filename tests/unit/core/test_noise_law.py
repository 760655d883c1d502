"""The laws behind a calibrated alpha, against integrals and quantiles of scipy."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from poprisk_integrations.core import (
    effective_coordinates,
    moments_alpha,
    moments_open_rate,
    pooled_alpha,
)


def imhof(betas, tau):
    """P(g' (a a' - tau B) g > 0) from the eigenvalues of the form (Imhof 1961)."""
    lag = np.arange(round(30 / (1 - max(betas))))
    a, b = ((1 - beta) * float(beta) ** lag for beta in betas)
    weights = np.linalg.eigvalsh(np.outer(a, a) - tau * np.diag(b))
    weights = weights[np.abs(weights) > 1e-13] / np.abs(weights).max()

    def integrand(u):
        angle = np.arctan(weights * u).sum() / 2
        return np.sin(angle) / u * np.exp(-np.log1p((weights * u) ** 2).sum() / 4)

    # smooth and vanishing at both ends in log(u), where a grid converges fast
    x = np.linspace(-25, 25, 5001)
    values = [integrand(u) * u for u in np.exp(x)]
    return 0.5 + integrate.trapezoid(values, x) / np.pi


@pytest.mark.parametrize(
    "betas", [(0.9, 0.95), (0.8, 0.8), (0.9, 0.7), (0.0, 0.9), (0.5, 0.0)], ids=str
)
@pytest.mark.parametrize("tau", [0.02, 0.3, 1.0])
def test_the_law_of_the_ratio(betas, tau):
    assert moments_open_rate(betas, tau) == pytest.approx(imhof(betas, tau), abs=2e-5, rel=1e-3)


@pytest.mark.parametrize("rate", [0.3173, 0.05, 0.001])
def test_a_long_second_average_gives_the_chi_square(rate):
    """With v_hat as good as known the ratio is Var(m_hat) chi2_1."""
    alpha = moments_alpha((0.9, 0.99999), rate)
    tau = alpha / (1 + alpha)
    assert tau == pytest.approx(0.1 / 1.9 * stats.chi2.isf(rate, 1), rel=1e-3)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.95), (0.8537, 0.9)], ids=str)
@pytest.mark.parametrize("rate", [0.9, 0.3173, 0.05])
def test_the_boundary_is_crossed_as_often_as_asked(betas, rate):
    """Betas of many digits too, as schedules of momentum make them."""
    alpha = moments_alpha(betas, rate)
    assert moments_open_rate(betas, alpha / (1 + alpha)) == pytest.approx(rate, rel=6e-3)


@pytest.mark.parametrize(
    ("betas", "rate", "message"),
    [
        ((0.0, 0.999), 0.3, r"Invalid false_open_rate: 0.3\. .*above 0\.32 at betas \(0, 0\.999\)"),
        ((0.9, 0.999), 1e-6, r"above 1\.1e-05 at betas \(0\.9, 0\.999\)"),
        ((0.9, 0.999), 0.0, r"Invalid false_open_rate: 0\.0\. Must be in \(0, 1\)"),
    ],
)
def test_rates_that_no_boundary_gives_are_refused(betas, rate, message):
    with pytest.raises(ValueError, match=message):
        moments_alpha(betas, rate)


@pytest.mark.parametrize("rate", [0.5, 0.3173, 0.05, 0.01])
@pytest.mark.parametrize("count", [2, 4, 30, 10_000])
def test_quantiles_of_means(count, rate):
    """Measured by what counts, the probability to exceed the boundary."""
    alpha = pooled_alpha(rate, torch.tensor(float(count), dtype=torch.float64), beta1=0.9)
    realised = stats.chi2.sf(count * float(alpha) / 0.05, count)
    assert realised == pytest.approx(rate, rel=0.05 if count < 4 else 0.02)


def test_unequal_coordinates_are_worth_fewer():
    s = torch.tensor([4.0, 1.0, 1.0, 0.0])
    sums = [(s**power).sum() for power in (1, 2, 3)]
    worth, skew = effective_coordinates(*sums, 4, decay=0.9)
    assert float(worth) == pytest.approx(36 / 18 * (1 + 2 / 19))
    assert float(skew) == pytest.approx(18**3 / 66**2 * (1 + 4 / 19) ** 2 / (1 + 2 / 19))
    nothing = effective_coordinates(*[torch.zeros(())] * 3, 4, decay=0.9)
    assert [float(n) for n in nothing] == [1.0, 1.0]
    equal = effective_coordinates(*[torch.tensor(4.0)] * 3, 4, decay=1.0)
    assert [float(n) for n in equal] == [4.0, 4.0]


@pytest.mark.parametrize("rate", [0.3173, 0.05])
@pytest.mark.parametrize("spread", [1.0, 2.0])
def test_quantiles_of_means_of_unequal_coordinates(spread, rate):
    """Log-normal variances; two moments alone are 10 % off at the larger spread."""
    generator = np.random.default_rng(0)
    s = np.exp(spread * generator.standard_normal(60))
    sums = [torch.tensor((s**power).sum()) for power in (1, 2, 3)]
    n, k = effective_coordinates(*sums, 60, decay=1.0)
    bound = float(pooled_alpha(rate, n, k, beta1=0.9)) / 0.05 * s.sum()
    means = (s * generator.chisquare(1, (100_000, 60))).sum(1)
    assert (means > bound).mean() == pytest.approx(rate, rel=0.06)
