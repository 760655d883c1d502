"""Open fractions: closed forms against simulation and core, shadow states against the optimizer."""

import math

import pytest
import torch
from scipy import stats

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.core import calibrated_alpha
from poprisk_integrations.diagnostics.probe.gates import (
    half_open_snr,
    noise_open_at_step,
    open_probability,
    run_shadow_gates,
)


@pytest.mark.parametrize("beta1", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("rate", [0.001, 0.05, 0.32])
def test_pure_noise_passes_at_the_calibrated_rate(beta1, rate):
    alpha = calibrated_alpha(beta1, rate)
    found = float(open_probability(torch.zeros(1), alpha, beta1))
    assert found == pytest.approx(rate, rel=1e-6)
    assert noise_open_at_step(alpha, beta1, 3000) == pytest.approx(rate, rel=1e-3)


def test_the_published_boundary():
    """4.5 sigma: 7.7e-6 of pure noise, and half of the coordinates at an SNR of 1.03."""
    assert float(open_probability(torch.zeros(1), 1.0, 0.9)) == pytest.approx(7.7e-6, rel=0.01)
    middle = torch.tensor([half_open_snr(1.0, 0.9)])
    assert float(open_probability(middle, 1.0, 0.9)) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("snr", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [1.0, 0.192, 0.0494])
def test_long_run_agrees_with_simulation(snr, alpha):
    (found,) = run_shadow_gates(
        snr + torch.randn(400, 2_000), torch.ones(2_000), torch.zeros(2_000).long(), [alpha]
    )
    noise, expected = open_probability(torch.tensor([0.0, snr]), alpha, 0.9).tolist()
    assert found.open_fraction == pytest.approx(expected, abs=0.02)
    assert found.noise_open == pytest.approx(noise, rel=0.05)


@pytest.mark.parametrize(("step", "error"), [(2, 0.1), (5, 0.05), (30, 0.02)])
def test_early_noise_against_simulation(step, error):
    """s_hat is an average of few deviations then: Student's tails, wider than the normal's."""
    (found,) = run_shadow_gates(
        torch.randn(step, 40_000), torch.ones(40_000), torch.zeros(40_000).long(), [0.05]
    )
    assert found.open_fraction == pytest.approx(found.noise_open, abs=error)
    if step < 6:  # of which only the last one counts
        assert found.noise_open == noise_open_at_step(0.05, 0.9, step)


def twin_noise_open(alpha, beta1, rho, step):
    """Moments of m_hat and s_hat from the weights of each gradient, then scipy's chi-square."""

    def mean_variance(t):
        weights = [beta1 ** (t - k) for k in range(1, t + 1)]
        return sum(w**2 for w in weights) / sum(weights) ** 2

    noise, total = 0.0, 0.0
    for k in range(2, step + 1):
        noise += rho ** (step - k) * (1 + mean_variance(k - 1))
        total += rho ** (step - k)
    return stats.chi2(1).sf(alpha * noise / total / mean_variance(step))


@pytest.mark.parametrize("step", [2, 7, 30])
def test_early_noise_equals_twin(step):
    found = noise_open_at_step(0.2, 0.9, step)
    assert found == pytest.approx(twin_noise_open(0.2, 0.9, 0.99, step), rel=1e-9)


@pytest.mark.parametrize("alpha", [1.0, 0.192])
def test_shadow_states_are_those_of_the_optimizer(alpha):
    """PopRiskAdamW steps on the same gradients and reports its own statistics."""
    steps, size = 24, 500
    gradients = torch.randn(steps, size) + torch.linspace(0, 1, size)
    param = torch.nn.Parameter(torch.zeros(size))
    options = {"alpha": alpha, "noise_source": "temporal", "collect_stats_every": 1}
    optimizer = PopRiskAdamW([param], betas=(0.9, 0.99), **options)
    rows = []
    for grad in gradients:
        param.grad = grad.clone()
        optimizer.step()
        rows.append({k: float(v) for k, v in optimizer.gate_stats().items()})
    (found,) = run_shadow_gates(
        gradients, torch.ones(size), torch.zeros(size).long(), [alpha], (0.9, 0.99)
    )
    for name in ("open_fraction", "mean_gate"):
        expected = sum(row[name] for row in rows[-8:]) / 8
        assert getattr(found, name) == pytest.approx(expected, rel=1e-4)
    ratios = [row["update_norm_ratio"] for row in rows[-8:]]
    assert min(ratios) < found.update_norm_ratio < max(ratios)


def test_groups_and_weights():
    gradients = torch.tensor([1.0, 0.0, 1.0]).expand(12, 3)
    group, weight = torch.tensor([0, 0, 1]), torch.tensor([1.0, 3.0, 0.0])
    (found,) = run_shadow_gates(gradients, weight, group, [0.2])
    assert found.open_fractions[0] == 0.25
    assert math.isnan(found.open_fractions[1])
    assert found.open_fraction == 0.25
