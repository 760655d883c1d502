"""The noise rate is found on margins of known noise; the interval covers; posteriors are Bayes'."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from poprisk_integrations.core.flip_probability import flip_probability
from poprisk_integrations.core.noise_rate import (
    NoiseRateEstimate,
    double_annotation_rate,
    estimate_noise_rate,
)
from poprisk_integrations.core.untrained_margins import UntrainedMargins
from tests.reference import preferences as twin


def record_of(margins: Any) -> UntrainedMargins:
    record = UntrainedMargins(len(margins))
    record.record(torch.arange(len(margins)), torch.as_tensor(margins), step=0)
    return record


def sample(rate: float, count: int = 1500, slope: float = 8.0, seed: int = 0) -> np.ndarray:
    """Margins of a model that is right with probability s(slope |h|), labels flipped at a rate."""
    rng = np.random.default_rng(seed)
    size = np.abs(rng.normal(0, 0.5, count)) * rng.uniform(0, 1, count)  # it learns meanwhile
    agrees = (rng.random(count) < twin.s(slope * size)) ^ (rng.random(count) < rate)
    return np.where(agrees, size, -size)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.3, 0.4])
def test_error_is_at_most_five_points(rate: float) -> None:
    found = [estimate_noise_rate(record_of(sample(rate, seed=seed))).rate for seed in range(8)]
    assert np.mean(np.abs(np.array(found) - rate)) < 0.05
    assert abs(np.mean(found) - rate) < 0.04  # a mean is pulled from the ends of the range


def test_posterior_equals_a_plain_sum() -> None:
    h = sample(0.3, count=390)  # below the number of bins: the likelihood is exact
    estimate = estimate_noise_rate(record_of(h))
    rates, slopes = np.linspace(0, 0.49, 50), np.geomspace(0.01, 100, 61)
    mean, distribution = twin.rate_posterior(h, rates, slopes)
    assert estimate.rate == pytest.approx(mean, abs=0.003)
    assert estimate.low == pytest.approx(np.interp(0.025, distribution, rates), abs=0.015)
    assert estimate.high == pytest.approx(np.interp(0.975, distribution, rates), abs=0.015)


def test_maximum_likelihood_is_that_of_a_general_optimizer() -> None:
    h = sample(0.3, count=390)
    best = minimize(
        lambda p: -twin.log_likelihood(h, 0.5 * twin.s(p[0]), math.exp(p[1])),
        x0=[0.0, 0.0],
        method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-10, "maxiter": 4000},
    )
    found = estimate_noise_rate(record_of(h)).maximum_likelihood
    assert found == pytest.approx(0.5 * twin.s(best.x[0]), abs=0.006)


def test_a_weak_model_does_not_pass_for_one_that_is_always_sure() -> None:
    """Two thirds of the clean labels ranked rightly: the maximum is anywhere, the mean is not."""
    rng = np.random.default_rng(0)
    errors, maxima = [], []
    for _ in range(12):
        h = rng.normal(0.43, 1, 1000) * np.where(rng.random(1000) < 0.3, -1, 1)
        estimate = estimate_noise_rate(record_of(h))
        errors.append(abs(estimate.rate - 0.3))
        maxima.append(abs(estimate.maximum_likelihood - 0.3))
    assert np.mean(errors) < 0.09
    assert np.mean(errors) < 0.6 * np.mean(maxima)


def test_interval_covers() -> None:
    inside = 0
    for seed in range(60):
        estimate = estimate_noise_rate(record_of(sample(0.25, count=800, seed=seed)))
        inside += estimate.low <= 0.25 <= estimate.high
    assert inside >= 52  # 57 expected; fewer than 52 has a probability of about 1 %


def test_many_pairs_share_bins_without_harm() -> None:
    h = sample(0.2, count=40_000)
    estimate = estimate_noise_rate(record_of(h))
    assert estimate.rate == pytest.approx(0.2, abs=0.015)
    assert estimate.high - estimate.low < 0.05


def test_bounds_are_the_shares_of_contradicted_labels() -> None:
    h = sample(0.3)
    estimate = estimate_noise_rate(record_of(h))
    top = np.argsort(np.abs(h), kind="stable")[-150:]
    assert estimate.upper_bound == pytest.approx(np.mean(h < 0))
    assert estimate.anchor == pytest.approx(np.mean(h[top] < 0))
    assert estimate.num_pairs == 1500


def test_margins_without_information_say_so() -> None:
    rng = np.random.default_rng(0)
    estimate = estimate_noise_rate(record_of(rng.normal(size=1000)))
    assert not estimate.informative
    assert estimate.low == 0.0
    assert str(estimate).startswith("the margins do not tell how many labels are wrong (0 to 49 %")
    assert estimate_noise_rate(record_of(sample(0.3))).informative
    nothing = estimate_noise_rate(record_of(np.zeros(100)))
    assert (nothing.low, nothing.slope, nothing.informative) == (0.0, 0.0, False)
    assert nothing.upper_bound == 0.5


def test_scale_of_the_margins_does_not_matter() -> None:
    h = sample(0.3)
    estimates = [estimate_noise_rate(record_of(factor * h)) for factor in (1e-6, 1.0, 1e6)]
    rates = [estimate.rate for estimate in estimates]
    assert rates == pytest.approx([rates[1]] * 3, abs=1e-9)
    assert estimates[0].slope == pytest.approx(1e6 * estimates[1].slope)


def test_unseen_pairs_do_not_count() -> None:
    h = sample(0.3)
    record = UntrainedMargins(3000)
    record.record(torch.arange(0, 3000, 2), torch.as_tensor(h), step=0)
    assert estimate_noise_rate(record) == estimate_noise_rate(record_of(h))


def test_too_few_pairs() -> None:
    with pytest.raises(ValueError, match=r"49 pairs have a margin .* at least 50"):
        estimate_noise_rate(record_of(sample(0.3, count=49)))


def test_wrong_use_is_not_possible() -> None:
    with pytest.raises(AttributeError):
        estimate_noise_rate(torch.randn(100))  # type: ignore[arg-type]


def test_estimate_as_text_and_json() -> None:
    estimate = estimate_noise_rate(record_of(sample(0.3)))
    assert NoiseRateEstimate(**estimate.to_json()) == estimate
    assert "of the labels look wrong (95 % interval" in str(estimate)


@pytest.mark.parametrize(("pairs", "disagree"), [(300, 96), (1000, 0), (10, 1)])
def test_double_annotation(pairs: int, disagree: int) -> None:
    rate, error = double_annotation_rate(pairs, disagree)
    assert 2 * rate * (1 - rate) == pytest.approx(disagree / pairs)
    step = 1e-6
    share = disagree / pairs
    derivative = ((1 - math.sqrt(1 - 2 * (share + step))) / 2 - rate) / step
    expected = derivative * math.sqrt(share * (1 - share) / pairs)
    assert error == pytest.approx(expected, rel=1e-4)


def test_double_annotation_by_simulation() -> None:
    rng = np.random.default_rng(0)
    wrong = rng.random((2000, 300, 2)) < 0.2
    counts = (wrong[..., 0] != wrong[..., 1]).sum(1)
    found = [double_annotation_rate(300, int(count)) for count in counts]
    rates, errors = np.array(found).T
    assert rates.mean() == pytest.approx(0.2, abs=0.002)
    assert errors.mean() == pytest.approx(rates.std(), rel=0.1)


def test_double_annotation_bad_counts() -> None:
    assert double_annotation_rate(10, 5) == (0.5, math.inf)
    with pytest.raises(ValueError, match="num_pairs: 0"):
        double_annotation_rate(0, 0)
    for count in (-1, 11):
        with pytest.raises(ValueError, match=f"num_disagreements: {count}"):
            double_annotation_rate(10, count)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.49])
def test_flip_probability_is_bayes_rule(rate: float) -> None:
    h = torch.linspace(-4, 4, 33, dtype=torch.float64)
    expected = twin.flip_posterior(h.numpy(), rate, 2.5)
    np.testing.assert_allclose(flip_probability(h, rate, 2.5).numpy(), expected, rtol=1e-12)


def test_flip_probability_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(0, 1, 100_000))
    clean = rng.random(size.shape) < twin.s(2 * size)
    wrong = rng.random(size.shape) < 0.3
    h = np.where(clean ^ wrong, size, -size)
    p = flip_probability(torch.as_tensor(h), 0.3, 2.0).numpy()
    for low in np.arange(0, 1, 0.2):
        bin_ = (p >= low) & (p < low + 0.2)
        assert wrong[bin_].mean() == pytest.approx(p[bin_].mean(), abs=0.01)


def test_flip_probability_without_noise_or_margin() -> None:
    h = torch.tensor([-9.0, 9.0, math.nan])
    assert flip_probability(h, 0.0, 2.0)[:2].tolist() == [0.0, 0.0]
    assert flip_probability(h, 0.0, 2.0)[2].isnan()
    assert flip_probability(h, 0.3, 2.0)[2].isnan()
    assert flip_probability(h[:2], 0.3, 0.0).tolist() == pytest.approx([0.3, 0.3])
