"""The stop by gradients, the learning-rate cut and the monitor: one contract, two frameworks."""

import dataclasses
import itertools
import math

import pytest
import torch
from transformers import Trainer

from poprisk_integrations.diagnostics import GradientWindow
from poprisk_integrations.diagnostics.gate_monitor import GateMonitor
from poprisk_integrations.diagnostics.gradient_reader import GradientReader
from poprisk_integrations.diagnostics.stop_judge import RateCut, StopJudge
from tests.integration import frameworks
from tests.integration.frameworks import (
    FRAMEWORKS,
    LR,
    Stream,
    equal,
    gated,
    noisy_data,
    numbers,
    run,
    still,
)
from tests.integration.lightning import toy

pytestmark = [
    pytest.mark.parametrize("framework", FRAMEWORKS, scope="module"),
    *toy.third_party_warnings,
]
STOP, ONSET, SAVED = 45, 32, 20


def make(framework, kind="stop", **options):
    options = {"criterion": "signal", **options} if kind == "stop" else options
    return frameworks.make(framework, kind, **options)


def _stop(framework, **options):
    # A loader of one's own may repeat inside, so the length of a pass is given.
    return make(framework, **{"window": 8, "epoch_steps": 8, **options})


@pytest.fixture(scope="module")
def whole(framework, tmp_path_factory):
    """An uninterrupted run, with a checkpoint in the middle of its third window."""
    ours = _stop(framework)
    return ours, run(framework, tmp_path_factory.mktemp(framework), ours, save_at=SAVED)


@pytest.fixture(scope="module")
def plain(framework, tmp_path_factory):
    """The same run without anything of ours, to its end."""
    return run(framework, tmp_path_factory.mktemp(framework))


def _ends(ours):
    return [row["step"] for row in ours.history]


def test_it_stops_at_kappa_times_the_onset(framework, whole):
    """By hand: where the line through log F at the middles of the windows crosses 0."""
    ours, outcome = whole
    history = ours.history
    ends = [0, *_ends(ours)]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(ends)]
    logs = [math.log(row["signal_ratio"]) for row in history]
    first = next(i for i, x in enumerate(logs) if x < 0)
    share = logs[first - 1] / (logs[first - 1] - logs[first])
    onset = middles[first - 1] + share * (middles[first] - middles[first - 1])
    fall = max(row["noise"] for row in history[: first + 1]) / history[first]["noise"]
    kappa = 2 * min(max(fall, 1.0), 1.5)
    assert numbers(ours)["onset_lr_sum"] == pytest.approx(LR * onset)
    assert numbers(ours)["onset_step"] == history[first]["step"] == ONSET
    assert outcome.steps == numbers(ours)["stop_step"] == math.ceil(kappa * onset) == STOP


def test_history_and_report(framework, whole):
    """The same numbers under both: data, order and model are."""
    ours, outcome = whole
    (report,) = outcome.reports
    assert report["history"] == ours.history
    assert _ends(ours) == [8, 16, 24, 32, 40]
    assert [row["reused"] for row in ours.history] == [False, *[True] * 4]
    names = ("signal_ratio", "risk_decrease", "agreement")
    other = ("train_loss", "estimated_gap", "estimated_test_loss")
    keys = {"step", "lr_sum", "noise", "steps", *names, *(f"{n}_se" for n in names), *other}
    for row in ours.history:
        assert row.keys() == keys | {"reused"}
        assert {row[name] for name in other} == {None}
        assert row["lr_sum"] == pytest.approx(LR * row["step"])
    expected = [2.7, 1.8, 1.2, 0.85, 0.5]
    assert [row["signal_ratio"] for row in ours.history] == pytest.approx(expected, rel=0.3)
    assert (report["stopped"], report["stop_step"], report["global_step"]) == (True, STOP, STOP)
    assert report["criterion"] == "signal"
    assert report["settings"]["kappa"] == 2.0
    setup = {"window_steps": 8, "epoch_steps": 8, "world_size": 1, "batch_size": 32}
    assert setup.items() <= report["setup"].items()
    assert numbers(ours).items() <= report.items()


def test_one_line_at_the_start_and_one_at_the_end(framework, whole):
    _, outcome = whole
    (report,) = outcome.reports
    start, *end = outcome.said
    assert start == (
        "one pass over the data is 8 steps; memorising can be noticed from step 16 of 80 on"
    )
    assert end == [f"{report['reason']}; {report['diagnosis']}"]
    assert f"stopped at step {STOP}" in end[0]
    assert "memorising: batches agree no more than chance explains" in end[0]


def test_numbers_are_logged_from_when_they_exist_on(framework, whole):
    ours, outcome = whole
    lines = {line["step"]: line for line in outcome.lines}
    assert not any("poprisk" in key for key in lines[4])
    assert "poprisk/onset_step" not in lines[28]
    for step in (ONSET, 40, STOP):
        row = next(r for r in reversed(ours.history) if r["step"] <= step)
        for name in ("signal_ratio", "signal_ratio_se", "risk_decrease", "agreement"):
            assert lines[step][f"poprisk/{name}"] == pytest.approx(row[name])
        assert lines[step]["poprisk/onset_step"] == ONSET
        assert lines[step]["poprisk/predicted_stop_step"] == STOP


def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(framework, whole, tmp_path):
    ours, outcome = whole
    again = _stop(framework)
    resumed = run(framework, tmp_path, again, resume=outcome.checkpoint)
    assert resumed.steps == outcome.steps
    assert equal(resumed.weights, outcome.weights)
    assert numbers(again) == numbers(ours)
    assert again.history == ours.history
    assert not any("afresh" in line for line in resumed.said)


def test_windows_of_another_length_start_afresh_on_resume(framework, whole, tmp_path):
    ours, outcome = whole
    again = _stop(framework, window=12, action="monitor")
    resumed = run(framework, tmp_path, again, resume=outcome.checkpoint, max_steps=SAVED + 14)
    (said,) = [line for line in resumed.said if "afresh" in line]
    assert said == (
        "resumed with window_steps 8 -> 12. What was counted so far is kept; the unfinished window "
        "starts afresh."
    )
    assert again.history[:2] == ours.history[:2]
    assert _ends(again)[2:] == [SAVED + 12]


def test_a_monitor_leaves_the_run_alone(framework, plain, tmp_path):
    ours = make(framework, window=8, action="monitor")
    watched = run(framework, tmp_path, ours)
    assert numbers(ours)["stop_step"] == STOP
    assert watched.steps == plain.steps == 80
    assert equal(watched.weights, plain.weights)
    assert any("would have stopped at step 45" in line for line in watched.said)


SETTINGS = {  # of a run, and how near the windows of the plain one are
    "accumulate": ({"accumulate": 2}, 1e-4),
    "clip": ({"clip": 1e-2}, 1e-4),
    "bf16": ({"precision": "bf16"}, 5e-2),
    "fp16": ({"precision": "fp16"}, 5e-3),
    "fp16, clip, accumulate": ({"precision": "fp16", "clip": 1e-2, "accumulate": 4}, 5e-3),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_window_is_that_of_plain_steps(framework, tmp_path, name):
    """Gradients of whole steps, unscaled and unclipped, at weights that never move."""
    settings, rel = SETTINGS[name]
    if "clip" in name and framework == "huggingface" and not hasattr(Trainer, "_clip_grad_norm"):
        pytest.skip("transformers < 5.3 tells nobody the norm")
    rows = []
    for changes in ({}, settings):
        ours = make(framework, window=8, action="monitor")
        root = tmp_path / str(len(rows))
        run(framework, root, ours, epochs=2, make_optimizer=still, **changes)
        assert _ends(ours) == [8, 16]
        rows.append({k: v for k, v in ours.history[-1].items() if v is not None})
    assert rows[1] == pytest.approx(rows[0], rel=rel)
    assert "risk_decrease" not in rows[0]  # no weight moved


def _layer_by_layer(every):
    def hook(step, model, optimizer):
        model.embed.requires_grad_(step // every % 2 == 0)

    return hook


def test_a_window_of_changing_parameters_ends_no_run_and_says_so_once(framework, tmp_path):
    ours, cut = make(framework, window=8), make(framework, "cut", window=8)
    outcome = run(framework, tmp_path, ours, cut, epochs=5, hook=_layer_by_layer(5))
    assert outcome.steps == 40
    assert ours.history == []
    said = [line for line in outcome.said if "the trained parameters change" in line]
    assert len(said) == 2
    assert "before a window of 8 steps ends, so nothing is measured" in said[0]


def test_a_window_starts_afresh_at_a_freeze(framework, tmp_path):
    def hook(step, model, optimizer):
        model.embed.requires_grad_(step < 12)

    ours = make(framework, window=8, action="monitor")
    outcome = run(framework, tmp_path, ours, epochs=5, hook=hook)
    assert _ends(ours) == [8, 20, 28, 36]
    assert not any("the trained parameters change" in line for line in outcome.said)


def test_a_single_pass_is_never_ended(framework, tmp_path, monkeypatch):
    """However little batches agree."""
    close = GradientWindow.close
    scripted = lambda window: dataclasses.replace(close(window), ratio=0.5)  # noqa: E731
    monkeypatch.setattr(GradientWindow, "close", scripted)
    ours = make(framework, window=8, kappa=1.0)
    outcome = run(framework, tmp_path, ours, epochs=1, data=noisy_data(1024))
    assert outcome.steps == 32
    assert numbers(ours)["mean_ratio"] == 0.5
    assert "cannot stop this run: its 32 steps are one pass over the data" in outcome.said[0]
    assert "did not stop this run" in outcome.said[-1]


def test_of_a_stream_the_user_says_how_long_a_pass_is(framework, tmp_path):
    reused = {}
    for epoch_steps in (None, 8):
        ours = make(framework, window=6, action="monitor", epoch_steps=epoch_steps)
        job = {"data": Stream(noisy_data()), "max_steps": 24, "epochs": -1}
        outcome = run(framework, tmp_path / str(epoch_steps), ours, **job)
        reused[epoch_steps] = [row["reused"] for row in ours.history]
        asks = any("set epoch_steps to the optimizer steps of one pass" in x for x in outcome.said)
        assert asks is (epoch_steps is None)
    # The window of steps 7 to 12 began in the first pass of 8 steps.
    assert reused == {None: [False] * 4, 8: [False, False, True, True]}


def test_min_steps_and_a_cooldown(framework, tmp_path):
    """A quarter of the steps up to the stop, with the rate falling to zero."""
    ours = make(framework, window=8, min_steps=52, action="cooldown")
    outcome = run(framework, tmp_path, ours)
    assert numbers(ours)["stop_step"] == 52
    assert outcome.steps == 52 + 13
    tail = [LR * (1 - i / 14) for i in range(1, 14)]
    assert outcome.rates[-13:] == pytest.approx(tail)


def test_a_decaying_schedule_is_not_cut_short(framework, tmp_path):
    def decay(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 80)

    ours = make(framework, window=8)
    outcome = run(framework, tmp_path, ours, make_schedule=decay)
    assert numbers(ours)["onset_step"] is not None
    assert numbers(ours)["stop_step"] is None
    assert outcome.steps == 80
    assert "no stop while the learning rate still decays" in outcome.said[0]


def test_gradients_that_are_no_numbers_end_nothing(framework, tmp_path):
    ours = make(framework, window=8)
    data = [{**row, "x": row["x"] * float("nan")} for row in noisy_data()]
    outcome = run(framework, tmp_path, ours, data=data, epochs=3)
    assert outcome.steps == 24
    assert numbers(ours)["windows"] == 0
    assert sum("had fewer than four steps" in line for line in outcome.said) == 1


@pytest.mark.parametrize(
    ("kind", "owner", "name"),
    [
        ("stop", GradientReader, "read"),
        ("stop", GradientReader, "count_batch"),
        ("stop", StopJudge, "after_step"),
        ("cut", GradientReader, "close"),
        ("cut", RateCut, "after_step"),
        ("monitor", GateMonitor, "before_step"),
        ("monitor", GateMonitor, "after_step"),
    ],
)
def test_a_failure_of_ours_ends_no_run(framework, tmp_path, monkeypatch, kind, owner, name):
    def fails(*args, **kwargs):
        raise RuntimeError("made up")

    monkeypatch.setattr(owner, name, fails)
    ours = make(framework, kind, **{"every_n_steps": 2} if kind == "monitor" else {"window": 8})
    outcome = run(framework, tmp_path, ours, epochs=2, make_optimizer=gated)
    assert outcome.steps == 16
    assert "made up" in ours.switched_off
    assert sum("is switched off for the rest of this run" in x for x in outcome.said) == 1


@pytest.fixture
def overshoots(monkeypatch):
    """Every window says so, but the second of a run."""
    close, count = GradientWindow.close, itertools.count(1)

    def scripted(window):
        found, sign = close(window), 1.0 if next(count) == 2 else -1.0
        said = {"risk_decrease": sign, "agreement": 1.0}
        return dataclasses.replace(found, **said, risk_decrease_se=0.1, agreement_se=0.1)

    monkeypatch.setattr(GradientWindow, "close", scripted)


def test_the_cut_and_the_schedule_that_goes_on_from_it(framework, tmp_path, overshoots):
    def floor(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 64, eta_min=LR / 2)

    cut = make(framework, "cut", window=8, factor=0.5, max_cuts=2)
    outcome = run(framework, tmp_path, cut, epochs=8, make_schedule=floor)
    for i, rate in enumerate(outcome.rates):
        planned = LR / 2 + LR / 4 * (1 + math.cos(math.pi * i / 64))
        assert rate == pytest.approx(planned * 0.5 ** ((i >= 32) + (i >= 48)))
    assert numbers(cut)["cuts"] == 2
    assert sum("learning rate cut at step" in line for line in outcome.said) == 2
    lines = {line["step"]: line.get("poprisk/lr_cuts") for line in outcome.lines}
    assert (lines[32], lines[48]) == (1, 2)


def test_the_cut_stops_at_min_lr(framework, tmp_path, overshoots):
    options = {"factor": 0.3, "patience": 1, "max_cuts": 9, "min_lr": 0.2 * LR}
    cut = make(framework, "cut", window=8, **options)
    outcome = run(framework, tmp_path, cut, epochs=6)
    rates = [outcome.rates[i] for i in (7, 8, 24, 47)]
    assert rates == pytest.approx([LR, 0.3 * LR, 0.2 * LR, 0.2 * LR])
    assert numbers(cut)["cuts"] == 2


def test_a_scheduler_that_undoes_the_cut_is_told_once(framework, tmp_path, overshoots):
    class FromConstants(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self):
            return [LR * 0.999**self.last_epoch for _ in self.optimizer.param_groups]

    cut = make(framework, "cut", window=8, patience=1)
    outcome = run(framework, tmp_path, cut, epochs=5, make_schedule=FromConstants)
    assert numbers(cut)["cuts"] > 1
    assert sum("the scheduler overwrites it" in line for line in outcome.said) == 1


def test_the_monitor_tells_layers_and_changes_nothing(framework, tmp_path):
    monitor = make(framework, "monitor", every_n_steps=2, per_layer=True)
    watched = run(framework, tmp_path / "a", monitor, epochs=2, make_optimizer=gated)
    alone = run(framework, tmp_path / "b", epochs=2, make_optimizer=gated)
    assert equal(watched.weights, alone.weights)
    last = [line for line in watched.lines if "poprisk/open_fraction" in line][-1]
    sizes = {"embed": 17 * 32, "head": 33 * 4}
    prefix = "net." if framework == "lightning" else ""
    for name in ("open_fraction", "mean_gate", "closed_noise"):
        parts = [last[f"poprisk/{prefix}{layer}/{name}"] * n for layer, n in sizes.items()]
        assert last[f"poprisk/{name}"] == pytest.approx(sum(parts) / sum(sizes.values()), abs=1e-6)
    assert "poprisk/signal_to_noise" in last
    assert "poprisk/predicted_decrease" in last


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("stop", "kappa", 0.5),
        ("stop", "window", 3),
        ("stop", "threshold", 0.0),
        ("stop", "min_steps", -1),
        ("stop", "accumulator", "all"),
        ("stop", "epoch_steps", 0),
        ("cut", "factor", 1.0),
        ("cut", "patience", 0),
        ("cut", "max_cuts", 0),
        ("cut", "min_lr", -1.0),
        ("cut", "window", "epoch"),
        ("cut", "epoch_steps", 1.5),
        ("monitor", "every_n_steps", 0),
        ("monitor", "per_layer", "yes"),
    ],
)
def test_bad_arguments_are_named(framework, kind, option, value):
    with pytest.raises(ValueError, match=f"Invalid {option}: {value!r}"):
        make(framework, kind, **{option: value})
