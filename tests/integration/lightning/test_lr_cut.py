"""The cut on real fits: where it must fire, where it must not, and what survives it."""

import logging

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset

from poprisk_integrations.lightning import PopRiskLRCut
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings

LR, WINDOW, EXAMPLES = 0.05, 32, 4096
TEACHER = torch.randn(16, generator=torch.Generator().manual_seed(3))


class Regression(LightningModule):
    """Least squares with momentum at a rate that overshoots in the steep directions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(16, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.net(x).squeeze(-1) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR, momentum=0.9)

    def excess_loss(self):
        """Over the best linear model's, for inputs of these spreads."""
        error = (self.net.weight.detach()[0] - TEACHER) * spreads()
        return float(error.square().sum())


def spreads():
    return torch.linspace(0.3, 2.0, 16)


def loader():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, 16, generator=g) * spreads()
    y = x @ TEACHER + torch.randn(EXAMPLES, generator=g)
    return DataLoader(TensorDataset(x, y), batch_size=32)


def fit(root, *callbacks):
    return toy.fit(root, *callbacks, model=Regression(), data=loader(), max_epochs=3)


class Rates(Callback):
    """The learning rate with which each step was taken."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_cuts_where_steps_overshoot(tmp_path, caplog):
    cut, rates = PopRiskLRCut(window=WINDOW), Rates()
    with caplog.at_level(logging.INFO):
        model, trainer = fit(tmp_path, cut, rates)
    uncut, _ = fit(tmp_path)

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


def test_does_not_cut_while_memorising_and_changes_nothing(tmp_path):
    cut = PopRiskLRCut(window=8)
    watched, with_it = toy.fit(tmp_path, cut, model=toy.Classifier(toy.gated), max_epochs=30)
    alone, without = toy.fit(tmp_path, model=toy.Classifier(toy.gated), max_epochs=30)
    assert (cut.cuts, cut.last_cut_step) == (0, None)
    toy.assert_same(watched.state_dict(), alone.state_dict())
    toy.assert_same(with_it.optimizers[0].state_dict(), without.optimizers[0].state_dict())


def test_goes_together_with_the_stop(tmp_path):
    """In either order; a cut slows the stop's training time down."""
    sums = []
    for order in (1, -1):
        cut, stop, rates = PopRiskLRCut(window=WINDOW), toy.watch(window=WINDOW), Rates()
        fit(tmp_path, *[cut, stop][::order], rates)
        assert cut.cuts >= 1
        sums.append(stop.history[-1]["lr_sum"])
        assert sums[-1] == pytest.approx(sum(rates.rates))
    assert sums[0] == sums[1]
