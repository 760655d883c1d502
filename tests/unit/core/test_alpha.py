import pytest
import torch
from scipy.stats import chi2

from poprisk_integrations.core import (
    calibrated_alpha,
    chi2_quantile_1dof,
    ema_mean_variance,
    finite_alpha,
    resolve_alpha,
)


@pytest.mark.parametrize("p", [0.999, 0.5, 0.32, 0.05, 1e-3, 7.7e-6, 1e-12])
def test_chi2_quantile_equals_scipy(p):
    assert chi2_quantile_1dof(p) == pytest.approx(chi2.isf(p, 1), rel=1e-9)


# The table of the calibration for beta1 = 0.9, to its printed digits.
@pytest.mark.parametrize(
    ("rate", "alpha"),
    [(0.5, 0.023), (0.32, 0.050), (0.10, 0.135), (0.05, 0.192), (0.01, 0.332), (0.001, 0.541)],
)
def test_calibration_table(rate, alpha):
    assert calibrated_alpha(0.9, rate) == pytest.approx(alpha, abs=1e-3)


def test_published_alpha_is_a_four_and_a_half_sigma_test():
    assert calibrated_alpha(0.9, 7.7e-6) == pytest.approx(1.0, rel=5e-3)


def test_ema_mean_variance_equals_the_sum_of_squared_weights():
    beta1, t = 0.8, 7
    weights = torch.tensor([(1 - beta1) * beta1**k for k in range(t)], dtype=torch.float64)
    weights /= weights.sum()
    assert ema_mean_variance(beta1, t) == pytest.approx(float(weights.square().sum()), rel=1e-12)


def test_finite_alpha_turns_batch_variance_into_leave_one_out_penalty():
    """Exact for batches without replacement: Var(batch mean) * b/(n-b) = Sigma / (n-1)."""
    from itertools import combinations

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
