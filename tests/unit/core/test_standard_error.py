import math

import pytest
import torch

from poprisk_integrations.core import mean_standard_error
from tests.reference.risk import bartlett_error


def autoregression(coefficient, count, runs):
    """Stationary AR(1) of innovation variance 1, shape (runs, count)."""
    x = torch.empty(runs, count, dtype=torch.float64)
    x[:, 0] = torch.randn(runs, dtype=torch.float64) / math.sqrt(1 - coefficient**2)
    for t in range(1, count):
        x[:, t] = coefficient * x[:, t - 1] + torch.randn(runs, dtype=torch.float64)
    return x


@pytest.mark.parametrize(("count", "lags"), [(2, 1), (9, 0), (9, 3), (40, 5), (6, 5)])
def test_equals_twin(count, lags):
    values = torch.randn(count, dtype=torch.float64) + 2
    mean, error = mean_standard_error(values, lags)
    assert mean == pytest.approx(float(values.mean()))
    assert error == pytest.approx(bartlett_error(values.tolist(), lags), rel=1e-9)


@pytest.mark.parametrize(("count", "lags"), [(8, 2), (99, 3), (100, 4), (1000, 6), (2, 1)])
def test_default_lags(count, lags):
    values = torch.randn(count, dtype=torch.float64)
    assert mean_standard_error(values) == mean_standard_error(values, lags)


def test_no_lags_are_the_usual_error():
    values = torch.randn(30, dtype=torch.float64)
    assert mean_standard_error(values, 0)[1] == pytest.approx(float(values.std()) / 30**0.5)


@pytest.mark.parametrize("count", [4, 8, 50])
def test_variance_is_unbiased_for_independent_values(count):
    errors = [mean_standard_error(row)[1] for row in torch.randn(4000, count).double()]
    squares = torch.tensor(errors).square() * count
    assert float(squares.mean()) == pytest.approx(1.0, abs=4 * float(squares.std()) / 4000**0.5)


@pytest.mark.parametrize(
    ("coefficient", "lags", "low", "high"),
    [(0.5, None, 0.65, 0.85), (0.5, 20, 0.85, 1.1), (-0.4, None, 0.95, 1.35)],
)
def test_autoregression(coefficient, lags, low, high):
    """Share of the true variance of the mean that is found; without lags 0.34 of 0.5."""
    count = 100
    rows = autoregression(coefficient, count, 600)
    found = sum(mean_standard_error(row, lags)[1] ** 2 for row in rows) / len(rows)
    covariance = [coefficient**j / (1 - coefficient**2) for j in range(count)]
    true = covariance[0] + 2 * sum((1 - j / count) * covariance[j] for j in range(1, count))
    assert low < found * count / true < high


def test_ends_of_the_range():
    assert all(math.isnan(x) for x in mean_standard_error(torch.tensor([1.0])))
    assert all(math.isnan(x) for x in mean_standard_error(torch.tensor([])))
    assert mean_standard_error(torch.full((9,), 0.1)) == (pytest.approx(0.1), pytest.approx(0.0))
    assert mean_standard_error(torch.tensor([1.0, 2.0, 4.0]), 7)[1] >= 0
    with pytest.raises(ValueError, match="Invalid lags: -1"):
        mean_standard_error(torch.ones(3), -1)
