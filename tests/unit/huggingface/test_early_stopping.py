"""The callback's own logic, driven by hand; whole runs are in tests/integration/huggingface."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState

from poprisk_integrations.huggingface import (
    PopRiskEarlyStoppingCallback,
    PopRiskLRCut,
    PopRiskMonitorCallback,
)
from poprisk_integrations.optim import PopRiskAdamW
from tests.helpers.tiny_trainer import arguments
from tests.helpers.trainer_events import EventSequence


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("kappa", 0.5, "Invalid kappa: 0.5"),
        ("kappa", float("nan"), "Invalid kappa: nan"),
        ("threshold", 0.0, "Invalid threshold: 0.0"),
        ("min_steps", -1, "Invalid min_steps: -1"),
        ("window", 3, "Invalid window: 3. Must be 'auto' or an integer >= 4"),
        ("window", "epoch", "Invalid window: 'epoch'"),
        ("window", 8.0, "Invalid window: 8.0"),
        ("window", True, "Invalid window: True"),
        ("action", "halt", r"Invalid action: 'halt'. Must be one of \('stop', 'monitor'\)"),
        ("restore", "best", "Invalid restore: 'best'"),
        ("accumulator", "fast", r"Invalid accumulator: 'fast'. Must be one of \('auto', 'exact'"),
        ("epoch_steps", 0, "Invalid epoch_steps: 0. Must be None or an integer >= 1"),
        ("epoch_steps", 8.0, "Invalid epoch_steps: 8.0"),
    ],
)
def test_bad_arguments_are_named(option, value, said):
    with pytest.raises(ValueError, match=said):
        PopRiskEarlyStoppingCallback(**{option: value})


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "50"])
def test_monitor_refuses_bad_periods(value):
    with pytest.raises(ValueError, match="Invalid every_n_steps"):
        PopRiskMonitorCallback(every_n_steps=value)


def test_arm_and_rearm_scale_with_the_threshold():
    """Else a threshold above 1.3 would be refused by arguments that the user cannot set."""
    config = PopRiskEarlyStoppingCallback(threshold=2.0)._config
    assert (config.threshold, config.rearm_threshold, config.arm_threshold) == (2.0, 2.6, 2.1)


def test_state_is_json_and_rebuilds_the_callback():
    callback = PopRiskEarlyStoppingCallback(kappa=3.0, window=5, restore=None)
    callback._rule.update(step=5, lr=0.1, ratio=2.0)
    callback.progress.window_seen = 2
    state = json.loads(json.dumps(callback.state()))
    twin = PopRiskEarlyStoppingCallback.from_state(state)
    assert twin.state() == callback.state()
    assert twin.stopping_state["armed"]
    assert twin.progress.window_seen == 2


def _sgd(*lrs):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr} for lr in lrs]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(2)
    return optimizer


def test_training_time_is_the_sum_of_the_largest_learning_rate(tmp_path):
    optimizer = _sgd(0.1, 0.4)
    optimizer.add_param_group({"params": [], "lr": 7.0})  # LoRA: empty no-decay group
    callback = PopRiskEarlyStoppingCallback(window=4)
    run = EventSequence(callback, optimizer, arguments(tmp_path))
    run.step()
    optimizer.param_groups[1]["lr"] = 0.3
    run.step()
    assert callback.stopping_state["lr_sum"] == pytest.approx(0.7)


def test_a_step_that_the_grad_scaler_skipped_is_no_training_time(tmp_path):
    """Through accelerate's own wrapper: an overflow at step 2 of 5."""
    args = arguments(tmp_path)
    Accelerator(cpu=True)
    parameter = torch.nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(torch.optim.SGD([parameter], lr=0.1), scaler=scaler)
    callback = PopRiskEarlyStoppingCallback(window=5)
    run = EventSequence(callback, optimizer, args)
    ratios = []
    window = run.callback._reader.window
    closed = window.close
    window.close = lambda: ratios.append(closed()) or ratios[-1]
    for gradient in (1.0, float("inf"), 3.0, 5.0, 7.0):
        scaler.scale((parameter * gradient).sum()).backward()
        scaler.unscale_(optimizer.optimizer)
        run.step()
        parameter.grad = None
    assert callback.stopping_state["lr_sum"] == pytest.approx(0.4)
    assert (ratios[0].steps, callback.stopping_state["windows"]) == (4, 1)
    # A = 16 and Q = 84 in each of two coordinates: S = 2 * (84 - 16^2 / 4) / 3.
    assert float(ratios[0].noise.sum()) == pytest.approx(40 / 3)


def test_nan_gradients_spoil_no_window(tmp_path, caplog):
    optimizer = _sgd(0.0)
    parameter = optimizer.param_groups[0]["params"][0]
    callback = PopRiskEarlyStoppingCallback(window=4)
    run = EventSequence(callback, optimizer, arguments(tmp_path))
    for value in [float("nan")] * 8 + [1.0, 3.0, 1.0, 3.0]:
        parameter.grad = torch.full((2,), value)
        run.step()
    assert callback.stopping_state["windows"] == 1
    (row,) = callback.progress.history
    # A = 8 and Q = 20 in each of two coordinates: S = 2 * (20 - 64 / 4) / 3.
    assert (row["step"], row["noise"]) == (12, pytest.approx(8 / 3))
    assert [r.message for r in caplog.records if "does not count" in r.message] == [
        "PopRiskEarlyStoppingCallback: the window that ended at step 4 had fewer than four steps "
        "with finite, varying gradients and does not count."
    ]


def test_gradients_are_read_not_written(tmp_path):
    optimizer = _sgd(0.1)
    gradient = optimizer.param_groups[0]["params"][0].grad
    before, version = gradient.clone(), gradient._version
    EventSequence(PopRiskEarlyStoppingCallback(window=4), optimizer, arguments(tmp_path)).step()
    assert torch.equal(gradient, before)
    assert gradient._version == version


def _loader(examples=64, **options):
    return DataLoader(range(examples), **{"batch_size": 4, "shuffle": True, **options})


@pytest.mark.parametrize(
    ("options", "loader", "max_steps", "said"),
    [
        ({}, {}, 100, "pass over the data is 16 steps; memorising can be noticed from step 24 of"),
        ({}, {}, 16, "cannot stop this run: its 16 steps are one pass over the data (16 steps)"),
        ({"window": 8}, {}, 20, "first window of 8 steps on data seen before would end at step 24"),
        ({}, {"batch_size": 64}, 100, "each step takes all the data"),
        ({}, {"sampler": (i for i in range(64)), "shuffle": False}, 100, "set epoch_steps to"),
        ({"min_steps": 101}, {}, 100, "cannot stop this run: min_steps=101 is beyond its 100"),
    ],
)
def test_one_line_at_the_start_says_what_can_be_done(
    tmp_path, caplog, capsys, options, loader, max_steps, said
):
    args, callback = arguments(tmp_path), PopRiskEarlyStoppingCallback(**options)
    loader = _loader(**loader)
    with caplog.at_level(logging.WARNING):
        EventSequence(callback, _sgd(0.1), args, max_steps, train_dataloader=loader)
    lines = [*(r.message for r in caplog.records), *capsys.readouterr().err.splitlines()]
    (line,) = [line for line in lines if line]
    assert said in line
    assert bool(caplog.records) is ("cannot" in line)


def test_the_lr_cut_says_when_the_run_is_too_short_for_it(tmp_path, caplog):
    args = arguments(tmp_path)
    EventSequence(PopRiskLRCut(window=8), _sgd(0.1), args, 15, train_dataloader=_loader())
    assert [r.message for r in caplog.records] == [
        "PopRiskLRCutCallback: the run has 15 steps, fewer than two windows of 8: it can never "
        "cut the learning rate. Set a smaller window."
    ]
    caplog.clear()
    EventSequence(PopRiskLRCut(window=8), _sgd(0.1), args, 16, train_dataloader=_loader())
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, r"needs TrainingArguments\(save_strategy='best', load_best_model_at_end=True\)"),
        ({"save_strategy": "steps"}, "found save_strategy='steps', load_best_model_at_end=False"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "load_best_model_at_end=F"),
        (
            {
                "save_strategy": "best",
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "eval_steps": 5,
            },
            "evaluation picks the best checkpoint",
        ),
    ],
)
def test_restoring_the_onset_needs_trainers_best_model_machinery(tmp_path, changes, said):
    callback = PopRiskEarlyStoppingCallback(restore="onset")
    args = arguments(tmp_path, **changes)
    with pytest.raises(ValueError, match=said):
        callback.on_train_begin(args, TrainerState(), TrainerControl(), optimizer=_sgd(0.1))


def test_two_of_a_class_find_their_own_state(tmp_path):
    loose, tight = (PopRiskEarlyStoppingCallback(window=4, kappa=k) for k in (1.0, 3.0))
    for callback, lr in ((loose, 0.1), (tight, 0.2)):
        callback._rule.update(step=1, lr=lr)
    for kappa, lr in ((1.0, 0.1), (3.0, 0.2)):
        state = TrainerState(global_step=1, max_steps=9, stateful_callbacks=[loose, tight])
        callback = PopRiskEarlyStoppingCallback(window=4, kappa=kappa)
        callback.on_train_begin(arguments(tmp_path), state, TrainerControl(), optimizer=_sgd(0.1))
        assert callback.stopping_state["lr_sum"] == lr


def test_all_is_frozen_when_training_begins(tmp_path):
    """A callback may thaw layers later, as those that train some layers at a time do."""
    optimizer = _sgd(0.1)
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.requires_grad_(False)
    callback = PopRiskEarlyStoppingCallback(window=4)
    run = EventSequence(callback, optimizer, arguments(tmp_path))
    parameter.requires_grad_(True)
    for value in (1.0, 3.0, 1.0, 3.0):
        parameter.grad = torch.full((2,), value)
        run.step()
    (row,) = callback.progress.history
    assert row["noise"] == pytest.approx(8 / 3)  # A = 8, Q = 20: S = 2 * (20 - 64 / 4) / 3


def test_a_monitor_refuses_nothing(tmp_path, caplog):
    """It does no harm where it cannot see; the stop says so before any work."""
    args = arguments(tmp_path)
    args.deepspeed_plugin = SimpleNamespace()
    model = torch.nn.Linear(2, 1)
    options = {"window": 4, "accumulator": "exact"}
    with pytest.raises(ValueError, match="Invalid accumulator: 'exact'"):
        EventSequence(PopRiskEarlyStoppingCallback(**options), _sgd(0.1), args, model=model)
    monitor = PopRiskEarlyStoppingCallback(**options, action="monitor")
    run = EventSequence(monitor, _sgd(0.1), args, model=model)
    assert "watches nothing in this run. Invalid accumulator: 'exact'" in caplog.text
    for _ in range(8):
        run.step()
    run.event("on_train_end")
    report = json.loads((tmp_path / "poprisk_stop.json").read_text())
    assert (report["stopped"], report["history"]) == (False, [])


def test_the_gate_is_sampled_at_the_last_step_of_a_window(tmp_path):
    """Of two tensors one has a steady gradient, the other pure noise: an open and a shut gate."""
    generator = torch.Generator().manual_seed(0)
    steady, noisy = (torch.nn.Parameter(torch.zeros(300)) for _ in range(2))
    optimizer = PopRiskAdamW([steady, noisy], lr=0.1)
    callback = PopRiskEarlyStoppingCallback(window=4)
    run = EventSequence(callback, optimizer, arguments(tmp_path))
    gates, periods = [], []
    for _ in range(12):
        steady.grad = 1.0 + 1e-3 * torch.randn(300, generator=generator)
        noisy.grad = torch.randn(300, generator=generator)
        run.step()
        gates.append(float(optimizer.gate_stats().get("mean_gate", 1.0)))
        periods.append(optimizer.param_groups[0]["collect_stats_every"])
    assert set(periods) == {0}  # left as it was found
    assert gates[2] == 1.0
    assert gates[3] == gates[6] != gates[7]
    assert 0.4 < gates[7] < 0.95
    assert callback.stopping_state["lr_sum"] == pytest.approx(0.1 * 12)


def test_a_sampling_period_of_the_users_own_is_kept(tmp_path):
    optimizer = PopRiskAdamW([torch.nn.Parameter(torch.zeros(2))], collect_stats_every=3)
    run = EventSequence(PopRiskEarlyStoppingCallback(window=4), optimizer, arguments(tmp_path))
    for _ in range(5):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
        run.step()
        assert optimizer.param_groups[0]["collect_stats_every"] == 3
