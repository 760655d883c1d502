"""The cut on real fits: where it must fire, where it must not, and what survives it."""

import logging

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset

from poprisk_integrations.lightning import PopRiskEarlyStopping, PopRiskLRCut
from tests.integration.lightning import toy
from tests.integration.lightning.test_resume import ResumableLoader, SaveAt

pytestmark = toy.third_party_warnings

LR, WINDOW, EXAMPLES = 0.05, 32, 4096
TEACHER = torch.randn(16, generator=torch.Generator().manual_seed(3))


class Regression(LightningModule):
    """Least squares with momentum at a rate that overshoots in the steep directions."""

    def __init__(self, schedule=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(16, 1)
        self.schedule = schedule

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.net(x).squeeze(-1) - y).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=LR, momentum=0.9)
        if self.schedule is None:
            return optimizer
        scheduler = {"scheduler": self.schedule(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def excess_loss(self):
        """Over the best linear model's, for inputs of these spreads."""
        error = (self.net.weight.detach()[0] - TEACHER) * spreads()
        return float(error.square().sum())


def spreads():
    return torch.linspace(0.3, 2.0, 16)


def loader(cls=DataLoader):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, 16, generator=g) * spreads()
    y = x @ TEACHER + torch.randn(EXAMPLES, generator=g)
    return cls(TensorDataset(x, y), batch_size=32)


def fit(root, callbacks, schedule=None, ckpt_path=None, cls=DataLoader, **kwargs):
    model, trainer = (
        Regression(schedule),
        toy.trainer(root, callbacks, **{"max_epochs": 3, **kwargs}),
    )
    trainer.fit(model, loader(cls), ckpt_path=ckpt_path)
    return model, trainer


class Rates(Callback):
    """The learning rate with which each step was taken."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_cuts_where_steps_overshoot(tmp_path, caplog):
    cut, rates = PopRiskLRCut(window=WINDOW), Rates()
    with caplog.at_level(logging.INFO):
        model, trainer = fit(tmp_path, [cut, rates])
    uncut, _ = fit(tmp_path, [])

    assert 1 <= cut.cuts <= 3
    assert float(trainer.callback_metrics["poprisk/lr_cuts"]) == cut.cuts
    assert rates.rates[: 2 * WINDOW] == [LR] * 2 * WINDOW  # two windows say so, then it falls
    assert rates.rates[2 * WINDOW] == pytest.approx(0.3 * LR)
    assert rates.rates[-1] == pytest.approx(LR * 0.3**cut.cuts)
    assert model.excess_loss() < 0.5 * uncut.excess_loss()
    first, *lines, last = [r.message for r in caplog.records if "PopRiskLRCut" in r.message]
    assert f"looks every {WINDOW} steps" in first
    assert f"the first cut can come at step {2 * WINDOW}" in first
    assert len(lines) == cut.cuts
    assert f"learning rate cut at step {2 * WINDOW}: steps gain nothing" in lines[0]
    assert "cut the learning rate" in last


@pytest.mark.parametrize("make_optimizer", [toy.adamw, toy.gated, toy.sgd])
def test_does_not_cut_while_memorising_and_changes_nothing(tmp_path, make_optimizer):
    cut, watched, alone = PopRiskLRCut(window=8), *(toy.Classifier(make_optimizer) for _ in "ab")
    with_it = toy.trainer(tmp_path, [cut], max_epochs=40)
    with_it.fit(watched, toy.loader())
    without = toy.trainer(tmp_path, max_epochs=40)
    without.fit(alone, toy.loader())
    assert cut.cuts == 0
    assert cut.last_cut_step is None
    toy.assert_same(watched.state_dict(), alone.state_dict())
    toy.assert_same(with_it.optimizers[0].state_dict(), without.optimizers[0].state_dict())


def test_limits_are_kept(tmp_path):
    once = PopRiskLRCut(window=WINDOW, max_cuts=1)
    _, trainer = fit(tmp_path, [once])
    assert once.cuts == 1
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.3 * LR)

    floored = PopRiskLRCut(window=WINDOW, min_lr=0.5 * LR)
    _, trainer = fit(tmp_path, [floored])
    assert floored.cuts == 1  # to the floor, and nothing after it
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5 * LR)


def test_a_scheduler_does_not_undo_it(tmp_path):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10_000)

    cut, rates = PopRiskLRCut(window=WINDOW, max_cuts=1), Rates()
    fit(tmp_path, [cut, rates], schedule)
    factors = [1.0 if i < cut.last_cut_step else 0.3 for i in range(len(rates.rates))]
    expected = [LR * f * (1 - i / 10_000) for i, f in enumerate(factors)]
    assert rates.rates == pytest.approx(expected)


@pytest.mark.parametrize("step", [48, 100])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(tmp_path, step):
    """In the window before a cut, and after it."""

    def schedule(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)

    saver, whole_cut, cut = SaveAt(tmp_path, step), *(PopRiskLRCut(window=WINDOW) for _ in "ab")
    whole, _ = fit(tmp_path, [whole_cut, saver], schedule, cls=ResumableLoader)
    resumed, _ = fit(tmp_path, [cut], schedule, saver.path, cls=ResumableLoader)
    assert whole_cut.cuts >= 1
    toy.assert_same(resumed.state_dict(), whole.state_dict())
    toy.assert_same(cut.state_dict(), whole_cut.state_dict())


def test_goes_together_with_the_stop(tmp_path):
    """In either order; a cut slows the stop's training time down."""
    sums = []
    for order in (1, -1):
        cut, stop = (
            PopRiskLRCut(window=WINDOW),
            PopRiskEarlyStopping(window=WINDOW, action="monitor"),
        )
        rates = Rates()
        fit(tmp_path, [*[cut, stop][::order], rates])
        assert cut.cuts >= 1
        sums.append(stop.history[-1]["lr_sum"])
        assert sums[-1] == pytest.approx(sum(rates.rates))
    assert sums[0] == sums[1]


def test_other_batches_on_resume_are_named(tmp_path):
    saver = SaveAt(tmp_path, 128)  # the end of an epoch
    fit(tmp_path, [PopRiskLRCut(window=WINDOW), saver])
    with pytest.warns(UserWarning, match="resumed with .*accumulate_grad_batches 1 -> 2"):
        fit(
            tmp_path,
            [PopRiskLRCut(window=WINDOW)],
            ckpt_path=saver.path,
            accumulate_grad_batches=2,
        )


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_scheduler_that_undoes_it_is_told_once(tmp_path, interval):
    class FromConstants(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self):
            return [LR * 0.999**self.last_epoch for _ in self.optimizer.param_groups]

    class Scheduled(Regression):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=LR, momentum=0.9)
            scheduler = {"scheduler": FromConstants(optimizer), "interval": interval}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    cut = PopRiskLRCut(window=WINDOW)
    trainer = toy.trainer(tmp_path, [cut], max_epochs=3)
    with pytest.warns(UserWarning, match="the scheduler overwrites it") as caught:
        trainer.fit(Scheduled(), loader())
    assert cut.cuts >= 1
    assert len([w for w in caught if "overwrites" in str(w.message)]) == 1
