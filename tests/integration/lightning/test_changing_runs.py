"""What a pass over the data is, and what changes while a run lasts.

Batches drawn count against the data, not the trainer's epochs. Which loaders show the length of a
pass: `tests/unit/diagnostics/test_data_pass.py`.
"""

import dataclasses
import logging

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.rank_zero import WarningCache
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from poprisk_integrations.diagnostics import GradientWindow
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings


class At(Callback):
    """Does something at the start of one epoch."""

    def __init__(self, epoch, act):
        self.epoch, self.act = epoch, act

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.act(trainer, pl_module)


def ends(stop):
    return [row["step"] for row in stop.history]


@pytest.mark.parametrize("order", [1, -1])
def test_windows_follow_an_accumulation_schedule(tmp_path, caplog, order):
    """32 steps an epoch, from epoch 2 on 4 of eight batches; a window of 8 steps is two passes."""
    torch.manual_seed(0)
    stop, schedule = toy.watch(window="auto"), GradientAccumulationScheduler({0: 1, 2: 8})
    data = toy.loader(n=1024, shuffle=True)
    with caplog.at_level(logging.INFO):
        toy.fit(tmp_path, *[stop, schedule][::order], data=data, max_epochs=9)
    assert ends(stop) == [32, 64, 72, 80, 88]
    # A window that stayed at 32 steps was eight passes, and its F above 3.
    assert all(row["signal_ratio"] < 1 for row in stop.history[1:])
    said = [r.message for r in caplog.records if "starts here" in r.message]
    assert said == [
        "PopRiskEarlyStopping: window_steps 32 -> 8, epoch_steps 32 -> 4, accumulation_steps 1 -> "
        "8; a window of 8 steps starts here."
    ]


def test_a_schedule_that_accumulates_from_the_start(tmp_path, caplog):
    """It is not yet in force in `on_train_start`."""
    stop, schedule = toy.watch(window="auto"), GradientAccumulationScheduler({0: 4})
    with caplog.at_level(logging.INFO):
        toy.fit(tmp_path, stop, schedule, data=toy.loader(n=1024), max_epochs=8)
    assert ends(stop) == [8 * i for i in range(1, 9)]
    assert not [r for r in caplog.records if "starts here" in r.message]
    assert any("one pass over the data is 8 steps" in r.message for r in caplog.records)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_schedule_equals_an_uninterrupted_one(tmp_path):
    def ours():
        return [toy.watch(window=6), GradientAccumulationScheduler({0: 1, 2: 2})]

    saver = ModelCheckpoint(tmp_path, "{step}", every_n_epochs=4, save_top_k=-1)
    whole, again = ours(), ours()
    toy.fit(tmp_path, *whole, saver, enable_checkpointing=True)
    path = tmp_path / "step=24.ckpt"  # 8 steps, 8 steps, then 4 an epoch
    toy.fit(tmp_path, *again, ckpt_path=path)
    assert again[0].history
    toy.assert_same(again[0].state_dict(), whole[0].state_dict())


def test_windows_follow_the_batch_size(tmp_path):
    """Public schedules set it on the batch sampler, as a loader's own attribute is fixed."""
    data = toy.noisy_data(256, toy.FLIPS)
    sampler = BatchSampler(SequentialSampler(data), 32, drop_last=False)

    def double(trainer, _):
        sampler.batch_size = 64
        trainer.fit_loop._combined_loader = None
        trainer.fit_loop.setup_data()

    stop, loader = toy.watch(window=5), DataLoader(data, batch_sampler=sampler)
    toy.fit(tmp_path, stop, At(2, double), data=loader, max_epochs=6)
    assert ends(stop) == [5, 10, 15, 16 + 5, 16 + 10, 16 + 15]
    setup = stop.state_dict()["setup"]
    assert (setup["batch_size"], setup["epoch_steps"]) == (64, 4)


def test_a_run_that_is_made_longer_gets_longer_windows(tmp_path):
    """Windows of a third of a pass, and of a whole pass once the run has eight of them."""
    stop = toy.watch(window="auto")

    def longer(trainer, _):
        trainer.fit_loop.max_epochs = 9

    toy.fit(tmp_path, stop, At(1, longer), data=toy.loader(n=1024), max_epochs=3)
    assert ends(stop) == [10, 20, 30, *(32 * i for i in range(2, 10))]


def by_hand(trainer, _):
    trainer.optimizers[0].param_groups[0]["lr"] = 1e-3


def replaced(trainer, pl_module):
    trainer.optimizers = [torch.optim.AdamW(pl_module.parameters(), lr=1e-3)]


@pytest.mark.parametrize("act", [by_hand, replaced])
def test_a_learning_rate_counts_from_its_step_on_whoever_sets_it(tmp_path, act):
    """Of an optimizer that was replaced, training time would stand still."""
    stop = toy.watch()
    _, trainer = toy.fit(tmp_path, stop, At(2, act), max_epochs=4)
    assert stop.history[-1]["lr_sum"] == pytest.approx(16 * 1e-2 + 16 * 1e-3)
    assert not trainer.optimizers[0]._optimizer_step_post_hooks  # let go of


# Data seen before: F is below 1 from the second window on, and the onset comes with the first
# window whose data count as seen before.

DATA = toy.noisy_data(512, flips=1.0)
PASS = 64  # batches


class Combined(toy.Classifier):
    """Takes batches of several loaders too."""

    def training_step(self, batch, batch_idx):
        parts = batch if isinstance(batch[0], (list, tuple)) else [batch]
        return sum(super(Combined, self).training_step(part, batch_idx) for part in parts)


@pytest.fixture
def no_signal(monkeypatch):
    """F of the first window of a run is 2, of all others 0.5."""
    close = GradientWindow.close

    def scripted(window):
        window.closed = getattr(window, "closed", 0) + 1
        return dataclasses.replace(close(window), ratio=2.0 if window.closed == 1 else 0.5)

    monkeypatch.setattr(GradientWindow, "close", scripted)


class Reloaded(LightningDataModule):
    def train_dataloader(self):
        return loader(shuffle=True)


def loader(data=DATA, **kwargs):
    return DataLoader(data, batch_size=8, **kwargs)


def two_loaders():
    parts = [loader(shuffle=True), loader(toy.noisy_data(64))]
    return CombinedLoader(parts, "max_size_cycle")


def onset(root, data, steps=96, model=None, ckpt_path=None, **settings):
    stop = toy.watch(**settings.pop("arguments", {}))
    settings = {"max_epochs": -1, "max_steps": steps, **settings}
    toy.fit(root, stop, model=model or Combined(), data=data, ckpt_path=ckpt_path, **settings)
    return stop.onset_step


@pytest.mark.parametrize(
    ("data", "settings", "step"),
    [
        (lambda: loader(shuffle=True), {"limit_train_batches": 8}, PASS + 8),
        (lambda: loader(shuffle=True), {"limit_train_batches": 0.125}, PASS + 8),
        (two_loaders, {"limit_train_batches": 8}, PASS + 8),
        # The same batches again are a pass each.
        (loader, {"limit_train_batches": 8}, 16),
        (lambda: loader(shuffle=True), {"overfit_batches": 8}, 16),
    ],
)
@pytest.mark.usefixtures("no_signal")
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_an_epoch_that_is_shorter_than_the_data_is_no_pass(tmp_path, data, settings, step):
    torch.manual_seed(0)
    assert onset(tmp_path, data(), **settings) == step


@pytest.mark.usefixtures("no_signal")
def test_accumulation_and_validation_inside_an_epoch_do_not_matter(tmp_path):
    class Validated(Combined):
        val_dataloader = staticmethod(loader)

        def validation_step(self, batch, batch_idx):
            pass

    settings = {"accumulate_grad_batches": 4, "limit_train_batches": 8, "val_check_interval": 4}
    settings |= {"model": Validated(), "arguments": {"window": 4}, "steps": 24}
    assert onset(tmp_path, loader(shuffle=True), **settings) == 16 + 4  # 64 batches are 16 steps


@pytest.mark.usefixtures("no_signal")
def test_where_loaders_are_made_anew_the_user_is_asked(tmp_path, caplog):
    settings = {"reload_dataloaders_every_n_epochs": 1}
    with caplog.at_level(logging.INFO):
        assert onset(tmp_path, Reloaded(), **settings) is None
    (line,) = [r.message for r in caplog.records if "epoch_steps" in r.message]
    assert "loaders are made anew" in line
    assert onset(tmp_path, Reloaded(), arguments={"epoch_steps": PASS}, **settings) == PASS + 8


@pytest.mark.usefixtures("no_signal")
def test_a_resumed_run_knows_what_was_drawn(tmp_path):
    """Also in mid-epoch, and from a checkpoint of before batches were counted."""
    settings, saver = {"limit_train_batches": 8}, toy.SaveAt(tmp_path, 40)
    settings |= {"max_epochs": -1, "max_steps": 40, "model": Combined()}
    toy.fit(tmp_path, toy.watch(), saver, data=loader(shuffle=True), **settings)
    path = saver.path
    assert onset(tmp_path, loader(shuffle=True), ckpt_path=path, limit_train_batches=8) == PASS + 8
    content = torch.load(path, weights_only=True)
    (state,) = (v for k, v in content["callbacks"].items() if k.startswith("PopRisk"))
    assert state.pop("passes") == pytest.approx(40 / PASS)
    torch.save(content, path)
    assert onset(tmp_path, loader(shuffle=True), ckpt_path=path, limit_train_batches=8) == PASS + 8


@pytest.mark.usefixtures("no_signal")
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_without_a_loss_count_as_drawn(tmp_path, monkeypatch):
    # Lightning warns of them once per process, for which another test waits.
    monkeypatch.setattr(Closure, "warning_cache", WarningCache())

    class Skips(Combined):
        def training_step(self, batch, batch_idx):
            return None if self.trainer.global_step < 16 else super().training_step(batch, 0)

    settings = {"model": Skips(), "limit_train_batches": 8}
    assert onset(tmp_path, loader(shuffle=True), **settings) == PASS + 8
