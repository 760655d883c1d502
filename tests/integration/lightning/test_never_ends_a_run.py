"""What goes wrong inside our callbacks costs their work, and never the user's run or model."""

import json
import os
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from poprisk_integrations.lightning import PopRiskEarlyStopping, PopRiskLRCut, PopRiskMonitor
from poprisk_integrations.lightning._upstream import MisconfigurationException
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings

HOOKS = {
    PopRiskEarlyStopping: (
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
        "on_train_epoch_end",
        "on_fit_end",
        "teardown",
        "state_dict",
    ),
    PopRiskLRCut: ("on_after_backward", "on_before_optimizer_step", "on_train_batch_end"),
    PopRiskMonitor: ("on_before_optimizer_step", "on_train_batch_end"),
}
INSIDE = {  # what each of them calls on the way
    ("on_after_backward", PopRiskEarlyStopping): "_feed.count_micro_batch",
    ("on_after_backward", PopRiskLRCut): "_feed.count_micro_batch",
    ("on_before_optimizer_step", PopRiskEarlyStopping): "_feed.read",
    ("on_before_optimizer_step", PopRiskLRCut): "_feed.read",
    ("on_before_optimizer_step", PopRiskMonitor): "_sample.before_step",
    ("on_train_batch_end", PopRiskEarlyStopping): "_judge.after_step",
    ("on_train_batch_end", PopRiskLRCut): "_feed.take_lr",
    ("on_train_batch_end", PopRiskMonitor): "_sample.after_step",
    ("on_train_epoch_end", PopRiskEarlyStopping): "_judge.accept",
    ("on_fit_end", PopRiskEarlyStopping): "_result.after_fit",
    ("teardown", PopRiskEarlyStopping): "_feed.release",
    ("state_dict", PopRiskEarlyStopping): "_result.state_dict",
}


class Breaks(Callback):
    """Makes one of our methods raise from step 5 on."""

    def __init__(self, callback, path):
        self.callback, self.path = callback, path

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 5:
            owner, name = self.callback, self.path
            while "." in name:
                part, _, name = name.partition(".")
                owner = getattr(owner, part)

            def fails(*args, **kwargs):
                raise OSError("injected")

            setattr(owner, name, fails)


@pytest.mark.parametrize(
    ("kind", "hook"), [(kind, hook) for kind, hooks in HOOKS.items() for hook in hooks]
)
def test_an_error_inside_a_hook_switches_the_callback_off(tmp_path, caplog, kind, hook):
    callback = kind(every_n_steps=1) if kind is PopRiskMonitor else kind(window=8)
    saver = ModelCheckpoint(tmp_path, "last")
    breaks = Breaks(callback, INSIDE[hook, kind])
    trainer = toy.trainer(
        tmp_path, [callback, breaks, saver], enable_checkpointing=True, max_epochs=3
    )
    trainer.fit(toy.Classifier(toy.gated), toy.loader())
    assert trainer.global_step == 24
    saved = torch.load(saver.best_model_path, weights_only=True)
    assert saved["global_step"] == 24
    assert "injected" in callback.switched_off
    said = [r.message for r in caplog.records if "switched off" in r.message]
    assert len(said) == 1
    assert kind.__name__ in said[0]
    toy.trainer(tmp_path, [callback], max_steps=1).fit(toy.Classifier(toy.gated), toy.loader())
    assert callback.switched_off is None  # the next run starts with it on again


@pytest.fixture
def a_full_disk(monkeypatch):
    """For the onset's checkpoint only."""
    from lightning.pytorch import Trainer

    save = Trainer.save_checkpoint

    def fails(self, path, *args, **kwargs):
        if "onset" in str(path):
            raise OSError(28, "No space left on device")
        return save(self, path, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", fails)


def test_an_onset_that_cannot_be_saved_does_not_end_the_run(tmp_path, a_full_disk):
    stop = PopRiskEarlyStopping(window=8, restore="onset")
    trainer = toy.trainer(tmp_path, [stop])
    with pytest.warns(UserWarning, match="could not be written to .*No space left"):
        trainer.fit(toy.Classifier(), toy.loader())
    assert trainer.global_step == stop.stopped_step == 45
    assert stop.best_model_path == ""


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path):
    """And leaves no half of one."""

    class FullDisk(Callback):
        def on_train_end(self, trainer, pl_module):
            (tmp_path / "c" / "poprisk_stop.json").mkdir()

    saver = ModelCheckpoint(tmp_path / "c", "last")
    stop = PopRiskEarlyStopping(window=8)
    trainer = toy.trainer(
        tmp_path, [stop, FullDisk(), saver], enable_checkpointing=True, max_epochs=2
    )
    with pytest.warns(UserWarning, match="its report could not be written to"):
        trainer.fit(toy.Classifier(), toy.loader())
    assert sorted(os.listdir(tmp_path / "c")) == ["last.ckpt", "poprisk_stop.json"]


class Tracker(DummyLogger):
    """As trackers are: one directory for all runs, a name and a version for each."""

    def __init__(self, root, version):
        super().__init__()
        self._root, self._version = str(root), version

    @property
    def save_dir(self):
        return self._root

    @property
    def name(self):
        return "project"

    @property
    def version(self):
        return self._version


@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the log")
def test_two_runs_of_a_tracker_leave_two_reports(tmp_path):
    for version in ("first", 2):
        trainer = toy.trainer(
            tmp_path,
            [PopRiskEarlyStopping(window=8)],
            logger=Tracker(tmp_path, version),
            max_epochs=2,
        )
        trainer.fit(toy.Classifier(), toy.loader())
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("poprisk_stop.json"))
    assert found == ["project/first/poprisk_stop.json", "project/version_2/poprisk_stop.json"]


@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the log")
def test_a_report_has_the_keys_that_both_frameworks_have(tmp_path):
    stop = PopRiskEarlyStopping(window=8)
    trainer = toy.trainer(tmp_path, [stop], logger=CSVLogger(tmp_path), max_epochs=3)
    trainer.fit(toy.Classifier(), toy.loader())
    (path,) = tmp_path.rglob("poprisk_stop.json")
    report = json.loads(path.read_text())
    shared = {"stopped", "global_step", "reason", "diagnosis", "window_steps", "settings"}
    assert shared <= report.keys()
    assert stop.state_dict()["rule"].keys() <= report.keys()
    assert [(row["steps"], row["reused"]) for row in report["history"]] == [
        (8, False),
        (8, True),
        (8, True),
    ]
    assert set(report["settings"]) == {
        *("kappa", "threshold", "min_steps", "window", "action", "restore"),
        *("accumulator", "epoch_steps"),
    }


class Manual(toy.Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Manual, "needs automatic optimization"),
        (lambda: toy.Classifier(torch.optim.LBFGS), "one gradient per step, found LBFGS"),
    ],
)
def test_a_monitor_that_sees_nothing_says_so_and_lets_train(tmp_path, model, reason):
    watch = PopRiskEarlyStopping(window=8, action="monitor")
    trainer = toy.trainer(tmp_path, [watch], max_epochs=2)
    with pytest.warns(UserWarning, match="it measures nothing in this run") as caught:
        trainer.fit(model(), toy.loader())
    assert len([w for w in caught if "PopRisk" in str(w.message)]) == 1
    assert any(reason in str(w.message) for w in caught)
    assert trainer.global_step == 16
    with pytest.raises(MisconfigurationException, match=reason):
        toy.trainer(tmp_path, [PopRiskEarlyStopping(window=8)]).fit(model(), toy.loader())


def test_a_checkpoint_that_picks_by_f_ignores_epochs_without_one(tmp_path):
    """Logged as -1 before the first window, that epoch was the best one for ever."""
    watch = PopRiskEarlyStopping(window=16, action="monitor")
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="poprisk/signal_ratio", mode="min")
    trainer = toy.trainer(tmp_path, [watch, best], enable_checkpointing=True, max_epochs=6)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*could not find the monitored key")
        trainer.fit(toy.Classifier(), toy.loader())
    ratios = [row["signal_ratio"] for row in watch.history]
    assert float(best.best_model_score) == pytest.approx(min(ratios))
