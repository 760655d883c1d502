"""The search on curves whose minimum is known, and its formulas against numpy's."""

import math

import numpy as np
import pytest

from poprisk_integrations.core.learning_rate_search import (
    horizon_factor,
    indistinguishable_rates,
    parabola_minimum,
    search_rates,
    warmup_decay_factor,
)

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("best", "order"),
    [
        (1e-3, [1e-3, 4e-3, 2.5e-4]),
        (4e-3, [1e-3, 4e-3, 1.6e-2]),
        (1e-4, [1e-3, 4e-3, 2.5e-4, 6.25e-5, 1.5625e-5]),
        (0.2, [1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.256, 1.024]),
    ],
)
def test_climbs_until_the_best_lies_between_two_others(best, order):
    scores = search_rates(
        lambda rate: [abs(math.log(rate / best))], start=1e-3, factor=4.0, candidates=8
    )
    assert list(scores) == pytest.approx(order)


def test_a_rate_that_fails_is_worse_than_any():
    scores = search_rates(
        lambda rate: [NAN if rate > 1e-3 else rate], start=1e-3, factor=10.0, candidates=4
    )
    assert list(scores) == pytest.approx([1e-3, 1e-2, 1e-4, 1e-5])


def test_no_more_candidates_than_asked():
    scores = search_rates(lambda rate: [-rate], start=1e-3, factor=2.0, candidates=3)
    assert list(scores) == pytest.approx([1e-3, 2e-3, 4e-3])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("offset", [0.0, -100.0], ids=["log loss", "loss that may be negative"])
def test_parabola_is_the_one_through_three_points(seed, offset):
    rng = np.random.default_rng(seed)
    low, middle, high = 1 + rng.random(), 1.0, 1 + rng.random()
    rates = [1e-3, 4e-3, 1.6e-2]
    losses = [value + offset for value in (low, middle, high)]
    y = np.array(losses, dtype=np.float64)
    square, linear, _ = np.polyfit(np.log(rates), np.log(y) if offset == 0.0 else y, 2)
    expected = math.exp(-linear / (2 * square))
    found = parabola_minimum(dict(zip(rates, losses, strict=True)), untrained=0.0)
    assert found == pytest.approx(expected, rel=1e-6)
    assert 2e-3 <= found <= 8e-3


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({1.0: 1.0, 4.0: 2.0}, 1.0),  # no neighbour below
        ({1.0: 1.0, 4.0: 1.0, 16.0: 1.0}, 1.0),
        ({1.0: NAN, 4.0: 1.0, 16.0: INF}, 4.0),  # both failed: neither side is better
    ],
)
def test_parabola_without_a_minimum(losses, expected):
    assert parabola_minimum(losses, untrained=3.0) == pytest.approx(expected)


def test_a_neighbour_that_failed_counts_as_untrained():
    losses = {1.0: 1.5, 4.0: 1.0, 16.0: NAN}
    assert parabola_minimum(losses, 3.0) == parabola_minimum({**losses, 16.0: 3.0}, 0.0)
    assert parabola_minimum(losses, 3.0) < 4.0


@pytest.mark.parametrize("seed", range(8))
def test_like_the_best_by_paired_standard_errors(seed):
    rng = np.random.default_rng(seed)
    batches = rng.normal(0.0, 5.0, 16)  # differences between batches must not hide those of rates
    scores = {
        rate: (batches + shift + rng.normal(0.0, 0.1, 16)).tolist()
        for rate, shift in ((1.0, 0.3), (4.0, 0.02), (16.0, 0.0), (64.0, 0.04), (256.0, 0.5))
    }
    best = min(scores, key=lambda rate: np.mean(scores[rate]))
    expected = [
        rate
        for rate, losses in scores.items()
        if (d := np.subtract(losses, scores[best])).mean() <= 2 * d.std(ddof=1) / 4
    ]
    assert {4.0, 16.0} <= set(expected) <= {4.0, 16.0, 64.0}
    assert indistinguishable_rates(scores) == expected


def test_a_worse_rate_ends_the_range():
    scores = {1.0: [1.0, 1.2], 4.0: [9.0, 9.0], 16.0: [1.0, 1.1], 64.0: [1.0, NAN]}
    assert indistinguishable_rates(scores) == [16.0]


def test_rates_of_the_steps():
    shares = [warmup_decay_factor(step, 100) for step in range(116)]
    assert shares[:3] == pytest.approx([0.1, 0.2 * 0.99, 0.3 * 0.98])
    assert shares[10:100] == pytest.approx([1 - k / 100 for k in range(10, 100)])
    assert shares[100:] == [0.0] * 16


@pytest.mark.parametrize(
    ("steps", "total", "expected"),
    [(100, 100, 1.0), (100, 20, 1.0), (100, 100_000, 1000**-0.3), (100, None, 0.5)],
)
def test_longer_runs_want_smaller_rates(steps, total, expected):
    assert horizon_factor(steps, total) == pytest.approx(expected)
