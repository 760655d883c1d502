import math

import pytest
import torch

from poprisk_integrations.core import coordinate_ratio, mean_standard_error, window_signal_ratio
from tests.reference.risk import (
    bartlett_error,
    pair_sum,
    whitened_ratio,
    window_ratio,
    window_ratio_error,
)


def draw(steps, *sizes, mean=0.0):
    return [torch.randn(steps, d, dtype=torch.float64) + mean for d in sizes]


def ratio_of(tensors, *, with_error=True):
    """F of a list of (T, d) gradient histories, and its error."""
    norms = torch.stack([g.square().sum(1) for g in tensors], dim=1)
    return window_signal_ratio(
        torch.stack([g.sum(0).square().sum() for g in tensors]),
        norms.sum(0),
        torch.tensor([float(g.shape[1]) for g in tensors]),
        steps=tensors[0].shape[0],
        norm_sq=norms if with_error else None,
    )


def test_equals_its_twin_and_leaves_out_tensors_without_noise():
    tensors = draw(10, 3, 7, 1, mean=0.2)
    arrays = [g.numpy() for g in tensors]
    found = ratio_of([*tensors, torch.zeros(10, 500).double(), torch.ones(10, 500).double()])
    assert found.ratio == pytest.approx(window_ratio(arrays), rel=1e-10)
    assert found.ratio_se == pytest.approx(window_ratio_error(arrays), rel=1e-10)
    assert found.per_tensor.isnan().tolist() == [False] * 3 + [True] * 2
    scaled = ratio_of([g * 1e-9 for g in tensors])
    assert scaled.ratio == pytest.approx(found.ratio, rel=1e-9)
    assert math.isnan(ratio_of(tensors, with_error=False).ratio_se)
    assert math.isnan(ratio_of([torch.zeros(4, 3)]).ratio)
    with pytest.raises(ValueError, match="Invalid steps: 1"):
        ratio_of([torch.ones(1, 3)])


def test_noise_has_mean_one_and_signal_never_crosses():
    ratios = [ratio_of(draw(20, 400)).ratio for _ in range(50)]
    assert sum(ratios) / 50 == pytest.approx(1.0, abs=0.05)
    assert ratio_of([5.0 + 0.1 * g for g in draw(10, 50)]).ratio > 1000


def test_it_lies_above_one_where_gradients_agree():
    """F = 1 + T U / tr S with the U-statistic of |E g|^2, exactly."""
    (g,) = draw(12, 30, mean=0.1)
    found = ratio_of([g])
    expected = 1 + 12 * pair_sum(g.numpy()) / float(found.noise[0])
    assert found.ratio == pytest.approx(expected, rel=1e-10)


def share_of_error(sample, windows):
    """Mean reported error over the true spread of F."""
    results = [ratio_of(sample()) for _ in range(windows)]
    reported = torch.tensor([r.ratio_se for r in results]).square().mean().sqrt()
    return float(reported / torch.tensor([r.ratio for r in results]).std())


def spectrum(power):
    return torch.arange(1, 61, dtype=torch.float64) ** (-power / 2)


def of_shared_noise(steps, power):
    """A batch that is noisy in one tensor is noisy in the other: they share their directions."""
    x = draw(steps, 60)[0] * spectrum(power)
    return [x, 3 * x[:, :20] + 0.1 * draw(steps, 20)[0]]


def test_the_error_of_pure_noise_is_right():
    assert share_of_error(lambda: of_shared_noise(12, 1.0), 150) == pytest.approx(1.0, abs=0.25)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "power"), [(12, 1.0), (40, 1.0), (40, 2.0)])
def test_the_error_of_pure_noise_is_right_at_length(steps, power):
    found = share_of_error(lambda: of_shared_noise(steps, power), 400)
    assert found == pytest.approx(1.0, abs=0.15)


def test_the_error_under_signal_is_too_small_and_under_heavy_tails_too_large():
    scale, tails = spectrum(1.0), torch.distributions.StudentT(5.0)
    assert share_of_error(lambda: [draw(30, 60, mean=0.3)[0] * scale], 200) < 0.8
    assert share_of_error(lambda: [tails.sample((30, 60)).double() * scale], 400) > 1.1


def whitened(g):
    sums = coordinate_ratio(g.sum(0), g.square().sum(0), g.shape[0])
    return float(sums[0] / sums[1])


@pytest.mark.parametrize("steps", [8, 25])
def test_whitened_noise_has_mean_one_whatever_its_scale(steps):
    scale = 10.0 ** torch.linspace(-3, 3, 2000, dtype=torch.float64)
    found = [whitened(draw(steps, 2000)[0] * scale) for _ in range(40)]
    assert sum(found) / 40 == pytest.approx(1.0, abs=0.03)


def test_whitened_equals_its_twin_and_leaves_dead_coordinates_out():
    (g,) = draw(12, 30, mean=0.3)
    g[:, 5:9] = 0
    assert whitened(g) == pytest.approx(whitened_ratio([g.numpy()]), rel=1e-10)
    once = torch.zeros(20, 3, dtype=torch.float64)  # a coordinate that is hit once counts 1 - 2/T
    once[4, 0], once[9, 1], once[15, 2] = 0.1, -7.0, 3.0
    assert whitened(once) == pytest.approx(1 - 2 / 19, rel=1e-6)


def test_a_coordinate_with_hardly_any_noise_counts_a_hundred():
    """A^2 / (T s^2) is far above 100 for the first of them."""
    g = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 2.0], [1.001, 1.0]] * 5, dtype=torch.float64)
    expected = whitened_ratio([g.numpy()[:, 1:]])
    assert whitened(g) == pytest.approx((100 * 17 / 19 + expected) / 2, rel=1e-9)


class TestMeanStandardError:
    @pytest.mark.parametrize(("count", "lags"), [(2, 1), (9, 0), (9, 3), (40, 5), (6, 5)])
    def test_equals_its_twin(self, count, lags):
        values = torch.randn(count, dtype=torch.float64) + 2
        mean, error = mean_standard_error(values, lags)
        assert mean == pytest.approx(float(values.mean()))
        assert error == pytest.approx(bartlett_error(values.tolist(), lags), rel=1e-9)

    @pytest.mark.parametrize(("count", "lags"), [(8, 2), (99, 3), (100, 4), (1000, 6), (2, 1)])
    def test_default_lags(self, count, lags):
        values = torch.randn(count, dtype=torch.float64)
        assert mean_standard_error(values) == mean_standard_error(values, lags)

    @pytest.mark.parametrize("count", [4, 50])
    def test_its_variance_is_unbiased_for_independent_values(self, count):
        errors = [mean_standard_error(row)[1] for row in torch.randn(2000, count).double()]
        squares = torch.tensor(errors).square() * count
        spread = float(squares.std()) / 2000**0.5
        assert float(squares.mean()) == pytest.approx(1.0, abs=4 * spread)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("coefficient", "lags", "low", "high"),
        [(0.5, None, 0.65, 0.85), (0.5, 20, 0.85, 1.1), (-0.4, None, 0.95, 1.35)],
    )
    def test_share_of_the_variance_of_a_serial_mean(self, coefficient, lags, low, high):
        """Without lags it would be 0.34 of AR(1) values with 0.5."""
        count, rows = 100, torch.empty(600, 100, dtype=torch.float64)
        rows[:, 0] = torch.randn(600, dtype=torch.float64) / math.sqrt(1 - coefficient**2)
        for t in range(1, count):
            rows[:, t] = coefficient * rows[:, t - 1] + torch.randn(600, dtype=torch.float64)
        found = sum(mean_standard_error(row, lags)[1] ** 2 for row in rows) / len(rows)
        covariance = [coefficient**j / (1 - coefficient**2) for j in range(count)]
        true = covariance[0] + 2 * sum((1 - j / count) * covariance[j] for j in range(1, count))
        assert low < found * count / true < high

    def test_ends_of_the_range(self):
        assert all(map(math.isnan, mean_standard_error(torch.tensor([1.0]))))
        found = mean_standard_error(torch.full((9,), 0.1))
        assert found == (pytest.approx(0.1), pytest.approx(0.0))
        assert mean_standard_error(torch.tensor([1.0, 2.0, 4.0]), 7)[1] >= 0
        with pytest.raises(ValueError, match="Invalid lags: -1"):
            mean_standard_error(torch.ones(3), -1)
