import json
import math

import pytest

from poprisk_integrations.core import StoppingConfig, StoppingRule, StoppingState


def run(ratios, lrs=None, window=4, noises=None, reused_from=1, se=0.0, **config):
    """Feed one ratio per window; return the rule and the step of the stop (or None)."""
    rule = StoppingRule(StoppingConfig(**config))
    step = 0
    for k, ratio in enumerate(ratios):
        for i in range(window):
            step += 1
            lr = 0.1 if lrs is None else lrs[step - 1]
            ends = i == window - 1
            decision = rule.update(
                step=step,
                lr=lr,
                ratio=ratio if ends else None,
                ratio_se=se,
                noise=1.0 if noises is None else noises[k],
                reused=k >= reused_from,
            )
            if decision.stop:
                return rule, step
    return rule, None


def crossing(before, after, earlier, later, threshold=1.0):
    """Where the straight line through (earlier, log before), (later, log after) meets log 1."""
    x0, x1 = math.log(before / threshold), math.log(after / threshold)
    return earlier + (later - earlier) * x0 / (x0 - x1)


def test_stops_at_kappa_times_the_crossing():
    """Windows of 4 steps: F = 2 in the middle of the second (0.6), 0.9 in that of the third (1)."""
    rule, stop = run([3.0, 2.0, 0.9, 0.8, 0.8, 0.8, 0.8], kappa=2.0)
    assert rule.state.onset_step == 12
    time = crossing(2.0, 0.9, 0.6, 1.0)
    assert rule.state.onset_lr_sum == pytest.approx(time)
    assert stop == math.ceil(2 * time / 0.1)
    # The crossing lies between the middles of the second and the third window, steps 6 and 10.
    assert rule.state.onset_at == pytest.approx(crossing(2.0, 0.9, 6.0, 10.0))
    assert rule.state.reason == (
        "stopped at step 19: batches agree no more than chance explains since about step 9 "
        "(noticed at step 12, F = 0.9 < 1); 2 times the training time up to there (the sum of the "
        "learning rates) has passed"
    )


@pytest.mark.parametrize("kappa", [1.0, 1.5, 2.5, 4.0])
def test_kappa_scales_the_stop(kappa):
    time = crossing(3.0, 0.5, 0.2, 0.6)
    expected = max(8, math.ceil(kappa * time / 0.1))  # no earlier than it is known
    assert run([3.0] + [0.5] * 9, kappa=kappa)[1] == expected


@pytest.mark.parametrize(("kappa", "waited"), [(1.0, ""), (2.5, "; 2.5 times the ")])
def test_reason_tells_how_long_it_waited(kappa, waited):
    rule, _ = run([3.0] + [0.5] * 9, kappa=kappa)
    assert f"F = 0.5 < 1){waited}" in rule.state.reason
    assert ("times the training time" in rule.state.reason) == bool(waited)


def test_an_onset_right_after_another_low_window_is_at_its_middle():
    """The window before was low too, but of the first pass."""
    rule, _ = run([3.0, 0.9, 0.8, 0.8, 0.8], reused_from=2)
    assert rule.state.onset_step == 12
    assert rule.state.onset_lr_sum == pytest.approx(1.0)


def test_time_is_measured_in_learning_rates():
    lrs = [0.1] * 8 + [0.05] * 100  # half speed after the onset: twice the steps
    time = crossing(3.0, 0.5, 0.2, 0.6)
    expected = 8 + math.ceil((2 * time - 0.8) / 0.05) if 2 * time > 0.8 else 8
    assert run([3.0] + [0.5] * 9, lrs=lrs)[1] == expected


def test_never_in_a_first_pass():
    """Steps that overshoot make F < 1 without any memorising."""
    rule, stop = run([3.0, 0.5, 0.4, 0.4, 0.3] * 3, reused_from=10**9)
    assert stop is None
    assert rule.state.onset_step is None


@pytest.mark.parametrize(("noise", "kappa"), [(1.0, 2.0), (0.8, 2.5), (0.1, 3.0)])
def test_kappa_grows_where_the_noise_has_fallen(noise, kappa):
    rule, _ = run([3.0, 2.0, 0.9], noises=[0.5, 1.0, noise])
    assert rule.state.onset_kappa == pytest.approx(kappa)
    rule, _ = run([3.0, 2.0, 0.9], noises=[0.5, 1.0, noise], stretch=1.0)
    assert rule.state.onset_kappa == 2.0


def test_confidence_asks_for_more():
    assert run([3.0] + [0.8] * 4, se=0.3)[0].state.onset_step == 8
    assert run([3.0] + [0.8] * 4, se=0.3, confidence=1.0)[0].state.onset_step is None


def test_never_armed_but_low_from_the_start():
    """F < 1 from the first window on: the onset is in its middle, once three windows agree."""
    rule, stop = run([0.7] * 10, se=0.1)
    assert not rule.state.armed
    assert (rule.state.onset_step, stop) == (12, 12)
    assert rule.state.onset_lr_sum == pytest.approx(0.2)
    assert rule.state.onset_at == 2.0


@pytest.mark.parametrize(("ratios", "se"), [([0.95] * 10, 0.3), ([1.02] * 10, 0.0)])
def test_never_armed_and_not_clearly_low_is_left_alone(ratios, se):
    rule, stop = run(ratios, se=se)
    assert stop is None
    assert "have not agreed on a direction yet" in rule.state.reason


def test_clean_signal_never_stops():
    assert run([5.0, 4.0, 3.0, 2.0, 1.5, 1.2, 1.1, 1.05])[1] is None


def test_rearms_when_the_signal_returns():
    rule, stop = run([3.0, 0.9, 1.4, 1.4], kappa=3.0)
    assert stop is None
    assert rule.state.onset_step is None
    assert "by step 16 batches agreed again" in rule.state.reason
    rule, stop = run([3.0, 0.9, 1.4, 0.9, 1.4, 0.9], kappa=3.0)  # never twice in a row
    assert rule.state.onset_step == 8
    assert stop == math.ceil(3 * crossing(3.0, 0.9, 0.2, 0.6) / 0.1)


def test_min_steps_delays_but_does_not_forget():
    assert run([3.0] + [0.5] * 9, min_steps=30)[1] == 30


def test_nan_windows_are_ignored():
    rule, _ = run([3.0, float("nan"), float("nan")])
    assert rule.state.windows == 1


def test_an_unknown_error_of_f_counts_as_none():
    """NaN compares as False: it must not look like F below the threshold."""
    rule, stop = run([3.0, 2.0, 1.5, 1.2], se=math.nan)
    assert stop is None
    assert rule.state.onset_step is None
    assert run([0.7] * 10, se=math.nan)[1] == 12


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
    assert set(predictions[7:]) == {step}
    assert step == math.ceil(2.5 * crossing(3.0, 0.5, 0.2, 0.6) / 0.1)


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
            if rule.update(step=step, lr=0.1, ratio=ratio, noise=1.0).stop:
                break
        assert (step, rule.state) == (stop, whole.state)


def test_state_of_another_version_loads():
    rule = StoppingRule()
    rule.load_state_dict({"lr_sum": 1.0, "from_the_future": 3})
    assert rule.state == StoppingState(lr_sum=1.0)
    rule.load_state_dict({"lr_sum": 1.0, "onset_step": 8, "onset_lr_sum": 0.8})  # of 0.1.0
    assert rule.state.onset_kappa == 2.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kappa", 0.5),
        ("kappa", float("nan")),
        ("stretch", 0.5),
        ("threshold", 0.0),
        ("confidence", -1.0),
        ("unarmed_windows", 1),
        ("arm_threshold", 0.9),
        ("rearm_threshold", 0.5),
        ("rearm_windows", 0),
        ("min_steps", -1),
    ],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"Invalid {name}: {value}"):
        StoppingConfig(**{name: value})


def test_a_state_that_did_not_count_steps_goes_on():
    """One of an older version has windows, but no step of their middle."""
    rule, _ = run([3.0, 2.0])
    old = {k: v for k, v in rule.state_dict().items() if "_step" not in k and k != "onset_at"}
    rule.load_state_dict(old)
    for step in range(9, 13):
        rule.update(step=step, lr=0.1, ratio=0.9 if step == 12 else None)
    assert rule.state.onset_step == 12
    assert rule.state.onset_lr_sum == pytest.approx(crossing(2.0, 0.9, 0.6, 1.0))
    assert 8 <= rule.state.onset_at <= 12
