import json

import pytest

from poprisk_integrations.core import StoppingConfig, StoppingRule, StoppingState


def run(ratios, lrs=None, window=4, **config):
    """Feed one ratio per window; return the rule and the step of the stop (or None)."""
    rule = StoppingRule(StoppingConfig(**config))
    step = 0
    for k, ratio in enumerate(ratios):
        for i in range(window):
            step += 1
            lr = 0.1 if lrs is None else lrs[step - 1]
            decision = rule.update(step=step, lr=lr, ratio=ratio if i == window - 1 else None)
            if decision.stop:
                return rule, step
        del k
    return rule, None


def test_stops_at_kappa_times_the_onset():
    rule, stop = run([3.0, 2.0, 0.9, 0.8, 0.8, 0.8, 0.8], kappa=2.0)
    assert rule.state.onset_step == 12
    assert stop == 24
    assert "since step 12" in rule.state.reason
    assert "F = 0.9" in rule.state.reason


@pytest.mark.parametrize(("kappa", "stop"), [(1.0, 8), (1.5, 12), (3.0, 24)])
def test_kappa_scales_the_stop(kappa, stop):
    assert run([3.0] + [0.5] * 9, kappa=kappa)[1] == stop


def test_time_is_measured_in_learning_rates():
    lrs = [0.1] * 8 + [0.05] * 100  # half speed after the onset: twice the steps
    assert run([3.0] + [0.5] * 9, lrs=lrs)[1] == 8 + 16


def test_must_be_armed_first():
    rule, stop = run([0.9] * 10)
    assert stop is None
    assert not rule.state.armed
    assert "not armed" in rule.state.reason


def test_clean_signal_never_stops():
    assert run([5.0, 4.0, 3.0, 2.0, 1.5, 1.2, 1.1, 1.05])[1] is None


def test_rearms_when_the_signal_returns():
    rule, stop = run([3.0, 0.9, 1.4, 1.4], kappa=3.0)
    assert stop is None
    assert rule.state.onset_step is None
    assert "forgotten at step 16" in rule.state.reason
    rule, stop = run([3.0, 0.9, 1.4, 0.9, 1.4, 0.9], kappa=3.0)  # never twice in a row
    assert rule.state.onset_step == 8
    assert stop == 24


def test_min_steps_delays_but_does_not_forget():
    assert run([3.0] + [0.5] * 9, min_steps=30)[1] == 30


def test_nan_windows_are_ignored():
    rule, _ = run([3.0, float("nan"), float("nan")])
    assert rule.state.windows == 1


def test_stop_is_final():
    rule, stop = run([3.0] + [0.5] * 9)
    later = rule.update(step=stop + 1, lr=0.1, ratio=50.0)
    assert later.stop
    assert rule.state.stop_step == stop


def test_onset_is_announced_once():
    rule = StoppingRule()
    flags = [
        rule.update(step=s, lr=0.1, ratio=r).onset for s, r in enumerate([3.0, 0.9, 0.9], start=1)
    ]
    assert flags == [False, True, False]


def test_predicted_stop_is_the_stop():
    rule = StoppingRule(StoppingConfig(kappa=2.5))
    predictions = []
    for step in range(1, 100):
        ratio = 3.0 if step == 4 else 0.5 if step == 8 else None
        decision = rule.update(step=step, lr=0.1, ratio=ratio)
        predictions.append(rule.predicted_stop_step(step, 0.1))
        if decision.stop:
            break
    assert predictions[:7] == [None] * 7
    assert set(predictions[7:]) == {20}
    assert step == 20


def test_no_prediction_without_a_learning_rate():
    rule, _ = run([3.0, 0.9])
    assert rule.predicted_stop_step(8, 0.0) is None


def test_no_onset_before_any_training_time():
    rule = StoppingRule()
    for step, ratio in enumerate([3.0, 0.5], start=1):
        assert not rule.update(step=step, lr=0.0, ratio=ratio).stop
    assert rule.state.onset_step is None


def test_resumed_equals_uninterrupted_through_json():
    ratios = [3.0, 2.0, 0.9, 1.4, 0.8, 0.8, 0.8, 0.8]
    whole, stop = run(ratios)
    for cut in range(1, 20):
        rule = StoppingRule()
        for step in range(1, 100):
            if step == cut:
                saved = json.loads(json.dumps(rule.state_dict()))
                rule = StoppingRule()
                rule.load_state_dict(saved)
            ratio = ratios[step // 4 - 1] if step % 4 == 0 else None
            if rule.update(step=step, lr=0.1, ratio=ratio).stop:
                break
        assert (step, rule.state) == (stop, whole.state)


def test_state_of_another_version_loads():
    rule = StoppingRule()
    rule.load_state_dict({"lr_sum": 1.0, "from_the_future": 3})
    assert rule.state == StoppingState(lr_sum=1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kappa", 0.5),
        ("kappa", float("nan")),
        ("threshold", 0.0),
        ("arm_threshold", 0.9),
        ("rearm_threshold", 0.5),
        ("rearm_windows", 0),
        ("min_steps", -1),
    ],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"Invalid {name}: {value}"):
        StoppingConfig(**{name: value})
