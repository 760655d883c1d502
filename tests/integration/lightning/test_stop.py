"""The stop on real fits: where it fires, where it does not, what reaches loggers and files."""

import csv
import json
import math
import os
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader, IterableDataset

from tests.integration.lightning import toy

pytestmark = [
    *toy.third_party_warnings,
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the log"),
]


class CleanStream(IterableDataset):
    """Batches that are never seen twice, labelled by the teacher."""

    def __iter__(self):
        for seed in range(160):
            yield toy.noisy_data(32, flips=0.0, seed=seed)[:]


def held_out_loss(model):
    x, y = toy.noisy_data(2048, toy.FLIPS, seed=1)[:]
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model.net(x), y))


def test_stops_a_memorising_run_before_its_held_out_loss_rises(tmp_path):
    stop, model = toy.signal(), toy.Classifier(toy.gated)
    _, trainer = toy.fit(tmp_path, stop, model=model, max_epochs=50)
    assert stop.stopped_step == trainer.global_step < 50 * toy.STEPS_PER_EPOCH
    to_the_end, _ = toy.fit(tmp_path, model=toy.Classifier(toy.gated), max_epochs=50)
    assert held_out_loss(model) < held_out_loss(to_the_end)


def test_does_not_stop_a_clean_stream(tmp_path):
    stop = toy.signal(window="auto")
    model = toy.Classifier(lambda params: torch.optim.AdamW(params, lr=3e-3))
    data = DataLoader(CleanStream(), batch_size=None)
    toy.fit(tmp_path, stop, model=model, data=data, max_steps=160, max_epochs=-1)
    assert (stop.stopped_step, stop.onset_step) == (None, None)
    assert "at step 8 batches agreed on a direction" in stop.stopping_reason


def test_training_time_is_the_sum_of_learning_rates_before_the_scheduler(tmp_path):
    """With a rate that falls by a tenth at step 40, twice the time takes ten times the steps."""

    class Falling(toy.Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [40], gamma=0.1)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    stop = toy.signal()
    _, trainer = toy.fit(tmp_path, stop, model=Falling(), max_epochs=50)
    # At the first rate it is step 45, after 0.45 units of time less what is rounded up: 40 steps of
    # 1e-2, then 1e-3 each.
    assert 40 + 10 * 4 < stop.stopped_step <= 40 + 10 * 5
    assert stop.stopped_step == trainer.global_step


# Logs.


def logged(root, stop, every=1000, **settings):
    """Lines of a logger by optimizer step."""
    toy.fit(root, stop, logger=CSVLogger(root), log_every_n_steps=every, **settings)
    with open(root / "lightning_logs/version_0/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) + 1 for row in rows]
    assert len(set(steps)) == len(steps)
    return dict(sorted(zip(steps, rows, strict=True)))


def test_every_line_of_a_logger_has_the_present_values(tmp_path):
    rows = logged(tmp_path, toy.signal(), every=3)
    # Every third step from the first window on, and at the onset at once; the stop is at step 45.
    assert list(rows) == sorted([*range(9, 46, 3), 32])
    onsets = [row["poprisk/onset_step"] for row in rows.values()]
    assert onsets == ["32.0" if step >= 32 else "" for step in rows]
    assert all(row["poprisk/signal_ratio"] for row in rows.values())


@pytest.mark.parametrize(("settings", "step"), [({}, 45), ({"min_epochs": 9}, 72)])
def test_onset_and_stop_reach_loggers_between_their_lines(tmp_path, settings, step):
    """Also a verdict that had to wait for the end of an epoch."""
    stop = toy.signal()
    rows = logged(tmp_path, stop, **settings)
    rows = {step: row for step, row in rows.items() if row["poprisk/onset_step"]}
    assert list(rows) == [stop.onset_step, stop.stopped_step] == [32, step]
    assert float(rows[32]["poprisk/onset_step"]) == 32
    assert float(rows[step]["poprisk/predicted_stop_step"]) == step


def test_a_verdict_that_had_to_wait_is_taken_back_when_signal_returns(tmp_path):
    """The trainer would keep `should_stop`, and end the run as soon as it may."""

    class SignalReturns(toy.Classifier):
        def training_step(self, batch, batch_idx):
            if self.global_step < 60:
                return super().training_step(batch, batch_idx)
            return (self.net(batch[0]) - 100.0).square().mean()  # all examples agree

    stop = toy.signal()  # due at 45, but not at 88, when it becomes allowed
    rows = logged(tmp_path, stop, model=SignalReturns(), max_epochs=12, min_epochs=11)
    assert stop.stopped_step is None
    assert "no stop is due any more" in stop.stopping_reason
    values = [float(row["poprisk/onset_step"] or 0.0) for row in rows.values()]
    assert max(values[:-1]) > 0
    assert math.isnan(values[-1])


def test_log_is_called_only_where_something_is_new(tmp_path):
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

    data = toy.loader(n=3200)  # epochs of 100 steps
    settings = {"model": Counted(), "data": data, "max_epochs": 2}
    logged(tmp_path, toy.watch(window=20), every=50, **settings)
    # Ends of windows, and lines of loggers where a value has drifted or the epoch is another.
    assert {*range(20, 201, 20), 150} <= set(calls) <= {*range(20, 201, 20), *range(50, 201, 50)}
    assert len(calls) == len(set(calls))


def test_other_callbacks_can_monitor_it(tmp_path):
    """ModelCheckpoint sees the value of the same step; the stock EarlyStopping finds the key."""
    name, stop = "poprisk/signal_ratio", toy.watch()
    options = {"monitor": name, "mode": "min", "filename": "{step}"}
    best = ModelCheckpoint(tmp_path / "c", every_n_train_steps=8, **options)
    stock = EarlyStopping(name, mode="min", patience=1, stopping_threshold=0.5)
    toy.fit(tmp_path, best, stock, stop, enable_checkpointing=True, max_epochs=9)
    saved = torch.load(best.best_model_path, weights_only=True)
    rule = saved["callbacks"][stop.state_key]["rule"]
    assert float(best.best_model_score) == pytest.approx(rule["signal_ratio"])
    assert rule["windows"] == saved["global_step"] / 8
    assert 0 < stock.stopped_epoch < 8


def test_a_checkpoint_that_picks_by_f_ignores_epochs_without_one(tmp_path):
    """Logged as -1 before the first window, that epoch was the best one for ever."""
    stop = toy.watch(window=16)
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="poprisk/signal_ratio", mode="min")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*could not find the monitored key")
        toy.fit(tmp_path, stop, best, enable_checkpointing=True, max_epochs=6)
    ratios = [row["signal_ratio"] for row in stop.history]
    assert float(best.best_model_score) == pytest.approx(min(ratios))


# The report; what is in it: `tests/integration/test_stop_contract.py`.


class Tracker(DummyLogger):
    """As trackers are: one directory for all runs, a name and a version for each."""

    def __init__(self, root, version):
        super().__init__()
        self._root, self._version = str(root), version

    save_dir = property(lambda self: self._root)
    name = property(lambda self: "project")
    version = property(lambda self: self._version)


@pytest.mark.parametrize(
    ("arguments", "make", "places"),
    [
        ({}, lambda root: {"logger": CSVLogger(root)}, ["lightning_logs/version_0"]),
        ({}, lambda root: {"logger": Tracker(root, "first")}, ["project/first"]),
        ({}, lambda root: {"logger": Tracker(root, 2)}, ["project/version_2"]),
        ({}, lambda root: {"enable_checkpointing": True}, ["checkpoints"]),
        ({}, lambda root: {}, []),  # no logger, no checkpoints
        ({}, lambda root: {"logger": DummyLogger()}, []),  # a logger without a directory
        ({"action": "monitor"}, lambda root: {"logger": CSVLogger(root)}, []),
    ],
)
def test_a_report_is_left_where_the_run_keeps_its_files(tmp_path, arguments, make, places):
    toy.fit(tmp_path, toy.signal(**arguments), max_epochs=2, **make(tmp_path))
    found = list(tmp_path.rglob("poprisk_stop.json"))
    assert [str(path.parent.relative_to(tmp_path)) for path in found] == places
    for path in found:
        report = json.loads(path.read_text())
        assert (report["stopped"], report["global_step"]) == (False, 16)


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path):
    """And leaves no half of one."""

    class FullDisk(Callback):
        def on_train_end(self, trainer, pl_module):
            (tmp_path / "c" / "poprisk_stop.json").mkdir()

    saver = ModelCheckpoint(tmp_path / "c", "last")
    callbacks = [toy.signal(), FullDisk(), saver]
    with pytest.warns(UserWarning, match="its report could not be written to"):
        toy.fit(tmp_path, *callbacks, enable_checkpointing=True, max_epochs=2)
    assert sorted(os.listdir(tmp_path / "c")) == ["last.ckpt", "poprisk_stop.json"]
