"""Where the gate opens, and how much it lets through; more of it in the twin's tests of `optim`."""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from poprisk_integrations.core import (
    calibrated_alpha,
    chi2_quantile_1dof,
    finite_alpha,
    gate_factor,
    open_mask,
    resolve_alpha,
)
from tests.reference.poprisk_adamw import Twin


@pytest.mark.parametrize("gate", ["soft", "hard", "snr", "none"])
@pytest.mark.parametrize(("alpha", "lambda_pop", "eps"), [(0.2, 0.2, 0.0), (1.0, 0.0, 1e-12)])
def test_gate_equals_twin(gate, alpha, lambda_pop, eps):
    mean = torch.randn(200, dtype=torch.float64)
    noise = torch.rand(200, dtype=torch.float64)
    noise[:10] = 0.0
    mean[:5] = 0.0
    twin = Twin(0.0, lr=0.0, gate=gate, alpha=alpha, lambda_pop=lambda_pop, gate_eps=eps)
    q = gate_factor(mean**2, noise, gate=gate, alpha=alpha, lambda_pop=lambda_pop, eps=eps).numpy()
    np.testing.assert_allclose(q, twin.q(mean.numpy(), noise.numpy()), rtol=1e-12)
    assert np.all((q >= 0) & (q <= 1))


@pytest.mark.parametrize("gate", ["soft", "hard", "snr"])
def test_no_noise_is_open_and_no_gradient_is_closed(gate):
    mean_sq, noise = torch.tensor([0.0, 1e-30]), torch.zeros(2)
    q = gate_factor(mean_sq, noise, gate=gate, alpha=0.2, lambda_pop=0.2)
    assert q.tolist() == [0.0, 1.0]
    assert open_mask(mean_sq, noise, 0.2).tolist() == [False, True]


def test_unknown_gate_is_named():
    with pytest.raises(ValueError, match="Invalid gate: 'firm'"):
        gate_factor(torch.ones(1), torch.ones(1), gate="firm", alpha=1.0, lambda_pop=1.0)


@pytest.mark.parametrize("p", [0.999, 0.5, 0.32, 0.05, 1e-3, 7.7e-6, 1e-12])
def test_chi2_quantile_equals_scipy(p):
    assert chi2_quantile_1dof(p) == pytest.approx(chi2.isf(p, 1), rel=1e-9)


@pytest.mark.parametrize(
    ("rate", "alpha"), [(0.32, 0.050), (0.10, 0.135), (0.05, 0.192), (0.001, 0.541), (7.7e-6, 1.0)]
)
def test_calibration_table(rate, alpha):
    """For beta1 = 0.9; the last is the published boundary, a test at four and a half sigma."""
    assert calibrated_alpha(0.9, rate) == pytest.approx(alpha, abs=1e-3)


def test_finite_alpha_turns_batch_variance_into_leave_one_out_penalty():
    """Exact for batches without replacement: Var(batch mean) * b/(n-b) = Sigma / (n-1)."""
    x = torch.tensor([0.3, -1.2, 2.0, 0.7, -0.4, 1.1], dtype=torch.float64)
    n, b = len(x), 2
    means = torch.tensor([float(x[list(c)].mean()) for c in combinations(range(n), b)])
    variance = float(means.double().var(correction=0))
    penalty = float(x.var(correction=0)) / (n - 1)
    assert variance * finite_alpha(b, n) == pytest.approx(penalty, rel=1e-6)


def test_resolve_names_and_numbers():
    common = {"beta1": 0.9, "false_open_rate": 0.05}
    assert resolve_alpha("fresh", **common) == 1.0
    assert resolve_alpha(0.3, **common) == 0.3
    assert resolve_alpha("calibrated", **common) == calibrated_alpha(0.9, 0.05)
    assert resolve_alpha("finite", **common, batch_size=1, dataset_size=5) == 0.25


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": "best"}, "Invalid alpha: 'best'"),
        ({"alpha": -1.0}, "Invalid alpha: -1"),
        ({"alpha": float("nan")}, "Invalid alpha: nan"),
        ({"alpha": "finite"}, "needs batch_size and dataset_size"),
        ({"alpha": "finite", "batch_size": 8, "dataset_size": 8}, "Invalid dataset_size: 8"),
        ({"alpha": "finite", "batch_size": 0, "dataset_size": 8}, "Invalid batch_size: 0"),
        ({"alpha": "calibrated", "false_open_rate": 1.0}, "Invalid false_open_rate: 1.0"),
        ({"alpha": "calibrated", "beta1": 1.0}, "Invalid beta1: 1.0"),
    ],
)
def test_bad_alpha_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        resolve_alpha(**{"beta1": 0.9, "false_open_rate": 0.05, **kwargs})
