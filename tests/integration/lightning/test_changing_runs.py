"""Accumulation, batch size, length and trained parameters that change while a run lasts."""

import logging
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from poprisk_integrations.lightning import PopRiskEarlyStopping, PopRiskLRCut
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings


class At(Callback):
    """Does something at the start of one epoch."""

    def __init__(self, epoch, act):
        self.epoch, self.act = epoch, act

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.act(trainer, pl_module)


def watch(**arguments):
    return PopRiskEarlyStopping(action="monitor", **arguments)


def fit(root, callbacks, data=None, model=None, ckpt_path=None, **kwargs):
    trainer = toy.trainer(root, callbacks, **{"max_epochs": 10, **kwargs})
    trainer.fit(model or toy.Classifier(), data or toy.loader(), ckpt_path=ckpt_path)
    return trainer


def ends(stop):
    return [row["step"] for row in stop.history]


@pytest.mark.parametrize("order", [1, -1])
def test_windows_follow_an_accumulation_schedule(tmp_path, caplog, order):
    """32 steps an epoch, from epoch 2 on 4 of eight batches; a window of 8 steps is two passes."""
    torch.manual_seed(0)
    stop, schedule = watch(), GradientAccumulationScheduler({0: 1, 2: 8})
    with caplog.at_level(logging.INFO):
        fit(tmp_path, [stop, schedule][::order], toy.loader(n=1024, shuffle=True), max_epochs=9)
    assert ends(stop) == [32, 64, 72, 80, 88]
    # A window that stayed at 32 steps was eight passes, and its F above 3.
    assert all(row["signal_ratio"] < 1 for row in stop.history[1:])
    said = [r.message for r in caplog.records if "starts here" in r.message]
    assert said == [
        "PopRiskEarlyStopping: window_steps 32 -> 8, epoch_steps 32 -> 4, accumulate_grad_batches "
        "1 -> 8; a window of 8 steps starts here."
    ]


def test_a_schedule_that_accumulates_from_the_start(tmp_path, caplog):
    """It is not yet in force in `on_train_start`."""
    stop, schedule = watch(), GradientAccumulationScheduler({0: 4})
    with caplog.at_level(logging.INFO):
        fit(tmp_path, [stop, schedule], toy.loader(n=1024), max_epochs=8)
    assert ends(stop) == [8 * i for i in range(1, 9)]
    assert not [r for r in caplog.records if "starts here" in r.message]
    assert any("one pass over the data is 8 steps" in r.message for r in caplog.records)


def test_a_resumed_schedule_equals_an_uninterrupted_one(tmp_path):
    def callbacks():
        return [watch(window=6), GradientAccumulationScheduler({0: 1, 2: 2})]

    saver = ModelCheckpoint(tmp_path, "{step}", every_n_epochs=4, save_top_k=-1)
    whole, again = callbacks(), callbacks()
    fit(tmp_path, [*whole, saver], enable_checkpointing=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        path = tmp_path / "step=24.ckpt"  # 8 steps, 8 steps, then 4 an epoch
        trainer = fit(tmp_path, again, ckpt_path=path)
    assert trainer.global_step == 48
    toy.assert_same(again[0].state_dict(), whole[0].state_dict())


def test_windows_follow_the_batch_size(tmp_path):
    """Public schedules set it on the batch sampler, as a loader's own attribute is fixed."""
    data = toy.noisy_data(256, toy.FLIPS)
    sampler = BatchSampler(SequentialSampler(data), 32, drop_last=False)

    def double(trainer, _):
        sampler.batch_size = 64
        trainer.fit_loop._combined_loader = None
        trainer.fit_loop.setup_data()

    stop = watch(window=5)
    fit(tmp_path, [stop, At(2, double)], DataLoader(data, batch_sampler=sampler), max_epochs=6)
    assert ends(stop) == [5, 10, 15, 16 + 5, 16 + 10, 16 + 15]
    assert stop.state_dict()["setup"]["batch_size"] == 64
    assert stop.state_dict()["setup"]["epoch_steps"] == 4


def test_a_run_that_is_made_longer_gets_longer_windows(tmp_path):
    """Windows of a third of a pass, and of a whole pass once the run has eight of them."""
    stop = watch()

    def longer(trainer, _):
        trainer.fit_loop.max_epochs = 9

    fit(tmp_path, [stop, At(1, longer)], toy.loader(n=1024), max_epochs=3)
    assert ends(stop) == [10, 20, 30, *(32 * i for i in range(2, 10))]


def test_a_learning_rate_changed_by_hand_counts_from_its_step_on(tmp_path):
    stop = watch(window=8)

    def by_hand(trainer, _):
        trainer.optimizers[0].param_groups[0]["lr"] = 1e-3

    fit(tmp_path, [stop, At(2, by_hand)], max_epochs=3)
    assert stop.history[-1]["lr_sum"] == pytest.approx(16 * 1e-2 + 8 * 1e-3)


class Toggles(Callback):
    """Freezes and thaws a layer every few steps, as training one layer at a time does."""

    def __init__(self, every):
        self.every = every

    def on_train_batch_start(self, trainer, pl_module, *_):
        is_thawed = (trainer.global_step // self.every) % 2 == 0
        pl_module.net[0].requires_grad_(is_thawed)


@pytest.mark.parametrize("order", [1, -1])
def test_a_window_that_can_never_end_says_so_once(tmp_path, order):
    stop, cut = watch(window=8), PopRiskLRCut(window=8)
    with pytest.warns(UserWarning, match="the trained parameters change") as caught:
        trainer = fit(tmp_path, [stop, cut, Toggles(5)][::order])
    assert trainer.global_step == 80
    assert stop.history == []
    said = [str(w.message) for w in caught if "PopRisk" in str(w.message)]
    assert sorted(text.partition(":")[0] for text in said) == ["PopRiskEarlyStopping", cut._name]
    assert all("before a window of 8 steps ends, so nothing is measured" in text for text in said)


def test_a_window_starts_afresh_at_a_freeze(tmp_path):
    stop = watch(window=8)

    def freeze(_, pl_module):
        pl_module.net[0].requires_grad_(False)

    class InMidEpoch(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            if trainer.global_step == 20:
                freeze(trainer, pl_module)

    fit(tmp_path, [stop, InMidEpoch()], max_epochs=5)  # without a warning
    assert ends(stop) == [8, 16, 28, 36]


def test_an_optimizer_that_is_replaced_is_followed(tmp_path):
    """Training time stood still, since the old one made no step any more."""
    stop = watch(window=8)

    def replace(trainer, pl_module):
        trainer.optimizers = [torch.optim.AdamW(pl_module.parameters(), lr=1e-3)]

    trainer = fit(tmp_path, [stop, At(2, replace)], max_epochs=4)
    assert stop.history[-1]["lr_sum"] == pytest.approx(16 * 1e-2 + 16 * 1e-3)
    assert not trainer.optimizers[0]._optimizer_step_post_hooks  # let go of


def test_groups_that_are_added_join_the_window(tmp_path):
    stop = watch(window=8)

    class Grows(toy.Classifier):
        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Linear(4, 4)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return torch.nn.functional.cross_entropy(self.net(x) + self.extra(self.net(x)), y)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.net.parameters(), lr=1e-2)

    def add(trainer, pl_module):
        group = {"params": pl_module.extra.parameters(), "lr": 1e-2}
        trainer.optimizers[0].add_param_group(group)

    fit(tmp_path, [stop, At(2, add)], model=Grows(), max_epochs=4)
    assert ends(stop) == [8, 16, 24, 32]
    assert len(stop.state_dict()["window"]["previous"]) == 6
