"""PopRiskMonitor by layer in real fits, and in every logger that is installed."""

import csv
import importlib.util
import math
import os
from unittest import mock

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from poprisk_integrations.cli.report.key_names import parse_key
from poprisk_integrations.diagnostics.layer_sample import LAYER_STATISTICS
from poprisk_integrations.lightning import PopRiskMonitor
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings

LAYERS = ("net.0", "net.2")
EXPECTED = {
    *(f"poprisk/{layer}/{name}" for layer in LAYERS for name in LAYER_STATISTICS),
    *(f"poprisk/{layer}/signal_to_noise" for layer in LAYERS),
    *(f"poprisk/{name}" for name in (*LAYER_STATISTICS, "signal_to_noise", "predicted_decrease")),
}


def nearly_still(params):
    return toy.PopRiskAdamW(params, lr=1e-9, weight_decay=0.0)


def fit(root, monitor, make_optimizer=toy.gated, **kwargs):
    model = toy.Classifier(make_optimizer)
    settings = {"max_epochs": 2, "log_every_n_steps": 4, **kwargs}
    trainer = toy.trainer(root, [monitor], **settings)
    trainer.fit(model, toy.loader())
    return model, trainer


def test_csv_has_totals_and_layers(tmp_path):
    fit(tmp_path, PopRiskMonitor(2, per_layer=True), logger=CSVLogger(tmp_path))
    with (tmp_path / "lightning_logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= EXPECTED
    assert len(rows) == 4
    last = rows[-1]
    assert all(math.isfinite(float(last[key])) for key in EXPECTED)
    sizes = {"net.0": 17 * 32, "net.2": 33 * 4}
    for name in ("open_fraction", "mean_gate", "closed_noise"):
        parts = sum(float(last[f"poprisk/{layer}/{name}"]) * sizes[layer] for layer in LAYERS)
        whole = float(last[f"poprisk/{name}"])
        assert whole == pytest.approx(parts / sum(sizes.values()), abs=1e-6)
    assert {parse_key(key).group for key in EXPECTED} == {"", *LAYERS}


def test_default_logs_totals_only_and_leaves_the_run(tmp_path):
    watched, trainer = fit(tmp_path, PopRiskMonitor(2), max_epochs=1)
    names = {k for k in trainer.callback_metrics if k.startswith("poprisk/")}
    assert "poprisk/signal_to_noise" in names
    assert not any(parse_key(name).group for name in names)
    layered, _ = fit(tmp_path, PopRiskMonitor(2, per_layer=2), max_epochs=1)
    plain, _ = fit(tmp_path, Callback(), max_epochs=1)
    for model in (watched, layered):
        toy.assert_same(model.state_dict(), plain.state_dict())


def test_predicted_decrease_is_of_unclipped_gradients(tmp_path):
    """lr=1e-9: the weights of both runs are the same, clipped or not."""
    values = []
    for clip in (None, 1e-3):
        settings = {"gradient_clip_val": clip, "max_epochs": 1}
        _, trainer = fit(tmp_path, PopRiskMonitor(1), nearly_still, **settings)
        values.append(float(trainer.callback_metrics["poprisk/predicted_decrease"]))
    # Adam's direction does not know the scale of the gradient, the product does.
    assert values[1] == pytest.approx(values[0], rel=0.5)
    assert values[0] > 0


def needs(module):
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed (no extra needs it)")


@pytest.fixture
def trackers_environment():
    """Trackers set variables of their own."""
    with mock.patch.dict(os.environ):
        yield


@needs("tensorboard")
def test_tensorboard_event_files(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, PopRiskMonitor(2, per_layer=True), logger=logger)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert set(events.Tags()["scalars"]) >= EXPECTED


@needs("wandb")
@pytest.mark.usefixtures("trackers_environment")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_offline(tmp_path):
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=tmp_path, offline=True)
    fit(tmp_path, PopRiskMonitor(2, per_layer=True), logger=logger)
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert set(summary) >= EXPECTED


@needs("mlflow")
@pytest.mark.usefixtures("trackers_environment")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_file_store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer ones ask for it
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger(tracking_uri=(tmp_path / "mlruns").as_uri())
    fit(tmp_path, PopRiskMonitor(2, per_layer=True), logger=logger)
    history = logger.experiment.get_run(logger.run_id).data.metrics
    assert set(history) >= EXPECTED


@pytest.mark.parametrize(("value", "expected"), [("true", True), ("2", 2)])
def test_per_layer_from_the_command_line(value, expected):
    jsonargparse = pytest.importorskip("jsonargparse", reason="jsonargparse is not installed")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(PopRiskMonitor, "monitor")
    chosen = parser.parse_args([f"--monitor.per_layer={value}"]).monitor.per_layer
    assert chosen == expected
    assert type(chosen) is type(expected)


def test_refuses():
    with pytest.raises(ValueError, match="Invalid per_layer: 0"):
        PopRiskMonitor(per_layer=0)
