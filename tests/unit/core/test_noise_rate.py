"""First margins stay; the interval covers, or the margins do not tell; posteriors are Bayes'."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, norm

from poprisk_integrations.core.noise_rate import (
    NoiseRateEstimate,
    UntrainedMargins,
    double_annotation_rate,
    estimate_noise_rate,
    fitted_slope,
    flip_probability,
)
from tests.reference import preferences as twin

NAN, INF = math.nan, math.inf


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


# Each: batches of (rows, margins, steps), and what is then recorded.
RECORDED: dict[str, tuple[list[Any], list[float], list[int]]] = {
    "a later margin of a pair is ignored": (
        [([3, 1], [0.5, -2.0], 0), ([1, 0], [9.0, 1.0], 7)],
        [1.0, -2.0, NAN, 0.5],
        [7, 0, -1, 0],
    ),
    "of a row that occurs twice the first counts": (
        [([2, 0, 2, 0, 2], [0.0, 1.0, 2.0, 3.0, 4.0], [1, 1, 2, 2, 3])],
        [1.0, NAN, 0.0],
        [1, -1, 1],
    ),
    "padding is left out, an infinite margin counts as seen": (
        [([-1, 1, -1], [5.0, INF, 5.0], 0), ([1], [3.0], 1)],
        [NAN, NAN],
        [-1, 0],
    ),
    "data without rows": ([([-1, -1], [1.0, 2.0], 0)], [], []),
    "nothing to record": ([([], [], 0)], [NAN, NAN], [-1, -1]),
}


@pytest.mark.parametrize("case", RECORDED)
def test_first_margins_are_recorded(case: str) -> None:
    batches, margins, steps = RECORDED[case]
    record = UntrainedMargins(len(margins))
    for rows, values, step in batches:
        record.record(torch.tensor(rows).long(), torch.tensor(values), step=torch.tensor(step))
    assert record.margin.tolist() == pytest.approx(margins, nan_ok=True)
    assert record.step.tolist() == steps
    assert record.seen.tolist() == [step >= 0 for step in steps]
    copy = UntrainedMargins(len(record))
    copy.load_state_dict(record.state_dict())
    assert copy.margin.tolist() == pytest.approx(margins, nan_ok=True)
    assert copy.step.tolist() == steps


def test_a_record_of_other_data_is_refused() -> None:
    with pytest.raises(IndexError, match="row 2 of a data set of 2 rows"):
        UntrainedMargins(2).record(torch.tensor([2]), torch.tensor([1.0]), step=0)
    with pytest.raises(ValueError, match="of 3 pairs, the data have 4"):
        UntrainedMargins(4).load_state_dict(UntrainedMargins(3).state_dict())


def test_judged_from_the_step_on_at_which_the_model_has_moved() -> None:
    # Step 2 is the first with a margin of the usual size; a small one beside it counts, zero never.
    record = record_of([0.0, 0.0, 1e-3, -2e-3, 0.4, -0.3, 1.0, 0.0, INF, -0.8], batch=2)
    assert record.judged.tolist() == [*[False] * 4, True, True, True, False, False, True]
    assert not UntrainedMargins(3).judged.any()
    assert record_of([1e-5, -2.0, 3.0]).judged.all()  # of one moment


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.3])
def test_a_strong_model_tells_the_rate(rate: float) -> None:
    found = [estimate_noise_rate(record_of(sample(rate, 4000, seed=seed))) for seed in range(4)]
    rates = np.array([estimate.rate for estimate in found], dtype=float)  # a None would fail
    assert np.abs(rates - rate).max() < 0.05
    assert all(estimate.low <= rate <= estimate.high for estimate in found)


@pytest.mark.parametrize(
    "seeds", [3, pytest.param(20, marks=pytest.mark.slow)], ids=["few draws", "many draws"]
)
@pytest.mark.parametrize("family", ["gaussian", "laplace", "student", "learning", "unsignalled"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_intervals_cover_where_the_model_has_hardly_learned(
    family: str, rate: float, seeds: int
) -> None:
    """AUC of the margins 0.55 to 0.75: few or none of the intervals may miss."""
    cases = [(signal, seed) for signal in (0.1, 0.25, 0.5) for seed in range(seeds)]
    missed, told = 0, 0
    for signal, seed in cases:
        margins = sample(rate, 1000, signal, 100 + seed, family)
        estimate = estimate_noise_rate(record_of(margins))
        missed += not estimate.low <= rate <= estimate.high
        told += estimate.informative
        assert estimate.informative or estimate.low == 0.0
    # At a coverage of 95 %, more have a probability of 1 %.
    assert missed <= norm.ppf(0.99) * math.sqrt(len(cases) * 0.05 * 0.95) + 0.05 * len(cases)
    assert told <= 2 / 3 * len(cases)


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


def fitted_by_scipy(h: np.ndarray, rate: float) -> Any:
    return minimize_scalar(
        lambda log_k: -twin.log_likelihood(h, rate, math.exp(log_k)),
        bounds=(-3.4, 3.4),
        method="bounded",
    )


def test_the_lower_end_is_that_of_a_likelihood_ratio() -> None:
    h = sample(0.12, 199, signal=2.0, seed=4)  # one stretch
    h = h / np.sqrt(np.mean(h**2))
    rates = np.linspace(0, 0.49, 50)
    likelihood = np.array([-float(fitted_by_scipy(h, rate).fun) for rate in rates])
    first = rates[likelihood >= likelihood.max() - 2.7][0]
    estimate = estimate_noise_rate(record_of(h))
    assert estimate.informative
    assert 0.02 < estimate.low == pytest.approx((first - 0.03) / 0.94, abs=0.011)


def test_fitted_slope_is_that_of_a_general_optimizer() -> None:
    h = sample(0.3, count=300)
    expected = math.exp(fitted_by_scipy(h, 0.3).x)
    assert fitted_slope(record_of(h), 0.3) == pytest.approx(expected, rel=0.05)
    assert fitted_slope(record_of(np.zeros(60)), 0.3) == 0.0


def test_many_pairs_share_bins_without_harm() -> None:
    estimate = estimate_noise_rate(record_of(sample(0.2, count=40_000)))
    assert estimate.rate == pytest.approx(0.2, abs=0.015)
    assert estimate.high - estimate.low < 0.06


def test_which_pairs_count_and_what_their_shares_are() -> None:
    """Not those of an unmoved model (exactly zero, or hardly larger), nor those never seen."""
    h = sample(0.1, count=800)
    expected = estimate_noise_rate(record_of(h))
    first = np.concatenate([np.zeros(400), 1e-4 * sample(0.5, 80)])
    found = estimate_noise_rate(record_of(np.concatenate([first, h])))
    assert (found.num_pairs, found.num_not_judged) == (800, 480)
    assert (found.low, found.high, found.rate) == (expected.low, expected.high, expected.rate)
    assert found.upper_bound == expected.upper_bound == pytest.approx(np.mean(h < 0))
    size = np.concatenate([np.abs(p) / np.sqrt(np.mean(p**2)) for p in np.array_split(h, 8)])
    top = np.argsort(size, kind="stable")[-80:]
    assert expected.anchor == pytest.approx(np.mean(h[top] < 0))
    unseen = UntrainedMargins(1600)
    unseen.record(torch.arange(0, 1600, 2), torch.as_tensor(h), step=torch.arange(800) // 16)
    assert estimate_noise_rate(unseen) == expected


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
    with pytest.raises(ValueError, match=r"49 pairs have a margin .* at least 50"):
        estimate_noise_rate(record_of(sample(0.3, count=49)))


def test_scale_of_the_margins_does_not_matter() -> None:
    h = sample(0.1)
    estimates = [estimate_noise_rate(record_of(factor * h)) for factor in (1e-6, 1.0, 1e6)]
    rates = [estimate.rate for estimate in estimates]
    assert rates == pytest.approx([rates[1]] * 3, abs=1e-9)
    assert estimates[0].slope == pytest.approx(1e6 * estimates[1].slope)
    assert NoiseRateEstimate(**estimates[1].to_json()) == estimates[1]
    assert "of the labels look wrong (95 % interval" in str(estimates[1])


@pytest.mark.parametrize(("pairs", "disagree"), [(300, 96), (1000, 0), (10, 1)])
def test_double_annotation(pairs: int, disagree: int) -> None:
    rate, error = double_annotation_rate(pairs, disagree)
    share, step = disagree / pairs, 1e-6
    assert 2 * rate * (1 - rate) == pytest.approx(share)
    derivative = ((1 - math.sqrt(1 - 2 * (share + step))) / 2 - rate) / step
    expected = derivative * math.sqrt(share * (1 - share) / pairs)
    assert error == pytest.approx(expected, rel=1e-4)


def test_double_annotation_bad_counts() -> None:
    assert double_annotation_rate(10, 5) == (0.5, INF)
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


def test_flip_probability_without_noise_or_margin() -> None:
    h = torch.tensor([-9.0, 9.0, NAN])
    assert flip_probability(h, 0.0, 2.0).tolist() == pytest.approx([0.0, 0.0, NAN], nan_ok=True)
    assert flip_probability(h, 0.3, 2.0)[2].isnan()
    assert flip_probability(h[:2], 0.3, 0.0).tolist() == pytest.approx([0.3, 0.3])
