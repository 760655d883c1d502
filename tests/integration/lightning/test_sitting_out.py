"""Examples sit out of a run, as Lightning alone knows it: losses, logs, loaders, metrics.

What is alike in Trainer is in `tests/integration/test_risk_contract.py`.
"""

import itertools
import logging
import math
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    WeightedRandomSampler,
)
from torchmetrics.classification import MulticlassAccuracy

from poprisk_integrations.diagnostics.risk_run import RiskRun
from poprisk_integrations.diagnostics.sitting_out import SittingOut
from poprisk_integrations.lightning import PopRiskEarlyStopping
from tests.integration.frameworks import decide
from tests.integration.lightning import toy

pytestmark = [
    *toy.third_party_warnings,
    pytest.mark.filterwarnings("ignore:.*dataloader_iter. (step flavor|argument)"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before"),
]

EXAMPLES, BATCH = 256, 32


class Numbered(Dataset):
    """Each example with its number."""

    def __init__(self, n=EXAMPLES):
        self.data = toy.noisy_data(n, toy.FLIPS)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return (*self.data[index], index)


class Model(toy.Classifier):
    """With all that keeps a memory: dropout, running statistics, a metric, logged values."""

    def __init__(self, make_optimizer=None, **kwargs):
        super().__init__(make_optimizer or (lambda p: torch.optim.AdamW(p, lr=3e-2)), **kwargs)
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.2)
        self.accuracy = MulticlassAccuracy(4)
        self.seen = []  # (is it trained on, numbers, losses)

    def scores(self, x):
        return self.net(self.drop(self.norm(x)))

    def training_step(self, batch, batch_idx):
        x, y, numbers = batch
        scores = self.scores(x).float()
        each = nn.functional.nll_loss(scores.log_softmax(1), y, reduction="none").detach()
        self.seen.append((scores.requires_grad, numbers.tolist(), each))
        loss = nn.functional.cross_entropy(scores, y)
        self.accuracy(scores, y)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss


def data(n=EXAMPLES, **kwargs):
    generator = torch.Generator().manual_seed(3)
    settings = {"batch_size": BATCH, "shuffle": "sampler" not in kwargs, "generator": generator}
    return DataLoader(Numbered(n), **{**settings, **kwargs})


def fit(root, *callbacks, loader=None, **kwargs):
    torch.manual_seed(11)
    kwargs = {"model": None, "max_epochs": 6, "data": loader or data(), **kwargs}
    kwargs["model"] = kwargs["model"] or Model()
    return toy.fit(root, *callbacks, **kwargs)


def risk(**kwargs):
    defaults = {"criterion": "risk", "patience": 3, "action": "stop"}
    return PopRiskEarlyStopping(**{**defaults, **kwargs})


class TwoLosses(Model):
    """Of which one is only looked at."""

    def training_step(self, batch, batch_idx):
        x, y, numbers = batch
        scores = self.scores(x).float()
        classes, size = nn.functional.cross_entropy(scores, y), scores.square().mean()
        nn.functional.l1_loss(scores.detach(), torch.zeros_like(scores))
        zeros = torch.zeros_like(scores)
        each = nn.functional.nll_loss(scores.log_softmax(1), y, reduction="none").detach()
        each = each + 0.1 * scores.detach().square().mean(1)
        self.seen.append((scores.requires_grad, numbers.tolist(), each))
        return {"loss": classes + 0.1 * nn.functional.mse_loss(scores, zeros), "size": size}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_several_losses_count_as_they_are_trained_on(tmp_path, monkeypatch, accumulate):
    records = []

    def record(self, indices, values, *, position):
        records.append((indices.tolist(), values["loss"].clone()))

    monkeypatch.setattr(SittingOut, "record", record)
    monkeypatch.setattr(SittingOut, "close_window", lambda self, *, step: None)
    settings = {"model": TwoLosses(), "max_epochs": 2, "accumulate_grad_batches": accumulate}
    model, _ = fit(tmp_path, risk(), **settings)
    assert len(records) == len(model.seen) - 1
    for (indices, losses), (_, numbers, each) in zip(records, model.seen[1:], strict=True):
        assert indices == numbers
        torch.testing.assert_close(losses, each)


def test_measuring_sitters_changes_nothing(tmp_path, monkeypatch):
    """Weights, running statistics, metrics, logged values, random numbers: to the bit."""
    logged = []

    class Logged(Callback):
        def on_train_epoch_end(self, trainer, *_):
            logged.append({k: v for k, v in trainer.callback_metrics.items() if "poprisk" not in k})

    def run():
        logged.clear()
        model, trainer = fit(tmp_path, risk(action="monitor"), Logged(), max_epochs=3)
        random = torch.get_rng_state()
        return model.state_dict(), trainer.optimizers[0].state_dict(), list(logged), random

    with_sitters = run()
    assert set(with_sitters[2][1]) == {"accuracy", "loss", "loss_step", "loss_epoch"}
    monkeypatch.setattr(RiskRun, "measure_sitters", lambda self, number, forward: None)
    toy.assert_same(with_sitters, run())


def test_it_reads_no_gradients(tmp_path):
    hooks = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, *_):
            (optimizer,) = trainer.optimizers
            hooks.append(len(optimizer._optimizer_step_post_hooks))

    fit(tmp_path, risk(), Look(), max_epochs=2)
    assert set(hooks) == {0}


@pytest.mark.parametrize("kwargs", [{"precision": "bf16-true"}, {"precision": "64-true"}], ids=str)
def test_it_works_with(tmp_path, kwargs):
    stop = risk(action="monitor")
    fit(tmp_path, stop, **kwargs)
    assert len(stop.history) == 6
    assert all(math.isfinite(row["estimated_test_loss"]) for row in stop.history)
    assert [row["step"] for row in stop.history] == [8 * (k + 1) for k in range(6)]


def test_another_data_set_is_refused_before_any_step(tmp_path):
    _, trainer = fit(tmp_path, risk(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    with pytest.raises(ValueError, match="examples=256, this run has 128"):
        fit(tmp_path, risk(), loader=data(128), ckpt_path=tmp_path / "saved.ckpt")


def test_a_resumed_run_says_what_it_has_lost(tmp_path, monkeypatch):
    decide(monkeypatch, best=(8,), keeps=True)
    whole = risk()
    for name, callbacks in (("with", [whole]), ("without", [])):
        _, trainer = fit(tmp_path, *callbacks, max_epochs=2)
        trainer.save_checkpoint(tmp_path / name)
    Path(whole.best_model_path).unlink()
    with pytest.warns(UserWarning, match=r"poprisk-best-step=8.ckpt is gone"):
        fit(tmp_path, risk(), ckpt_path=tmp_path / "with", max_epochs=3)
    with pytest.warns(UserWarning, match="knows nothing of the steps before 16; the test loss is"):
        fit(tmp_path, risk(), ckpt_path=tmp_path / "without", max_epochs=3)


def test_a_monitor_only_warns_where_there_is_no_estimate(tmp_path):
    settings = {"limit_train_batches": 4, "max_epochs": 2}
    with pytest.warns(UserWarning, match="cannot be estimated in this run: an epoch draws 4 of"):
        _, trainer = fit(tmp_path, risk(action="monitor"), **settings)
    assert trainer.current_epoch == 2


def test_checkpoints_early_stopping_plateaus_and_loggers_follow_the_estimate(tmp_path):
    name = "poprisk/estimated_test_loss"

    class Plateau(Model):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": name},
            }

    best = ModelCheckpoint(tmp_path / "c", "{step}", monitor=name)
    early, stop = EarlyStopping(name, patience=4), risk(action="monitor")
    settings = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 8, "max_epochs": 40}
    settings |= {"model": Plateau(), "enable_checkpointing": True}
    _, trainer = fit(tmp_path, stop, best, early, **settings)
    values = [row["estimated_test_loss"] for row in stop.history]
    assert best.best_model_score.item() == pytest.approx(min(values), abs=1e-6)
    assert early.stopped_epoch > 0
    assert len(values) == early.stopped_epoch + 1
    assert trainer.optimizers[0].param_groups[0]["lr"] < 3e-2
    (path,) = tmp_path.rglob("metrics.csv")
    columns = path.read_text().splitlines()[0].split(",")
    for kind in ("test_loss", "gap", "test_accuracy"):
        assert {f"poprisk/estimated_{kind}", f"poprisk/estimated_{kind}_se"} <= set(columns)


@pytest.mark.parametrize("can_write", [True, False])
def test_min_epochs_are_waited_for_and_an_unwritable_directory_costs_no_run(
    tmp_path, monkeypatch, can_write
):
    decide(monkeypatch, stop=24, best=(16,))
    (tmp_path / "file").write_text("not a directory")
    stop, root = risk(), tmp_path if can_write else tmp_path / "file" / "runs"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, trainer = fit(root, stop, min_epochs=5)
    said = [str(w.message) for w in caught if "best weights are not loaded" in str(w.message)]
    assert trainer.global_step == stop.stopped_step == 5 * 8
    assert len(said) == 1 - can_write
    assert bool(stop.best_model_path) is can_write


class Draws(Model):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return super().training_step(batch, 0)


CANNOT = {  # beside what is in the contract
    "replacement": (
        {"loader": lambda: data(sampler=RandomSampler(Numbered(), replacement=True))},
        "with replacement",
    ),
    "weights": (
        {"loader": lambda: data(sampler=WeightedRandomSampler(torch.ones(EXAMPLES), EXAMPLES))},
        "with replacement",
    ),
    "several loaders": ({"loader": lambda: [data(), data()]}, "several loaders"),
    "a collection": ({"loader": lambda: {"a": data()}}, "one of a collection"),
    "part of an epoch": ({"limit_train_batches": 4}, "4 of the 8 batches"),
    "loaders anew": ({"reload_dataloaders_every_n_epochs": 1}, "made anew"),
    "draws itself": ({"model": Draws}, "dataloader_iter"),
}


def _situation(name):
    kwargs, why = CANNOT[name]
    made = {k: v() if callable(v) else v for k, v in kwargs.items()}
    if name in ("several loaders", "a collection"):
        made["model"] = Nested()
    return made, why


class Nested(Model):
    def training_step(self, batch, batch_idx):
        first = batch[0] if isinstance(batch, list) else batch["a"]
        return super().training_step(first, batch_idx)


@pytest.mark.parametrize("name", list(CANNOT))
def test_where_it_cannot_be_it_says_why_before_any_step(tmp_path, name):
    kwargs, why = _situation(name)
    with pytest.raises(MisconfigurationException, match=why):
        fit(tmp_path, risk(), **kwargs)


@pytest.mark.parametrize("name", ["replacement", "several loaders"])
def test_where_it_cannot_be_auto_stops_nothing_and_everybody_is_trained_on(tmp_path, caplog, name):
    kwargs, why = _situation(name)
    stop = PopRiskEarlyStopping(window=8)
    with caplog.at_level(logging.INFO):
        model, trainer = fit(tmp_path, stop, **kwargs)
    (line,) = [r.message for r in caplog.records if "cannot be estimated" in r.message]
    assert why in line
    assert "stops nothing (criterion='signal' would)" in line
    assert stop.stopped_step is None
    assert trainer.current_epoch == 6
    plain, _ = fit(tmp_path, **_situation(name)[0])
    toy.assert_same(plain.state_dict(), model.state_dict())


def test_a_single_pass_has_nothing_to_stop(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        model, _ = fit(tmp_path, risk(), max_epochs=1)
    assert "nothing to stop in a single pass" in caplog.text
    assert sum(len(numbers) for _, numbers, _ in model.seen) == EXAMPLES


def test_an_error_in_a_sitters_forward_pass_switches_it_off_and_the_run_goes_on(tmp_path, caplog):
    class Fails(Model):
        def training_step(self, batch, batch_idx):
            if not torch.is_grad_enabled() and self.trainer.global_step > 12:
                raise RuntimeError("injected")
            return super().training_step(batch, batch_idx)

    stop = risk()
    model, trainer = fit(tmp_path, stop, model=Fails(), max_epochs=4)
    assert trainer.global_step == 32
    assert "injected" in stop.switched_off
    assert caplog.text.count("is switched off") == 1
    last = [numbers for is_trained, numbers, _ in model.seen[-8:] if is_trained]
    assert sorted(itertools.chain(*last)) == list(range(EXAMPLES))


def test_nothing_is_left_behind(tmp_path):
    loader = data()
    sampler = loader.batch_sampler
    _, trainer = fit(tmp_path, risk(), loader=loader)
    assert loader.batch_sampler is sampler
    assert "process_dataloader" not in vars(trainer.strategy)
    model, _ = fit(tmp_path, loader=loader, max_epochs=1)
    assert sum(len(numbers) for _, numbers, _ in model.seen) == EXAMPLES


def test_steps_may_be_asked_for_before_there_is_an_optimizer(tmp_path):
    """Lightning makes loaders then, in the middle of `configure_optimizers`."""

    class OneCycle(Model):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            steps = int(self.trainer.estimated_stepping_batches)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-2, steps)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    stop = risk(patience=2)
    _, trainer = fit(tmp_path, stop, model=OneCycle(), max_epochs=20)
    assert trainer.global_step == 160  # it anneals by itself
    assert stop.stopped_step in (None, 160)  # at the end at most, when all is annealed
    assert len(stop.history) == 20
