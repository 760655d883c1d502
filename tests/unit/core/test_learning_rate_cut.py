import json
import math

import pytest

from poprisk_integrations.core import LearningRateCutConfig, LearningRateCutRule

OVERSHOOTS = {"risk_decrease": -0.1, "risk_decrease_se": 0.02, "agreement": 0.05}
LEARNS = {"risk_decrease": 0.1, "risk_decrease_se": 0.02, "agreement": 0.05}
MEMORISES = {"risk_decrease": -0.1, "risk_decrease_se": 0.02, "agreement": -0.01}


def feed(rule, *windows):
    return [
        rule.update(step=10 * i, agreement_se=0.01, **window) for i, window in enumerate(windows, 1)
    ]


def test_cuts_after_patience_windows_in_a_row():
    rule = LearningRateCutRule(LearningRateCutConfig(patience=2))
    assert feed(rule, OVERSHOOTS, LEARNS, OVERSHOOTS, OVERSHOOTS) == [False, False, False, True]
    assert (rule.state.cuts, rule.state.last_cut_step) == (1, 40)
    assert "C = -0.1 +- 0.02" in rule.state.reason


def test_starts_counting_anew_after_a_cut_and_stops_cutting():
    rule = LearningRateCutRule(LearningRateCutConfig(patience=2, max_cuts=2))
    assert feed(rule, *[OVERSHOOTS] * 8) == [False, True, False, True, False, False, False, False]


@pytest.mark.parametrize("window", [LEARNS, MEMORISES])
def test_no_cut_while_steps_gain_or_batches_disagree(window):
    assert not any(feed(LearningRateCutRule(), *[window] * 10))


def test_what_is_not_significant_is_no_gain_and_no_agreement():
    config = LearningRateCutConfig(patience=1, confidence=1.0)
    small_gain = {**OVERSHOOTS, "risk_decrease": 0.01}
    small_agreement = {**OVERSHOOTS, "agreement": 0.009}
    assert feed(LearningRateCutRule(config), small_gain) == [True]
    assert feed(LearningRateCutRule(config), small_agreement) == [False]


def test_nan_is_no_window():
    rule = LearningRateCutRule(LearningRateCutConfig(patience=2))
    nan = {**OVERSHOOTS, "risk_decrease": math.nan}
    assert feed(rule, OVERSHOOTS, nan, OVERSHOOTS) == [False, False, True]


def test_state_through_json():
    rule = LearningRateCutRule()
    feed(rule, OVERSHOOTS)
    other = LearningRateCutRule()
    other.load_state_dict(json.loads(json.dumps(rule.state_dict())) | {"from_the_future": 1})
    assert other.state == rule.state
    assert feed(other, OVERSHOOTS) == feed(rule, OVERSHOOTS) == [True]


@pytest.mark.parametrize(
    ("name", "value"),
    [("factor", 1.0), ("factor", 0.0), ("patience", 0), ("confidence", -1.0), ("max_cuts", 0)],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"Invalid {name}: {value}"):
        LearningRateCutConfig(**{name: value})
