"""PopRiskMonitorCallback in real runs: by layer, and in every tracker that is installed."""

import importlib.util
import math
import os
from unittest import mock

import pytest
import torch

import poprisk_integrations.huggingface as hf
from tests.helpers.tiny_trainer import arguments, train, weights

TOTALS = {
    *("open_fraction", "mean_gate", "update_norm_ratio", "closed_zero_grad", "closed_noise"),
    *("effective_lr", "skipped_nonfinite", "signal_to_noise", "predicted_decrease"),
}
BY_LAYER = {
    *("open_fraction", "mean_gate", "update_norm_ratio", "closed_zero_grad", "closed_noise"),
    "signal_to_noise",
}
EXPECTED = {f"poprisk/{name}" for name in TOTALS} | {
    f"poprisk/{layer}/{name}" for layer in ("embed", "norm", "head") for name in BY_LAYER
}


def run(tmp_path, monitor=None, **options):
    monitor = monitor or hf.PopRiskMonitorCallback(every_n_steps=2, per_layer=True)
    return train(arguments(tmp_path, logging_steps=4, **options), monitor)


def lines_of(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def test_history_has_totals_and_layers(tmp_path):
    lines = lines_of(run(tmp_path))
    assert len(lines) == 4
    for line in lines:
        assert {key for key in line if key.startswith("poprisk/")} == EXPECTED
        assert all(math.isfinite(line[key]) for key in EXPECTED)
        for name in ("open_fraction", "closed_noise", "closed_zero_grad"):
            parts = [line[f"poprisk/{layer}/{name}"] for layer in ("embed", "norm", "head")]
            total = sum(p * n for p, n in zip(parts, (56, 16, 9), strict=True)) / 81
            assert line[f"poprisk/{name}"] == pytest.approx(total, abs=1e-6)
    assert len({line["poprisk/head/mean_gate"] for line in lines}) > 1


def test_predicted_decrease_tells_the_loss(tmp_path):
    """Whole data as one batch, no gate and no momentum to speak of: a first-order step."""
    options = {"per_device_train_batch_size": 64, "learning_rate": 1e-4, "max_steps": 20}
    monitor = hf.PopRiskMonitorCallback(every_n_steps=1)
    args = arguments(tmp_path, logging_steps=1, optim_args="gate=none", max_grad_norm=0, **options)
    lines = lines_of(train(args, monitor))
    # The loss is taken before a step; the prediction of line t is of the step before it again.
    for before, here, after in zip(lines[5:], lines[6:], lines[7:], strict=False):
        drop = here["loss"] - after["loss"]
        assert here["poprisk/predicted_decrease"] == pytest.approx(drop, rel=0.1)
        assert before["loss"] > here["loss"]


def test_default_logs_totals_only_and_leaves_the_run(tmp_path):
    plain = train(arguments(tmp_path, max_steps=6))
    watched = run(tmp_path, hf.PopRiskMonitorCallback(every_n_steps=2), max_steps=6)
    layered = run(tmp_path, max_steps=6)
    for trainer in (watched, layered):
        before, after = weights(plain.model), weights(trainer.model)
        assert all(torch.equal(before[n], after[n]) for n in before)
    keys = {key for line in lines_of(watched) for key in line if key.startswith("poprisk/")}
    assert keys == {f"poprisk/{name}" for name in TOTALS}


def test_accumulated_steps_and_resume(tmp_path):
    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 4}
    run(tmp_path, max_steps=4, **options)
    monitor = hf.PopRiskMonitorCallback(every_n_steps=2, per_layer=lambda name: name[0])
    args = arguments(tmp_path, logging_steps=4, max_steps=8, **options)
    (line,) = [x for x in lines_of(train(args, monitor, resume=True)) if x["step"] == 8]
    assert {"poprisk/e/mean_gate", "poprisk/h/signal_to_noise"} <= set(line)


def test_refuses_and_says_when_no_layer_is_found(tmp_path, caplog):
    with pytest.raises(ValueError, match="Invalid per_layer: 'auto'"):
        hf.PopRiskMonitorCallback(per_layer="auto")
    run(tmp_path, hf.PopRiskMonitorCallback(per_layer=lambda name: None), max_steps=2)
    assert "no parameter is in a layer" in caplog.text


def needs(module):
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed (no extra needs it)")


@pytest.fixture
def trackers_environment():
    """Trackers set variables of their own."""
    with mock.patch.dict(os.environ):
        yield


def logged(trainer, key):
    """(step, value) of all lines, the summary at the end too."""
    lines = [line for line in trainer.state.log_history if key in line]
    assert len(lines) == 5
    return [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines]


@needs("tensorboard")
def test_tensorboard_event_files(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = run(tmp_path, report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert {f"train/{key}" for key in EXPECTED} <= set(events.Tags()["scalars"])
    for key in EXPECTED:
        seen = [(event.step, event.value) for event in events.Scalars(f"train/{key}")]
        assert seen == logged(trainer, key)


@needs("wandb")
@pytest.mark.usefixtures("trackers_environment")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    import wandb

    trainer = run(tmp_path, report_to=["wandb"])
    summary = dict(wandb.run.summary)
    wandb.finish()
    for key in EXPECTED:
        assert summary[f"train/{key}"] == pytest.approx(lines_of(trainer)[-1][key])
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@needs("mlflow")
@pytest.mark.usefixtures("trackers_environment")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_file_store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer ones ask for it
    import mlflow

    trainer = run(tmp_path, report_to=["mlflow"])
    mlflow.end_run()
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments()
    (found,) = client.search_runs([experiment.experiment_id])
    for key in EXPECTED:
        seen = [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, key)]
        assert sorted(seen) == logged(trainer, key)
