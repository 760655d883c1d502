"""What counts as data seen before: batches drawn against the data, not the trainer's epochs.

F is below 1 from the second window on; an onset then comes with the first window whose data count
as seen before.
"""

import dataclasses
import logging

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.rank_zero import WarningCache
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, WeightedRandomSampler

from poprisk_integrations.diagnostics import GradientWindow
from poprisk_integrations.lightning import PopRiskEarlyStopping
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings

DATA = toy.noisy_data(512, flips=1.0)  # 64 batches
PASS = 64


class Combined(toy.Classifier):
    """Takes batches of several loaders too."""

    def training_step(self, batch, batch_idx):
        parts = batch if isinstance(batch[0], (list, tuple)) else [batch]
        return sum(super(Combined, self).training_step(part, batch_idx) for part in parts)


@pytest.fixture(autouse=True)
def no_signal(monkeypatch):
    """F of the first window of a run is 2, of all others 0.5."""
    close = GradientWindow.close

    def scripted(window):
        window.closed = getattr(window, "closed", 0) + 1
        return dataclasses.replace(close(window), ratio=2.0 if window.closed == 1 else 0.5)

    monkeypatch.setattr(GradientWindow, "close", scripted)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA)

    def __len__(self):
        return len(DATA)


class Reloaded(LightningDataModule):
    def train_dataloader(self):
        return loader(shuffle=True)


def loader(data=DATA, **kwargs):
    return DataLoader(data, batch_size=8, **kwargs)


def onset(root, data, steps=160, arguments=None, **kwargs):
    stop = PopRiskEarlyStopping(window=8, action="monitor", **(arguments or {}))
    trainer = toy.trainer(root, [stop], max_epochs=-1, max_steps=steps, **kwargs)
    trainer.fit(Combined(), data)
    assert trainer.global_step == steps
    return stop.onset_step


def weighted():
    return WeightedRandomSampler([1.0] * len(DATA), 64)


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (lambda: loader(shuffle=True), {"limit_train_batches": 8}),
        (lambda: loader(shuffle=True), {"limit_train_batches": 0.125}),
        (lambda: loader(sampler=RandomSampler(DATA, num_samples=64)), {}),
        (lambda: loader(sampler=weighted()), {}),
        (
            lambda: CombinedLoader([loader(shuffle=True), loader(toy.noisy_data(64))], "min_size"),
            {},
        ),
        (
            lambda: CombinedLoader(
                [loader(shuffle=True), loader(toy.noisy_data(64))], "max_size_cycle"
            ),
            {"limit_train_batches": 8},
        ),
    ],
)
def test_an_epoch_that_is_shorter_than_the_data_is_no_pass(tmp_path, data, settings):
    """8 batches an epoch of 64: the window that begins after 64 batches is the first of all."""
    torch.manual_seed(0)
    assert onset(tmp_path, data(), **settings) == PASS + 8


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (lambda: loader(), {"limit_train_batches": 8}),
        (lambda: loader(shuffle=True), {"overfit_batches": 8}),
        (lambda: loader(toy.noisy_data(64, flips=1.0), shuffle=True), {}),
    ],
)
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_the_same_batches_again_are_a_pass_each(tmp_path, data, settings):
    assert onset(tmp_path, data(), steps=32, **settings) == 16


def test_accumulation_and_validation_inside_an_epoch_do_not_matter(tmp_path):
    class Validated(Combined):
        def validation_step(self, batch, batch_idx):
            pass

    stop = PopRiskEarlyStopping(window=4, action="monitor")
    settings = {"accumulate_grad_batches": 4, "limit_train_batches": 8, "val_check_interval": 4}
    trainer = toy.trainer(tmp_path, [stop], max_epochs=-1, max_steps=24, **settings)
    trainer.fit(Validated(), loader(shuffle=True), loader())
    assert stop.onset_step == 16 + 4  # 64 batches are 16 steps


@pytest.mark.parametrize(
    ("data", "settings", "reason"),
    [
        (lambda: DataLoader(Stream(), batch_size=8), {}, "the data are a stream"),
        (Reloaded, {"reload_dataloaders_every_n_epochs": 1}, "loaders are made anew"),
    ],
)
@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
def test_where_nothing_shows_it_the_user_is_asked(tmp_path, caplog, data, settings, reason):
    with caplog.at_level(logging.INFO):
        assert onset(tmp_path, data(), **settings) is None
    lines = [r.message for r in caplog.records if "epoch_steps" in r.message]
    assert len(lines) == 1
    assert reason in lines[0]
    given = {"epoch_steps": PASS}
    assert onset(tmp_path, data(), arguments=given, **settings) == PASS + 8


def test_the_users_word_counts_more_than_the_loader(tmp_path):
    torch.manual_seed(0)
    data = loader(shuffle=True)
    assert onset(tmp_path, data, arguments={"epoch_steps": 96}) == 96 + 8
    assert onset(tmp_path, data, limit_train_batches=8, arguments={"epoch_steps": 8}) == 16


def test_a_resumed_run_knows_what_was_drawn(tmp_path):
    """Also in mid-epoch, and from a checkpoint of before batches were counted."""
    settings = {"limit_train_batches": 8, "max_epochs": -1}

    def stop():
        return PopRiskEarlyStopping(window=8, action="monitor")

    first = toy.trainer(tmp_path, [stop()], max_steps=40, **settings)
    first.fit(Combined(), loader(shuffle=True))
    path = tmp_path / "at40.ckpt"
    first.save_checkpoint(path)
    for is_old in (False, True):
        if is_old:
            content = torch.load(path, weights_only=True)
            (state,) = content["callbacks"].values()
            assert state.pop("passes") == pytest.approx(40 / PASS)
            torch.save(content, path)
        again = stop()
        trainer = toy.trainer(tmp_path, [again], max_steps=96, **settings)
        trainer.fit(Combined(), loader(shuffle=True), ckpt_path=path)
        assert again.onset_step == PASS + 8


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_without_a_loss_count_as_drawn(tmp_path, monkeypatch):
    # Lightning warns of them once per process, for which another test waits.
    monkeypatch.setattr(Closure, "warning_cache", WarningCache())

    class Skips(Combined):
        def training_step(self, batch, batch_idx):
            return None if self.trainer.global_step < 16 else super().training_step(batch, 0)

    stop = PopRiskEarlyStopping(window=8, action="monitor")
    trainer = toy.trainer(tmp_path, [stop], max_steps=96, max_epochs=-1, limit_train_batches=8)
    trainer.fit(Skips(), loader(shuffle=True))
    assert stop.onset_step == PASS + 8
