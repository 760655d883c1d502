"""The callback's own logic, driven by hand; whole runs are in tests/integration/huggingface."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState

from poprisk_integrations.diagnostics import GradientWindow
from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback, PopRiskLRCut
from poprisk_integrations.huggingface.callbacks.windows import load_window, save_window
from poprisk_integrations.optim import PopRiskAdamW
from tests.helpers.tiny_trainer import arguments
from tests.helpers.trainer_events import EventSequence


def _stop(**options):
    return PopRiskEarlyStoppingCallback(**{"criterion": "signal", "window": 4, **options})


def _sgd(lr=0.1):
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    return torch.optim.SGD([parameter], lr=lr)


def test_state_is_json_and_rebuilds_the_callback(tmp_path):
    callback = _stop(kappa=3.0, window=5, restore=None)
    assert callback.stopping_state["stop_step"] is None
    run = EventSequence(callback, _sgd(), arguments(tmp_path))
    for _ in range(7):
        run.step()
    twin = PopRiskEarlyStoppingCallback.from_state(json.loads(json.dumps(callback.state())))
    assert twin.state() == callback.state()
    assert twin.stopping_state == callback.stopping_state
    assert (twin.progress_state["window_seen"], twin.history) == (2, callback.history)


@pytest.mark.parametrize(
    ("options", "loader", "max_steps", "said"),
    [
        ({}, {}, 16, "cannot stop this run: its 16 steps are one pass over the data (16 steps)"),
        ({"window": 8}, {}, 20, "first window of 8 steps on data seen before would end at step 24"),
        ({}, {"sampler": (i for i in range(64)), "shuffle": False}, 100, "set epoch_steps to"),
        ({}, {}, 100, "pass over the data is 16 steps; memorising can be noticed from step 24 of"),
    ],
)
def test_one_line_at_the_start_says_what_can_be_done(
    tmp_path, caplog, capsys, options, loader, max_steps, said
):
    """A warning if that is nothing."""
    data = DataLoader(range(64), **{"batch_size": 4, "shuffle": True, **loader})
    callback = _stop(**{"window": "auto", **options})
    with caplog.at_level(logging.WARNING):
        EventSequence(callback, _sgd(), arguments(tmp_path), max_steps, train_dataloader=data)
    lines = [*(r.message for r in caplog.records), *capsys.readouterr().err.splitlines()]
    (line,) = [line for line in lines if line]
    assert said in line
    assert bool(caplog.records) is ("cannot" in line)


def test_the_lr_cut_says_when_the_run_is_too_short_for_it(tmp_path, caplog):
    for steps in (16, 15):
        EventSequence(PopRiskLRCut(window=8), _sgd(), arguments(tmp_path), steps)
        assert [r.message for r in caplog.records] == [
            "PopRiskLRCutCallback: the run has 15 steps, fewer than two windows of 8: it can never "
            "cut the learning rate. Set a smaller window."
        ] * (steps == 15)


EVALUATED = {"save_strategy": "best", "load_best_model_at_end": True, "eval_strategy": "epoch"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, r"needs TrainingArguments\(save_strategy='best', load_best_model_at_end=True\)"),
        ({"save_strategy": "steps"}, "found save_strategy='steps', load_best_model_at_end=False"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "load_best_model_at_end=F"),
        (EVALUATED, "evaluation picks the best checkpoint"),
    ],
)
def test_restoring_the_onset_needs_trainers_best_model_machinery(tmp_path, changes, said):
    callback, args = _stop(restore="onset"), arguments(tmp_path, **changes)
    with pytest.raises(ValueError, match=said):
        callback.on_train_begin(args, TrainerState(), TrainerControl(), optimizer=_sgd())


def test_a_monitor_refuses_nothing(tmp_path, caplog):
    """It does no harm where it cannot see; the stop says so before any work."""
    args, model = arguments(tmp_path), torch.nn.Linear(2, 1)
    args.deepspeed_plugin = SimpleNamespace()
    with pytest.raises(ValueError, match="Invalid accumulator: 'exact'"):
        EventSequence(_stop(accumulator="exact"), _sgd(), args, model=model)
    monitor = _stop(accumulator="exact", action="monitor")
    run = EventSequence(monitor, _sgd(), args, model=model)
    assert "watches nothing in this run. Invalid accumulator: 'exact'" in caplog.text
    for _ in range(8):
        run.step()
    run.event("on_train_end")
    report = json.loads((tmp_path / "poprisk_stop.json").read_text())
    assert (report["stopped"], report["history"]) == (False, [])
    assert report["reason"] == "no window is complete yet"
    assert "Invalid accumulator" in report["why"]


def test_the_gate_is_sampled_at_the_last_step_of_a_window(tmp_path):
    """Of two tensors one has a steady gradient, the other pure noise: an open and a shut gate."""
    generator = torch.Generator().manual_seed(0)
    steady, noisy = (torch.nn.Parameter(torch.zeros(300)) for _ in range(2))
    own = {"params": [torch.nn.Parameter(torch.zeros(2))], "collect_stats_every": 3}
    optimizer = PopRiskAdamW([{"params": [steady, noisy]}, own], lr=0.1)
    run = EventSequence(_stop(), optimizer, arguments(tmp_path))
    gates = []
    for _ in range(12):
        steady.grad = 1.0 + 1e-3 * torch.randn(300, generator=generator)
        noisy.grad = torch.randn(300, generator=generator)
        run.step()
        gates.append(float(optimizer.gate_stats().get("mean_gate", 1.0)))
        # Left as it was found, the user's own period too.
        assert [group["collect_stats_every"] for group in optimizer.param_groups] == [0, 3]
    assert gates[2] == 1.0
    assert gates[3] == gates[6] != gates[7]
    assert 0.4 < gates[7] < 0.95


def test_a_window_that_does_not_fit_is_not_loaded(tmp_path):
    """Of another step, or of other parameters; one without gradients does."""
    params = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(()))]
    assert load_window(str(tmp_path), 1, params) is None
    for has_gradients in (True, False):
        window = GradientWindow(4)
        for p in params:
            p.grad = torch.ones_like(p) if has_gradients else None
        window.add(params)
        save_window(window, str(tmp_path), step=1)
        assert load_window(str(tmp_path), 1, params)["seen"] == 1
        assert load_window(str(tmp_path), 2, params) is None
        if has_gradients:
            assert load_window(str(tmp_path), 1, params[:1]) is None
            assert load_window(str(tmp_path), 1, params[::-1]) is None
