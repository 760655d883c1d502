"""What reaches loggers, files and the history: every decision, and nothing unasked for."""

import csv
import json
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from poprisk_integrations.lightning import PopRiskEarlyStopping
from tests.integration.lightning import toy

pytestmark = [
    *toy.third_party_warnings,
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the log"),
]

OF_A_WINDOW = {
    f"poprisk/{name}{error}"
    for name in ("signal_ratio", "risk_decrease", "agreement")
    for error in ("", "_se")
}
OF_AN_ONSET = {"poprisk/onset_step", "poprisk/predicted_stop_step"}


class Seen(Callback):
    """Our values in callback_metrics after each step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        metrics = trainer.callback_metrics
        self.rows.append({k: float(v) for k, v in metrics.items() if k.startswith("poprisk/")})


class SignalReturns(toy.Classifier):
    """All examples agree from step 60 on."""

    def training_step(self, batch, batch_idx):
        if self.global_step < 60:
            return super().training_step(batch, batch_idx)
        return (self.net(batch[0]) - 100.0).square().mean()


def logged(root, stop, model=None, **kwargs):
    """Rows of a CSVLogger whose period is longer than the run."""
    settings = {"logger": CSVLogger(root), "log_every_n_steps": 1000, "max_epochs": 10, **kwargs}
    trainer = toy.trainer(root, [stop], **settings)
    trainer.fit(model or toy.Classifier(), toy.loader())
    with open(root / "lightning_logs/version_0/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["poprisk/onset_step"]]
    return {int(row["step"]) + 1: row for row in rows}, len(rows), trainer


def test_every_value_is_finite_and_there_from_when_it_exists_on(tmp_path):
    stop, seen = PopRiskEarlyStopping(window=8), Seen()
    toy.trainer(tmp_path, [stop, seen]).fit(toy.Classifier(), toy.loader())
    for step, row in enumerate(seen.rows, start=1):
        expected = OF_A_WINDOW if step >= 8 else set()
        assert row.keys() == expected | (OF_AN_ONSET if step >= stop.onset_step else set())
    assert all(math.isfinite(value) for row in seen.rows for value in row.values())
    for record in stop.history:
        row = seen.rows[record["step"] - 1]
        for name in ("signal_ratio", "signal_ratio_se", "agreement", "agreement_se"):
            assert row[f"poprisk/{name}"] == pytest.approx(record[name])
        assert row["poprisk/risk_decrease"] == pytest.approx(record["risk_decrease"])
        assert record["lr_sum"] == pytest.approx(1e-2 * record["step"])
        assert record["noise"] > 0
    json.dumps(stop.history, allow_nan=False)  # plain numbers


def test_onset_and_stop_reach_loggers_between_their_lines(tmp_path):
    stop = PopRiskEarlyStopping(window=8)
    rows, count, trainer = logged(tmp_path, stop)
    assert sorted(rows) == [stop.onset_step, stop.stopped_step]
    assert count == 2
    assert float(rows[stop.onset_step]["poprisk/onset_step"]) == stop.onset_step
    assert float(rows[stop.stopped_step]["poprisk/predicted_stop_step"]) == trainer.global_step


def test_a_verdict_at_the_end_of_an_epoch_reaches_loggers(tmp_path):
    stop = PopRiskEarlyStopping(window=8)
    rows, _, _ = logged(tmp_path, stop, min_epochs=9)
    assert stop.stopped_step == 72
    assert sorted(rows) == [stop.onset_step, 72]
    assert float(rows[72]["poprisk/predicted_stop_step"]) == 72


def test_an_onset_that_is_forgotten_reaches_loggers(tmp_path):
    stop = PopRiskEarlyStopping(window=8, min_steps=70)
    rows, _, _ = logged(tmp_path, stop, SignalReturns(), max_epochs=9, min_epochs=9)
    assert "no stop is due any more" in stop.stopping_reason
    values = [float(row["poprisk/onset_step"]) for _, row in sorted(rows.items())]
    assert values[0] > 0
    assert math.isnan(values[-1])


def test_a_monitors_verdict_reaches_loggers(tmp_path):
    stop = PopRiskEarlyStopping(window=8, action="monitor")
    rows, _, _ = logged(tmp_path, stop)
    assert sorted(rows) == [32, 45]
    assert float(rows[45]["poprisk/predicted_stop_step"]) == 45


def report(directory):
    with open(directory / "poprisk_stop.json") as file:
        return json.load(file)


def test_a_report_is_left_in_the_loggers_directory(tmp_path):
    stop = PopRiskEarlyStopping(window=8)
    _, _, trainer = logged(tmp_path, stop)
    found = report(tmp_path / "lightning_logs/version_0")
    assert found["stopped"] is True
    assert found["stop_step"] == found["global_step"] == trainer.global_step
    assert f"{found['reason']}; {found['diagnosis']}" == stop.stopping_reason
    assert found["window_steps"] == 8
    assert found["settings"]["kappa"] == 2.0
    assert found["history"] == stop.history
    assert found["setup"]["window_steps"] == 8
    assert found["setup"]["batch_size"] == 32


def test_or_beside_the_checkpoints(tmp_path):
    stop = PopRiskEarlyStopping(window=8)
    saver = ModelCheckpoint(tmp_path / "c")
    trainer = toy.trainer(tmp_path, [stop, saver], enable_checkpointing=True, max_epochs=2)
    trainer.fit(toy.Classifier(), toy.loader())
    found = report(tmp_path / "c")
    assert found["stopped"] is False
    assert found["global_step"] == 16


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({}, {}),  # no logger, no checkpoints
        ({}, {"logger": DummyLogger()}),  # a logger without a directory
        ({"action": "monitor"}, {"logger": "csv"}),
    ],
)
def test_no_report_where_a_run_keeps_no_files_or_may_not_stop(tmp_path, arguments, settings):
    if settings.get("logger") == "csv":
        settings = {"logger": CSVLogger(tmp_path)}
    stop = PopRiskEarlyStopping(window=8, **arguments)
    toy.trainer(tmp_path, [stop], max_epochs=3, **settings).fit(toy.Classifier(), toy.loader())
    assert not list(tmp_path.rglob("poprisk_stop.json"))


def test_log_is_called_only_where_something_is_new(tmp_path, monkeypatch):
    """Lightning's `log` costs a tenth of a millisecond per value."""
    calls = []

    class Counted(toy.Classifier):
        def log_dict(self, values, **kwargs):
            calls.append(self.global_step)
            super().log_dict(values, **kwargs)

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            falling = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
            return [optimizer], [{"scheduler": falling, "interval": "step"}]

    stop = PopRiskEarlyStopping(window=20, action="monitor")
    trainer = toy.trainer(
        tmp_path, [stop], max_epochs=2, logger=CSVLogger(tmp_path), log_every_n_steps=50
    )
    trainer.fit(Counted(), toy.loader(n=3200))  # epochs of 100 steps
    # Ends of windows, lines of loggers where a value has drifted or the epoch
    # is another.
    assert set(calls) >= {*range(20, 201, 20), 150}
    assert set(calls) <= {*range(20, 201, 20), *range(50, 201, 50)}
    assert len(calls) == len(set(calls))
