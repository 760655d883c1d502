import numpy as np
import pytest
import torch

from poprisk_integrations.core import (
    lagged_risk_decrease,
    population_risk_decrease,
    risk_decrease_from_ranks,
    risk_decrease_from_sums,
    risk_decrease_variance,
    risk_decrease_weighted,
)
from tests.reference.risk import pair_sum

MU = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64)
SD = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def gradients(*shape):
    return MU + SD * torch.randn(*shape, 3, dtype=torch.float64)


def test_per_example_form_equals_the_pair_sum():
    g = gradients(9)
    assert float(population_risk_decrease(g)) == pytest.approx(pair_sum(g.numpy()), rel=1e-12)


def test_both_variance_conventions_and_their_difference():
    g = gradients(9)
    b = len(g)
    u = float(population_risk_decrease(g))
    unbiased = float(g.var(0, correction=1).sum())
    biased = float(g.var(0, correction=0).sum())
    mean_sq = float(g.mean(0).square().sum())
    assert u == pytest.approx(mean_sq - unbiased / b, rel=1e-12)
    assert u == pytest.approx(mean_sq - biased / (b - 1), rel=1e-12)
    mixed = mean_sq - unbiased / (b - 1)  # the error of b/(b-1) that ports make
    assert u - mixed == pytest.approx(unbiased / (b * (b - 1)), rel=1e-9)


def test_microbatch_form_equals_the_pair_sum_of_means():
    g = gradients(8, 4).mean(1)
    sums = g.sum(0).square().sum(), g.square().sum()
    assert float(risk_decrease_from_sums(*sums, 8)) == pytest.approx(pair_sum(g.numpy()), rel=1e-12)


def test_rank_form_equals_the_microbatch_form():
    g = gradients(5)
    by_rank = risk_decrease_from_ranks(
        g.mean(0).square().sum(), g.square().sum(1).mean(), world_size=5
    )
    by_sums = risk_decrease_from_sums(g.sum(0).square().sum(), g.square().sum(), 5)
    assert float(by_rank) == pytest.approx(float(by_sums), rel=1e-12)


def test_weighted_form_is_unbiased_and_reduces_to_equal_weights():
    w = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    sizes = (1 / w) / (1 / w).sum()  # variance of G_j may differ; only independence matters
    g = MU + SD * sizes.sqrt().unsqueeze(-1) * torch.randn(200_000, 3, 3, dtype=torch.float64)
    a = w.unsqueeze(-1) * g
    u = risk_decrease_weighted(
        a.sum(1).square().sum(-1), a.square().sum((-1, -2)), float(w.square().sum())
    )
    truth = float(MU.square().sum())
    se = float(u.std() / len(u) ** 0.5)
    assert abs(float(u.mean()) - truth) < 4 * se < 0.1 * truth

    g = gradients(4)
    a = g / 4
    weighted = risk_decrease_weighted(a.sum(0).square().sum(), a.square().sum(), 0.25)
    plain = risk_decrease_from_sums(g.sum(0).square().sum(), g.square().sum(), 4)
    assert float(weighted) == pytest.approx(float(plain), rel=1e-12)


@pytest.mark.parametrize(("k", "m"), [(6, 1), (4, 8)])
def test_sampling_variance_is_exact_for_gaussian_gradients(k, m):
    g = MU + SD * torch.randn(150_000, k, 3, dtype=torch.float64) / m**0.5
    u = (g.sum(1).square().sum(-1) - g.square().sum((-1, -2))) / (k * (k - 1))
    expected = risk_decrease_variance(
        float((MU.square() * SD.square()).sum()), float((SD**4).sum()), k, m
    )
    assert float(u.var()) == pytest.approx(expected, rel=0.03)
    assert float(u.mean()) == pytest.approx(float(MU.square().sum()), rel=0.1)


def test_reuse_without_replacement_speaks_about_the_training_set():
    """E[U_batch | S] = U_n(S) without replacement; |g_bar_S|^2, never negative, with it."""
    rng = np.random.default_rng(0)
    data = gradients(12).numpy()
    without, with_ = [], []
    for _ in range(40_000):
        rows = torch.from_numpy(data[rng.choice(12, 4, replace=False)])
        without.append(float(population_risk_decrease(rows)))
        rows = torch.from_numpy(data[rng.integers(0, 12, 4)])
        with_.append(float(population_risk_decrease(rows)))
    u_n = float(population_risk_decrease(torch.from_numpy(data)))
    mean_sq = float((data.mean(0) ** 2).sum())
    assert np.mean(without) == pytest.approx(u_n, abs=4 * np.std(without) / 200)
    assert np.mean(with_) == pytest.approx(mean_sq, abs=4 * np.std(with_) / 200)
    assert abs(u_n - mean_sq) > 8 * np.std(with_) / 200  # the two statements differ here


def test_orthogonal_examples_carry_no_signal():
    assert float(population_risk_decrease(torch.eye(6, dtype=torch.float64))) == 0.0


def test_lagged_form_is_unbiased_even_under_selection_by_the_lagged_mean():
    n = 200_000
    mean = 0.3 + torch.randn(n, dtype=torch.float64)
    fresh = 0.3 + torch.randn(n, dtype=torch.float64)
    gate = (mean.square() > 1.0).double()
    c = lagged_risk_decrease(mean, fresh, gate) / n
    honest = 0.3 * (gate * mean).mean()
    plug_in = (gate * mean.square()).mean()
    assert float(c) == pytest.approx(float(honest), abs=0.01)
    assert float(plug_in) > 2 * float(honest)  # what selection by the same mean would report
    assert float(lagged_risk_decrease(mean, fresh) / n) == pytest.approx(0.09, abs=0.01)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: risk_decrease_from_sums(1.0, 1.0, 1), "count"),
        (lambda: risk_decrease_from_ranks(1.0, 1.0, 1), "world_size"),
        (lambda: risk_decrease_weighted(1.0, 1.0, 1.0), "sum_of_weight_sq"),
    ],
)
def test_too_little_data_is_named(call, name):
    with pytest.raises(ValueError, match=f"Invalid {name}: 1"):
        call()


def test_raw_statistic_crosses_at_half_the_best_time():
    """Quadratic loss, gradient flow on reused data: the root of U_n is at t*/2, per direction.

    w_t = w_hat (1 - e^{-ht}); with signal delta^2 = E w_star^2 and tau^2 = var(w_hat - w_star)
    the risk is smallest at e^{-h t*} = tau^2 / (delta^2 + tau^2).
    """
    h, delta, tau, n = 0.7, 1.5, 0.8, 400_000
    w_star = delta * torch.randn(n, dtype=torch.float64)
    w_hat = w_star + tau * torch.randn(n, dtype=torch.float64)
    times = torch.linspace(0.05, 5.0, 400, dtype=torch.float64)
    risks, statistics = [], []
    for t in times:
        decay = torch.exp(-h * t)
        risks.append(float((w_hat * (1 - decay) - w_star).square().mean()))
        # |g_S|^2 - tr(Sigma)/n with g_S = -h w_hat e^{-ht} and noise variance (h tau)^2
        statistics.append(float((h * w_hat * decay).square().mean() - (h * tau) ** 2))
    best = float(times[int(np.argmin(risks))])
    crossing = float(times[int(np.argmin(np.abs(statistics)))])
    assert best == pytest.approx(-np.log(tau**2 / (delta**2 + tau**2)) / h, rel=0.02)
    assert crossing == pytest.approx(best / 2, rel=0.03)


def test_evidence_based_criterion_is_the_whitened_statistic():
    """EB = 1 - (b/D) sum_k g_bar_k^2 / s_k^2 equals -(1/D) sum_k b U_k / s_k^2, exactly."""
    g = gradients(16)
    b, dims = g.shape
    variance = g.var(0, correction=1)
    per_coordinate = torch.stack([population_risk_decrease(g[:, [k]]) for k in range(dims)])
    eb = 1 - b / dims * float((g.mean(0).square() / variance).sum())
    assert eb == pytest.approx(-float((b * per_coordinate / variance).sum()) / dims, rel=1e-10)
