"""The interval covers whatever the margins are, or they do not tell; posteriors are Bayes'."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, norm

from poprisk_integrations.core.flip_probability import flip_probability
from poprisk_integrations.core.noise_rate import (
    NoiseRateEstimate,
    double_annotation_rate,
    estimate_noise_rate,
    fitted_slope,
)
from poprisk_integrations.core.untrained_margins import UntrainedMargins
from tests.reference import preferences as twin


def record_of(margins: Any, batch: int = 16) -> UntrainedMargins:
    record = UntrainedMargins(len(margins))
    rows = torch.arange(len(margins))
    record.record(rows, torch.as_tensor(margins), step=rows // batch)
    return record


def sample(
    rate: float, count: int = 1500, signal: float = 1.2, seed: int = 0, family: str = "gaussian"
) -> np.ndarray:
    """Margins in the order of training; right labels are `signal` above zero but for noise."""
    rng = np.random.default_rng(seed)
    time = (np.arange(count) + 0.5) / count
    noise = {
        "gaussian": lambda: rng.normal(size=count),
        "laplace": lambda: rng.laplace(size=count),
        "student": lambda: rng.standard_t(3, size=count),
        "learning": lambda: rng.normal(size=count),
        "unsignalled": lambda: rng.normal(size=count),
    }[family]()
    clean = signal + noise
    if family == "learning":
        clean = np.sqrt(time) * (1.5 * signal * np.sqrt(time) + noise)
    if family == "unsignalled":
        clean = np.where(rng.random(count) < 0.3, 0, signal) + noise
    return np.where(rng.random(count) < rate, -clean, clean)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.3])
def test_a_strong_model_tells_the_rate(rate: float) -> None:
    found = [estimate_noise_rate(record_of(sample(rate, 4000, seed=seed))) for seed in range(4)]
    rates = np.array([estimate.rate for estimate in found], dtype=float)  # a None would fail
    assert np.abs(rates - rate).max() < 0.05
    assert all(estimate.low <= rate <= estimate.high for estimate in found)


@pytest.mark.parametrize("family", ["gaussian", "laplace", "student", "learning", "unsignalled"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_intervals_cover_where_the_model_has_hardly_learned(family: str, rate: float) -> None:
    """AUC of the margins 0.55 to 0.75: few or none of the intervals may miss."""
    cases = [(signal, seed) for signal in (0.1, 0.25, 0.5) for seed in range(3)]
    missed, told = 0, 0
    for signal, seed in cases:
        margins = sample(rate, 1000, signal, 100 + seed, family)
        estimate = estimate_noise_rate(record_of(margins))
        missed += not estimate.low <= rate <= estimate.high
        told += estimate.informative
        assert estimate.informative or estimate.low == 0.0
    assert missed <= 1  # of 9; by chance more have a probability of some 3 %
    assert told <= 5


def test_heavy_tails_put_no_lower_end() -> None:
    """Clean labels, and margins whose size says nothing of their certainty: like 25 % wrong."""
    for seed in range(6):
        estimate = estimate_noise_rate(record_of(sample(0.0, 3000, 0.62, seed, "laplace")))
        assert estimate.low == 0.0
        assert estimate.high > 0.2


def test_the_upper_end_needs_no_curve() -> None:
    """Wilson's limit of the contradicted labels, the smallest over four groups."""
    h = sample(0.3, 90)  # one stretch: nothing is scaled
    order = np.argsort(-np.abs(h), kind="stable")
    level = 1 - 2 * norm.sf(2.5)
    limits = []
    for share in (0.1, 0.2, 0.4, 1.0):
        wrong = h[order][: round(share * len(h))] < 0
        test = binomtest(int(wrong.sum()), len(wrong))
        limits.append(test.proportion_ci(level, method="wilson").high)
    estimate = estimate_noise_rate(record_of(h))
    assert estimate.high == pytest.approx(min(*limits, 0.49), abs=1e-9)


def test_the_lower_end_is_that_of_a_likelihood_ratio() -> None:
    h = sample(0.12, 199, signal=2.0, seed=4)  # one stretch
    h = h / np.sqrt(np.mean(h**2))

    def profile(rate: float) -> float:
        best = minimize_scalar(
            lambda log_k: -twin.log_likelihood(h, rate, math.exp(log_k)),
            bounds=(-3.4, 3.4),
            method="bounded",
        )
        return -float(best.fun)

    rates = np.linspace(0, 0.49, 50)
    likelihood = np.array([profile(rate) for rate in rates])
    first = rates[likelihood >= likelihood.max() - 2.7][0]
    estimate = estimate_noise_rate(record_of(h))
    assert estimate.informative
    assert 0.02 < estimate.low == pytest.approx((first - 0.03) / 0.94, abs=0.011)


def test_fitted_slope_is_that_of_a_general_optimizer() -> None:
    h = sample(0.3, count=300)
    best = minimize_scalar(
        lambda log_k: -twin.log_likelihood(h, 0.3, math.exp(log_k)),
        bounds=(-3, 3),
        method="bounded",
    )
    assert fitted_slope(record_of(h), 0.3) == pytest.approx(math.exp(best.x), rel=0.05)
    assert fitted_slope(record_of(np.zeros(60)), 0.3) == 0.0


def test_many_pairs_share_bins_without_harm() -> None:
    estimate = estimate_noise_rate(record_of(sample(0.2, count=40_000)))
    assert estimate.rate == pytest.approx(0.2, abs=0.015)
    assert estimate.high - estimate.low < 0.06


def test_margins_of_an_unmoved_model_do_not_count() -> None:
    """Step 0 (exactly zero with LoRA) and steps whose margins are hardly larger than rounding."""
    h = sample(0.1, count=800)
    expected = estimate_noise_rate(record_of(h))
    first = np.concatenate([np.zeros(400), 1e-4 * sample(0.5, 80)])
    found = estimate_noise_rate(record_of(np.concatenate([first, h])))
    assert (found.num_pairs, found.num_not_judged) == (800, 480)
    assert (found.low, found.high, found.rate) == (expected.low, expected.high, expected.rate)
    assert found.upper_bound == expected.upper_bound == pytest.approx(np.mean(h < 0))


def test_bounds_are_the_shares_of_contradicted_labels() -> None:
    h = sample(0.3)
    estimate = estimate_noise_rate(record_of(h))
    size = np.concatenate([np.abs(p) / np.sqrt(np.mean(p**2)) for p in np.array_split(h, 10)])
    top = np.argsort(size, kind="stable")[-150:]
    assert estimate.upper_bound == pytest.approx(np.mean(h < 0))
    assert estimate.anchor == pytest.approx(np.mean(h[top] < 0))
    assert estimate.num_pairs == 1500


def test_margins_without_information_say_so() -> None:
    rng = np.random.default_rng(0)
    estimate = estimate_noise_rate(record_of(rng.normal(size=1000)))
    assert not estimate.informative
    assert (estimate.rate, estimate.low) == (None, 0.0)
    assert 0 < estimate.reference_rate < estimate.high
    assert str(estimate).startswith("the margins do not tell how many labels are wrong (0 to 49 %")
    nothing = estimate_noise_rate(record_of(np.zeros(100)))
    assert (nothing.low, nothing.slope, nothing.informative) == (0.0, 0.0, False)
    assert (nothing.upper_bound, nothing.num_pairs, nothing.num_not_judged) == (0.5, 0, 100)


def test_scale_of_the_margins_does_not_matter() -> None:
    h = sample(0.1)
    estimates = [estimate_noise_rate(record_of(factor * h)) for factor in (1e-6, 1.0, 1e6)]
    rates = [estimate.rate for estimate in estimates]
    assert rates == pytest.approx([rates[1]] * 3, abs=1e-9)
    assert estimates[0].slope == pytest.approx(1e6 * estimates[1].slope)


def test_unseen_pairs_do_not_count() -> None:
    h = sample(0.3)
    record = UntrainedMargins(3000)
    record.record(torch.arange(0, 3000, 2), torch.as_tensor(h), step=torch.arange(1500) // 16)
    assert estimate_noise_rate(record) == estimate_noise_rate(record_of(h))


def test_too_few_pairs() -> None:
    with pytest.raises(ValueError, match=r"49 pairs have a margin .* at least 50"):
        estimate_noise_rate(record_of(sample(0.3, count=49)))


def test_wrong_use_is_not_possible() -> None:
    with pytest.raises(AttributeError):
        estimate_noise_rate(torch.randn(100))  # type: ignore[arg-type]


def test_estimate_as_text_and_json() -> None:
    estimate = estimate_noise_rate(record_of(sample(0.1)))
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
