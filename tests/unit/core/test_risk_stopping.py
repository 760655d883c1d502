"""The rule on the estimated test loss."""

import json
import math
from types import SimpleNamespace

import pytest

from poprisk_integrations.core.risk_stopping import RiskStopping, RiskStoppingConfig

CONSTANT = SimpleNamespace(rising=False, still_decays=False)
WARM_UP = SimpleNamespace(rising=True, still_decays=False)
COSINE = SimpleNamespace(rising=False, still_decays=True)


def feed(values, *, se=0.1, change_se=0.05, schedule=CONSTANT, rule=None, **config):
    """One value per window of 10 steps; the rule and the steps at which it stopped."""
    rule = rule if rule is not None else RiskStopping(RiskStoppingConfig(**config))
    stops = []
    for k, value in enumerate(values, start=rule.state.windows + 1):
        row = {
            "step": 10 * k,
            "estimated_test_loss": value,
            "estimated_test_loss_se": se,
            "estimated_test_loss_change_se": change_se,
        }
        if rule.update(row, schedule=schedule).stop:
            stops.append(10 * k)
    return rule, stops


def test_stops_after_patience_and_keeps_the_minimum():
    rule, stops = feed([3, 2, 1, 1.2, 1.3, 1.4, 1.5], patience=3)
    assert stops == [60, 70]
    assert rule.best_step == 30
    assert rule.keeps_best()
    assert rule.reason == (
        "at step 60: the estimated test loss was lowest at step 30 (1 +- 0.1), 3 windows ago, and "
        "is 1.4 now"
    )


def test_what_is_not_significant_ends_a_run_but_is_not_preferred():
    rule, stops = feed([3, 2, 1, 1.02, 1.03, 1.04, 1.03, 1.04], patience=5)
    assert stops == [80]
    assert not rule.keeps_best()


def test_patience_is_at_most_half_of_the_run():
    assert [RiskStopping(windows=w).patience for w in (1, 2, 5, 6, 19, 40, None)] == [
        *(3, 3, 3, 3, 10, 10, 10)
    ]
    assert RiskStopping(RiskStoppingConfig(patience=2), windows=40).patience == 2


def test_one_window_alone_is_no_evidence():
    assert not feed([2, 1.5, 1, 1.5])[0].keeps_best()
    assert feed([1.0, 1.5])[0].keeps_best()  # but in a run of two there are no more


def test_the_evidence_is_the_mean_of_the_last_five():
    rule, _ = feed([1, 9, 1.1, 1.0, 1.1, 1.1, 1.1], se=0.1, change_se=9)
    assert rule.state.evidence == pytest.approx(4 / 5 * 0.1 / math.hypot(0.1, 0.1))
    assert not rule.keeps_best()  # the 9 was long ago


def test_a_new_minimum_starts_afresh():
    rule, _ = feed([2, 1, 1.5, 1.6, 0.9], patience=10)
    assert (rule.best_step, rule.state.evidence, rule.keeps_best()) == (50, 0.0, False)


def test_a_window_does_not_become_the_best_by_its_noise():
    rule = RiskStopping()
    for step, (value, se) in enumerate([(1.0, 0.1), (0.95, 0.3), (0.95, 0.15)], start=1):
        row = {"step": step, "estimated_test_loss": value, "estimated_test_loss_se": se}
        rule.update(row)
    assert rule.best_step == 3


def test_the_change_has_the_smaller_of_two_standard_errors():
    rule, _ = feed([1.0, 1.1], se=0.1, change_se=0.02)
    assert rule.state.excesses == pytest.approx((0.1 / 0.02,))
    rule, _ = feed([1.0, 1.1], se=0.1, change_se=9.0)
    assert rule.state.excesses == pytest.approx((0.1 / math.hypot(0.1, 0.1),))


@pytest.mark.parametrize("schedule", [WARM_UP, COSINE])
def test_a_schedule_that_rises_or_decays_is_finished(schedule):
    rule, stops = feed([3, 2, 1, 1.5, 2, 2.5, 3, 3, 3], patience=2, schedule=schedule)
    assert stops == []
    assert rule.keeps_best()


def test_an_annealed_end_is_left_for_clear_evidence_only():
    """One to two standard errors: enough after a constant rate, not after a schedule's end."""
    values = [3, 2, 1, *[1.2] * 5]
    assert feed(values, patience=9, change_se=0.1)[0].keeps_best()
    rule, _ = feed(values[:4], patience=9, change_se=0.1, schedule=COSINE)
    feed(values[4:], change_se=0.1, rule=rule)
    assert 1 < rule.state.evidence < 2
    assert not rule.keeps_best()


def test_min_steps():
    assert feed([1, 2, 2, 2, 2, 2, 2], patience=2, min_steps=60)[1] == [60, 70]


def test_windows_without_an_estimate_change_nothing():
    rule, stops = feed([1, None, None, math.nan, 2, None, 2, 2], patience=3)
    assert stops == [80]
    assert rule.state.windows == 4


def test_a_cooldown_lasts_half_of_the_way_to_the_minimum_and_an_epoch_at_least():
    rule = RiskStopping(epoch_steps=30)
    assert rule.update({"step": 40, "estimated_test_loss": 2.0}).cooldown_steps == 30
    assert rule.update({"step": 400, "estimated_test_loss": 1.0}).cooldown_steps == 200
    assert rule.update({"step": 440, "estimated_test_loss": 1.5}).cooldown_steps == 200


@pytest.mark.parametrize("name", ["accuracy", "reward_accuracy"])
@pytest.mark.parametrize(
    ("later", "stops"), [(0.85, False), (0.81, False), (0.80, True), (0.70, True)]
)
def test_an_accuracy_must_not_have_risen_meanwhile(name, later, stops):
    """By half a standard error of the change, 0.014 here."""
    rule = RiskStopping(RiskStoppingConfig(patience=3))
    for step, loss in enumerate([1.0, 1.5, 1.5, 1.5, 1.5], start=1):
        decision = rule.update(
            {
                "step": step,
                "estimated_test_loss": loss,
                "estimated_test_loss_se": 0.1,
                "estimated_test_loss_change_se": 0.1,
                f"estimated_test_{name}": 0.79 if step == 1 else later,
                f"estimated_test_{name}_se": 0.02,
                f"estimated_test_{name}_change_se": 0.04,
            }
        )
    assert rule.state.falls[-1] == pytest.approx((0.79 - later) / math.hypot(0.02, 0.02))
    assert decision.stop is stops
    assert rule.keeps_best() is stops


def test_resumes_from_json():
    whole, _ = feed([3, 2, 1, 1.2, 1.3, 1.4, 1.5], patience=3)
    first, _ = feed([3, 2, 1, 1.2], patience=3)
    second = RiskStopping(RiskStoppingConfig(patience=3))
    second.load_state_dict({**json.loads(json.dumps(first.state_dict())), "of a later version": 1})
    feed([1.3, 1.4, 1.5], rule=second)
    assert second.state == whole.state


@pytest.mark.parametrize(
    ("name", "value"), [("patience", 0), ("confidence", -1), ("min_steps", -1), ("tail", 0)]
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"Invalid {name}: {value}"):
        RiskStoppingConfig(**{name: value})
