import pytest
import torch

from poprisk_integrations.core import (
    coordinate_ratio,
    population_risk_decrease,
    window_signal_ratio,
)
from tests.reference.risk import whitened_ratio, window_ratio, window_ratio_error


def ratio_of(tensors):
    """F of a list of (T, d) gradient histories."""
    return window_signal_ratio(
        torch.stack([g.sum(0).square().sum() for g in tensors]),
        torch.stack([g.square().sum() for g in tensors]),
        torch.tensor([float(g.shape[1]) for g in tensors]),
        steps=tensors[0].shape[0],
    )


def test_equals_twin():
    tensors = [torch.randn(10, d, dtype=torch.float64) + 0.2 for d in (3, 7, 1)]
    assert ratio_of(tensors).ratio == pytest.approx(
        window_ratio([g.numpy() for g in tensors]), rel=1e-10
    )


def test_pure_noise_has_mean_one():
    ratios = [ratio_of([torch.randn(20, 400, dtype=torch.float64)]).ratio for _ in range(50)]
    assert sum(ratios) / 50 == pytest.approx(1.0, abs=0.05)


def test_relation_to_the_u_statistic():
    """F = 1 + T * U / (tr S / T * T): F - 1 has the sign of U, exactly."""
    g = torch.randn(12, 30, dtype=torch.float64) + 0.1
    result = ratio_of([g])
    trace = float(result.noise[0])
    expected = 1 + 12 * float(population_risk_decrease(g)) / trace
    assert result.ratio == pytest.approx(expected, rel=1e-10)


def test_scale_of_the_loss_does_not_matter():
    g = torch.randn(12, 30, dtype=torch.float64) + 0.3
    assert ratio_of([g]).ratio == pytest.approx(ratio_of([g * 1e-9]).ratio, rel=1e-9)


def test_tensors_without_noise_are_left_out():
    g = torch.randn(12, 30, dtype=torch.float64)
    frozen, constant = torch.zeros(12, 500).double(), torch.ones(12, 500).double()
    result = ratio_of([g, frozen, constant])
    assert result.ratio == pytest.approx(ratio_of([g]).ratio, rel=1e-12)
    assert result.per_tensor.isnan().tolist() == [False, True, True]


def test_nothing_but_silence_is_nan():
    assert ratio_of([torch.zeros(4, 3)]).ratio != ratio_of([torch.zeros(4, 3)]).ratio


def test_pure_signal_never_crosses():
    g = 5.0 + 0.1 * torch.randn(10, 50, dtype=torch.float64)
    assert ratio_of([g]).ratio > 1000


def test_one_step_is_no_window():
    with pytest.raises(ValueError, match="Invalid steps: 1"):
        ratio_of([torch.ones(1, 3)])


def with_error(tensors):
    """F and its error of a list of (T, d) gradient histories."""
    return window_signal_ratio(
        torch.stack([g.sum(0).square().sum() for g in tensors]),
        torch.stack([g.square().sum() for g in tensors]),
        torch.tensor([float(g.shape[1]) for g in tensors]),
        steps=tensors[0].shape[0],
        norm_sq=torch.stack([g.square().sum(1) for g in tensors], dim=1),
    )


def test_error_equals_twin():
    tensors = [torch.randn(10, d, dtype=torch.float64) + 0.2 for d in (3, 7, 1)]
    tensors.append(torch.zeros(10, 5).double())
    result = with_error(tensors)
    assert result.ratio_se == pytest.approx(
        window_ratio_error([g.numpy() for g in tensors]), rel=1e-10
    )
    assert with_error([torch.zeros(4, 3)]).ratio_se != with_error([torch.zeros(4, 3)]).ratio_se
    assert ratio_of(tensors).ratio_se != ratio_of(tensors).ratio_se


def errors_over_windows(draw, windows=400):
    """Mean reported error over the true spread of F."""
    results = [with_error(draw()) for _ in range(windows)]
    ratios = torch.tensor([r.ratio for r in results])
    reported = torch.tensor([r.ratio_se for r in results]).square().mean().sqrt()
    return float(reported / ratios.std())


def spectrum(d, power):
    return torch.arange(1, d + 1, dtype=torch.float64) ** (-power / 2)


@pytest.mark.parametrize(("steps", "power"), [(12, 1.0), (40, 1.0), (40, 2.0)])
def test_error_of_pure_noise_is_right(steps, power):
    """A batch that is noisy in one tensor is noisy in the other: they share their directions."""
    scale = spectrum(60, power)

    def draw():
        x = torch.randn(steps, 60, dtype=torch.float64) * scale
        return [x, 3 * x[:, :20] + 0.1 * torch.randn(steps, 20, dtype=torch.float64)]

    assert errors_over_windows(draw) == pytest.approx(1.0, abs=0.15)


def test_error_under_signal_is_too_small_and_under_heavy_tails_too_large():
    scale = spectrum(60, 1.0)
    assert errors_over_windows(lambda: [torch.randn(30, 60).double() * scale + 0.3 * scale]) < 0.8
    tails = torch.distributions.StudentT(5.0)
    assert errors_over_windows(lambda: [tails.sample((30, 60)).double() * scale]) > 1.1


def coordinate_ratio_of(g):
    sums = coordinate_ratio(g.sum(0), g.square().sum(0), g.shape[0])
    return float(sums[0] / sums[1])


@pytest.mark.parametrize("steps", [8, 25])
def test_whitened_noise_has_mean_one_whatever_its_scale(steps):
    scale = 10.0 ** torch.linspace(-3, 3, 2000, dtype=torch.float64)
    found = [
        coordinate_ratio_of(torch.randn(steps, 2000, dtype=torch.float64) * scale)
        for _ in range(40)
    ]
    assert sum(found) / 40 == pytest.approx(1.0, abs=0.03)


def test_whitened_equals_twin_and_leaves_dead_coordinates_out():
    g = torch.randn(12, 30, dtype=torch.float64) + 0.3
    g[:, 5:9] = 0
    assert coordinate_ratio_of(g) == pytest.approx(whitened_ratio([g.numpy()]), rel=1e-10)


def test_a_coordinate_that_is_hit_once_counts_one_less_two_in_t():
    g = torch.zeros(20, 3, dtype=torch.float64)
    g[4, 0], g[9, 1], g[15, 2] = 0.1, -7.0, 3.0
    assert coordinate_ratio_of(g) == pytest.approx(1 - 2 / 19, rel=1e-6)


def test_a_coordinate_with_hardly_any_noise_counts_a_hundred():
    """A^2 / (T s^2) is far above 100 for the first of them."""
    g = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 2.0], [1.001, 1.0]] * 5, dtype=torch.float64)
    expected = whitened_ratio([g.numpy()[:, 1:]])
    assert coordinate_ratio_of(g) == pytest.approx((100 * 17 / 19 + expected) / 2, rel=1e-9)
