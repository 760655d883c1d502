import pytest
import torch

from poprisk_integrations.core import noise_is_ready, update_dev_sq_


def test_update_is_the_published_recursion():
    s, g, m = (torch.rand(50, dtype=torch.float64) for _ in range(3))
    expected = 0.97 * s + 0.03 * (g - m) ** 2
    out = update_dev_sq_(s, g, m, 0.97, 0.03)
    assert out is s
    torch.testing.assert_close(s, expected)


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


def test_first_step_is_ungated_except_in_the_published_rule():
    assert not noise_is_ready(0, 0, centered=True)
    assert noise_is_ready(1, 0, centered=True)
    assert noise_is_ready(1, 0, centered=False)


@pytest.mark.parametrize("centered", [True, False])
def test_warmup_counts_steps(centered):
    behind = 1 if centered else 0  # deviations seen at step t
    ready = [t for t in range(1, 8) if noise_is_ready(t - behind, 5, centered=centered)]
    assert ready == [6, 7]
