"""The stop on real fits: where it fires, where it does not, what it says and logs."""

import csv
import itertools
import logging
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.lightning import PopRiskEarlyStopping
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings

KEYS = ("poprisk/signal_ratio", "poprisk/onset_step", "poprisk/predicted_stop_step")


class History(Callback):
    """callback_metrics after each batch, as a later callback sees them."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        metrics = trainer.callback_metrics
        self.rows.append({k: float(metrics[k]) for k in KEYS if k in metrics})


class CleanStream(IterableDataset):
    """Batches that are never seen twice, labelled by the teacher."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        for seed in range(self.batches):
            yield toy.noisy_data(32, flips=0.0, seed=seed)[:]


def held_out_loss(model):
    x, y = toy.noisy_data(2048, toy.FLIPS, seed=1)[:]
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model.net(x), y))


def stop_by_hand(history, kappa):
    """Step of the stop at a constant rate from the windows' F, for noise that has not fallen."""
    ends = [0, *(record["step"] for record in history)]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(ends)]
    logs = [math.log(record["signal_ratio"]) for record in history]
    first = next(i for i, x in enumerate(logs) if x < 0)
    share = logs[first - 1] / (logs[first - 1] - logs[first])
    onset = middles[first - 1] + share * (middles[first] - middles[first - 1])
    return math.ceil(kappa * onset)


@pytest.mark.parametrize(
    ("make_optimizer", "kappa"), [(toy.adamw, 2.0), (toy.gated, 2.0), (toy.sgd, 2.0)]
)
def test_stops_a_memorising_run_before_its_held_out_loss_rises(tmp_path, make_optimizer, kappa):
    stop = PopRiskEarlyStopping(kappa=kappa, window=8)
    model, trainer = toy.Classifier(make_optimizer), toy.trainer(tmp_path, [stop], max_epochs=50)
    trainer.fit(model, toy.loader())

    assert stop.stopped_step == trainer.global_step < 50 * toy.STEPS_PER_EPOCH
    if make_optimizer is not toy.gated:  # its time depends on the gate
        assert stop.stopped_step == stop_by_hand(stop.history, kappa)

    to_the_end = toy.Classifier(make_optimizer)
    toy.trainer(tmp_path, max_epochs=50).fit(to_the_end, toy.loader())
    assert held_out_loss(model) < held_out_loss(to_the_end)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, PopRiskAdamW])
def test_does_not_stop_a_clean_stream(tmp_path, optimizer_class):
    stop = PopRiskEarlyStopping(window="auto")
    trainer = toy.trainer(tmp_path, [stop], max_steps=160, max_epochs=-1)
    model = toy.Classifier(lambda params: optimizer_class(params, lr=3e-3))
    trainer.fit(model, DataLoader(CleanStream(200), batch_size=None))

    assert trainer.global_step == 160
    assert stop.stopped_step is None
    assert stop.onset_step is None
    assert "at step 8 batches agreed on a direction" in stop.stopping_reason


def test_says_once_why_it_stopped(tmp_path, caplog):
    stop = PopRiskEarlyStopping(window=8)
    with caplog.at_level(logging.INFO):
        toy.trainer(tmp_path, [stop]).fit(toy.Classifier(), toy.loader())
    lines = [r.message for r in caplog.records if "PopRiskEarlyStopping" in r.message]
    assert lines[0] == (
        "PopRiskEarlyStopping: one pass over the data is 8 steps; memorising can be noticed from "
        "step 16 of 80 on"
    )
    assert lines[1:] == [f"PopRiskEarlyStopping: {stop.stopping_reason}"]
    assert f"stopped at step {stop.stopped_step}" in lines[1]
    assert f"noticed at step {stop.onset_step}" in lines[1]
    assert "memorising: batches agree no more than chance explains" in lines[1]


def test_logs_a_number_from_when_it_exists_on(tmp_path):
    """-1 for "none yet" looked like a measurement, and was the best of a minimum for ever."""
    stop, history = PopRiskEarlyStopping(window=8), History()
    toy.trainer(tmp_path, [stop, history]).fit(toy.Classifier(), toy.loader())

    assert history.rows[0] == history.rows[6] == {}
    assert history.rows[7]["poprisk/signal_ratio"] > 1.5  # the first window, in the same batch
    with_onset = [r.get("poprisk/onset_step") for r in history.rows]
    assert with_onset.index(stop.onset_step) == stop.onset_step - 1
    assert set(with_onset) == {None, stop.onset_step}
    assert history.rows[-1]["poprisk/predicted_stop_step"] == stop.stopped_step
    assert history.rows[stop.onset_step]["poprisk/predicted_stop_step"] == stop.stopped_step
    assert all(torch.tensor(list(r.values())).isfinite().all() for r in history.rows)


def test_every_line_of_a_logger_has_the_present_values(tmp_path):
    stop = PopRiskEarlyStopping(window=8)
    logger = CSVLogger(tmp_path)
    toy.trainer(tmp_path, [stop], logger=logger, log_every_n_steps=3).fit(
        toy.Classifier(), toy.loader()
    )
    with open(tmp_path / "lightning_logs/version_0/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    # Every third step from the first window on, and at the onset at once; the stop is at step 45.
    assert [int(row["step"]) for row in rows] == sorted([*range(8, 45, 3), 31])
    onsets = [row["poprisk/onset_step"] for row in rows]
    assert onsets == ["32.0" if int(row["step"]) >= 31 else "" for row in rows]
    assert all(row["poprisk/signal_ratio"] for row in rows)


def test_other_callbacks_can_monitor_it(tmp_path):
    """ModelCheckpoint sees the value of the same step; the stock EarlyStopping finds the key."""
    stop = PopRiskEarlyStopping(window=8, action="monitor")
    checkpoint = ModelCheckpoint(
        tmp_path / "c",
        monitor="poprisk/signal_ratio",
        mode="min",
        every_n_train_steps=8,
        filename="{step}",
    )
    stock = EarlyStopping("poprisk/signal_ratio", mode="min", patience=1, stopping_threshold=0.5)
    trainer = toy.trainer(
        tmp_path, [checkpoint, stock, stop], enable_checkpointing=True, max_epochs=9
    )
    trainer.fit(toy.Classifier(), toy.loader())

    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    rule = saved["callbacks"][stop.state_key]["rule"]
    assert float(checkpoint.best_model_score) == pytest.approx(rule["signal_ratio"])
    assert rule["windows"] == saved["global_step"] / 8
    assert 0 < stock.stopped_epoch < 8


@pytest.mark.parametrize("make_optimizer", [toy.adamw, toy.gated])
def test_monitoring_leaves_the_run_bitwise_the_same(tmp_path, make_optimizer):
    watched, alone = toy.Classifier(make_optimizer), toy.Classifier(make_optimizer)
    stop = PopRiskEarlyStopping(window=8, kappa=1.2, action="monitor")
    torch.manual_seed(0)
    with_it = toy.trainer(tmp_path, [stop], gradient_clip_val=0.5, max_epochs=15)
    with_it.fit(watched, toy.loader(shuffle=True))
    torch.manual_seed(0)
    without = toy.trainer(tmp_path, gradient_clip_val=0.5, max_epochs=15)
    without.fit(alone, toy.loader(shuffle=True))

    assert stop.onset_step is not None
    assert stop.stopped_step is None
    assert stop.metrics()["poprisk/predicted_stop_step"] < with_it.global_step
    assert with_it.global_step == without.global_step
    toy.assert_same(watched.state_dict(), alone.state_dict())
    toy.assert_same(with_it.optimizers[0].state_dict(), without.optimizers[0].state_dict())


def test_monitoring_says_what_it_would_have_done(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        stop = PopRiskEarlyStopping(window=8, action="monitor")
        toy.trainer(tmp_path, [stop]).fit(toy.Classifier(), toy.loader())
    assert [r.message for r in caplog.records if "would have stopped at step" in r.message]


def test_training_time_is_the_sum_of_learning_rates_before_the_scheduler(tmp_path):
    """With a rate that falls by a tenth at step 40, twice the time takes ten times the steps."""

    class Falling(toy.Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [40], gamma=0.1)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    stop = PopRiskEarlyStopping(window=8)
    trainer = toy.trainer(tmp_path, [stop], max_epochs=50)
    trainer.fit(Falling(), toy.loader())
    by_hand = stop_by_hand([r for r in stop.history if r["step"] <= 40], 2.0)
    assert by_hand == 45  # after 0.45 units of time, less what is rounded up
    # Steps 1-40 at 1e-2, then 1e-3.
    assert 40 + 10 * (by_hand - 41) < stop.stopped_step <= 40 + 10 * (by_hand - 40)
    assert stop.stopped_step == trainer.global_step
