"""Intervals of shares, bins of probabilities against truth, and what to do about wrong labels."""

import random

import pytest
from scipy import stats

from poprisk_integrations.core.calibration import (
    Z95,
    calibration_error,
    reliability,
    wilson_interval,
)
from poprisk_integrations.core.label_advice import label_advice


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (1, 1), (3, 10), (50, 50), (123, 1000)])
def test_wilson_is_that_of_scipy(hits: int, count: int) -> None:
    ends = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits / count, count) == pytest.approx((ends.low, ends.high), abs=1e-9)
    assert stats.norm.cdf(Z95) == pytest.approx(0.975)


def test_no_draw_has_no_interval() -> None:
    with pytest.raises(ValueError, match=r"Invalid count: 0\. Must be > 0"):
        wilson_interval(0.5, 0)


def test_every_label_is_in_one_bin() -> None:
    """Ends belong to the bin above, 1 to the last one."""
    bins = reliability([0.0, 0.1, 0.35, 0.3999, 0.999, 1.0], [0, 1, 0, 1, 1, 0])
    assert [one.count for one in bins] == [1, 1, 0, 2, 0, 0, 0, 0, 0, 2]
    assert [(one.low, one.high) for one in bins] == [(n / 10, (n + 1) / 10) for n in range(10)]
    assert (bins[3].predicted, bins[3].share) == (pytest.approx(0.37495), 0.5)
    assert (bins[3].share_low, bins[3].share_high) == wilson_interval(0.5, 2)
    assert bins[2].share is bins[2].predicted is bins[2].share_low is bins[2].by_chance is None
    expected = (0 + 0.9 + 2 * (0.5 - 0.37495) + 2 * (0.9995 - 0.5)) / 6
    assert calibration_error(bins)[0] == pytest.approx(expected)


def test_an_error_of_chance_is_told_from_one_that_is_not() -> None:
    """Over 40 draws of 300 labels the error of right probabilities has the expected mean."""
    rng = random.Random(0)
    right, wrong = [], []
    for _ in range(40):
        p = [rng.random() for _ in range(300)]
        right.append(calibration_error(reliability(p, [rng.random() < x for x in p])))
        wrong.append(calibration_error(reliability(p, [rng.random() < 0.5 * x for x in p])))
    means = [sum(values) / 40 for values in zip(*right, strict=True)]
    assert means[0] == pytest.approx(means[1], rel=0.1)
    assert min(error for error, _ in wrong) > 3 * means[1]
    assert calibration_error(reliability([], [])) is None


ADVICE = {
    "not_judged": (0, 0, True, "train longer"),
    "not_told": (9, 3, False, "look at the top of the ranking by hand"),
    "none_suspect": (9, 0, True, "nothing: no label"),
    "suspect": (9, 3, True, "leave out the 3 labels that are more probably wrong than right"),
}


@pytest.mark.parametrize("kind", ADVICE)
def test_advice(kind: str) -> None:
    """What is to be typed stands between backquotes, and is whole."""
    judged, suspect, calibrated, words = ADVICE[kind]
    found = label_advice(
        num_judged=judged, num_suspect=suspect, calibrated=calibrated, command="poprisk flips x"
    )
    assert found.kind == kind
    assert words in str(found)
    commands = str(found).split("`")[1::2]
    writes = [command for command in commands if "flips" in command]
    assert len(writes) == (kind in ("not_told", "suspect"))
    assert all(command.startswith("poprisk flips x --write cleaned.jsonl") for command in writes)
    assert ("poprisk clean --config recipe.yaml" in commands) == bool(writes)
