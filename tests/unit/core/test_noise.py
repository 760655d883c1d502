import numpy as np
import pytest
import torch

from poprisk_integrations.core import (
    deviation_scale,
    ema_mean_variance,
    gradient_scale,
    noise_is_ready,
    sum_variance,
    update_dev_sq_,
)


@pytest.mark.parametrize("beta1", [0.0, 0.8, 0.9, 0.95])
def test_mean_of_the_noise_estimate(beta1):
    """E[s_hat] = s_B * 2/(1 + beta1) for i.i.d. gradients: biased up by the variance of m."""
    rho, n = 0.99, 4000
    m, s = torch.zeros(n), torch.zeros(n)
    for _ in range(600):
        g = 3.0 * torch.randn(n)
        update_dev_sq_(s, g, m, rho, 1 - rho)
        m.lerp_(g, 1 - beta1)
    assert float(s.mean()) == pytest.approx(9.0 * 2 / (1 + beta1), rel=0.02)


@pytest.mark.parametrize("centered", [True, False])
def test_warmup_counts_steps(centered):
    behind = 1 if centered else 0  # deviations seen at step t
    ready = [t for t in range(1, 8) if noise_is_ready(t - behind, 5, centered=centered)]
    assert ready == [6, 7]


@pytest.mark.parametrize("pieces", [2, 3, 7])
def test_variance_of_a_sum_is_numpys(pieces):
    y = torch.randn(pieces, 40, dtype=torch.float64) + 2.0
    expected = pieces * np.var(y.numpy(), axis=0, ddof=1)
    found = sum_variance(y.square().sum(0), y.sum(0), pieces)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    rescaled = sum_variance(y.square().sum(0), 0.3 * y.sum(0), torch.tensor(float(pieces)), 0.3)
    np.testing.assert_allclose(rescaled.numpy(), 0.09 * expected, rtol=1e-6)


def test_variance_of_a_sum_is_unbiased():
    """Mean over many draws: sampling error sqrt(2 / (2 * 50_000)) = 0.45 % for 3 pieces."""
    y = 5.0 + 2.0 * torch.randn(3, 50_000, dtype=torch.float64)
    found = sum_variance(y.square().sum(0), y.sum(0), 3)
    assert float(found.mean()) == pytest.approx(3 * 4.0, rel=0.0135)


def test_variance_of_equal_pieces_is_not_negative():
    y = torch.full((3, 1000), 0.1) + torch.rand(1000)
    found = sum_variance(y.square().sum(0), y.sum(0), 3)
    assert (found >= 0).all()
    assert float(found.max()) < 1e-5


def test_variance_of_unequal_weights_is_biased_by_their_signal():
    """The stated bias, N/(N-1) * sum (w_k - 1/N)^2 * mean^2, where nothing is random."""
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    y = weights * 7.0
    found = sum_variance(y.square().sum(), y.sum(), 3)
    assert float(found) == pytest.approx(1.5 * float((weights - 1 / 3).square().sum()) * 49)


@pytest.mark.parametrize("beta1", [0.0, 0.8, 0.99])
def test_variance_of_an_ema_is_the_sum_of_its_squared_weights(beta1):
    for count in (1, 7, 10_000):
        weights = (1 - beta1) * beta1 ** np.arange(count)
        expected = np.square(weights / weights.sum()).sum()
        assert ema_mean_variance(beta1, count) == pytest.approx(expected, rel=1e-9)
    assert deviation_scale(beta1) == pytest.approx(1 + expected)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_gradient_scale(size):
    seen = size * torch.randn(9)
    assert float(gradient_scale(0.125 * seen, seen, 7.0)) == pytest.approx(0.125)
    assert float(gradient_scale(0.0 * seen, 0.0 * seen, 7.0)) == 7.0
    seen[3] = float("inf")
    assert not torch.isfinite(gradient_scale(seen, seen, 1.0))
